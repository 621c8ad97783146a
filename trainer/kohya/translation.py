"""What a translation consists of, and how values are read for it."""

import ast
from dataclasses import dataclass, field
from typing import Any

from trainer.config import for_hydra
from trainer.errors import UserError


@dataclass(kw_only=True)
class Translation:
    """This trainer's options, and what the reader of them should know."""

    family: str  # sdxl or sd15
    is_lora: bool
    overrides: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def choose(self, choice: str) -> None:
        """Choose one of a group: optim=lion."""
        self.overrides.append(choice)

    def set(self, key: str, value: Any) -> None:
        """Set an option, in Hydra's notation."""
        self.overrides.append(f"{key}={for_hydra(value)}")

    def note(self, text: str) -> None:
        """Say what is not the same, or left out."""
        self.notes.append(text)


def arguments_of(option: str, words: Any) -> dict[str, Any]:
    """["betas=0.9,0.99", ...] -> {"betas": (0.9, 0.99), ...}.  Raises UserError for others."""
    found: dict[str, Any] = {}
    for word in [words] if isinstance(words, str) else words:
        key, equals, text = str(word).partition("=")
        if not equals:
            raise UserError(f"{option}: {word!r} is not of the form name=value")
        try:
            found[key.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key.strip()] = text
    return found


def number(option: str, value: Any) -> float:
    """A number, or a percentage as a share.  Raises UserError that names the option for others."""
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UserError(f"{option}: {value!r} is not a number") from None


def rate_of(value: Any) -> Any:
    """A learning rate as it was written."""
    number("learning_rate", value)
    return value
