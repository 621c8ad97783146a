"""What a command of kohya's scripts, or a file with their options, asks for."""

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_COMMAND_FILES = {".sh", ".bat", ".cmd", ".ps1", ".txt", ""}
_WINDOWS = {".bat", ".cmd", ".ps1"}


@dataclass(kw_only=True)
class Given:
    """A script's options.  What a script takes for not given (false, an empty text) is left out."""

    script: str = ""  # its name, if it is known: sdxl_train_network.py
    options: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an option, which is then known to have been seen to."""
        self.taken.add(name)
        return self.options.get(name, default)

    @property
    def others(self) -> list[str]:
        """The options that nobody took."""
        return [name for name in self.options if name not in self.taken]


def read(file: Path) -> Given:
    """The options in a file: a .toml as for `--config_file`, or a script with the command.

    Raises UserError if it is neither.
    """
    if file.suffix == ".toml":
        return Given(options=_present(_flat(toml(file))))
    if file.suffix not in _COMMAND_FILES:
        raise UserError(
            f"{file}: give the .toml that kohya's scripts read with --config_file, or a script "
            "(.sh, .bat) with their command"
        )
    text = _text(file)
    joined = re.sub(r"[\\^`][ \t]*\r?\n", " ", text)
    line = next((line for line in joined.splitlines() if re.search(r"\.py\b.* --\w", line)), None)
    if line is None:
        raise UserError(f"{file}: there is no command of a Python script with options in it")
    try:
        words = shlex.split(line, comments=True, posix=file.suffix not in _WINDOWS)
    except ValueError as error:
        raise UserError(f"{file}: the command cannot be read: {error}") from error
    return parse([word.strip("\"'") for word in words])


def parse(words: Sequence[str]) -> Given:
    """The options of a command: accelerate launch sdxl_train_network.py --network_dim 32 ..."""
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    options: dict[str, Any] = {}
    name = ""
    for word in words[place + 1 :]:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            options[name] = value if has_value else True
        elif name:
            before = options[name]
            options[name] = word if before is True else [*_listed(before), word]
        else:
            raise UserError(f"{word}: an option of kohya's scripts begins with --")
    script = re.split(r"[\\/]", words[place])[-1] if place >= 0 else ""
    given = _present(options)
    file = given.pop("config_file", None)
    if file is not None:
        path = Path(file if str(file).endswith(".toml") else f"{file}.toml")
        given = read(path).options | given
    return Given(script=script, options=given)


def toml(file: Path) -> dict[str, Any]:
    """A TOML file.  Raises UserError if it cannot be read."""
    try:
        return tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all sections together, as the scripts read them."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in options.items() if x is not False and x not in (None, "", [])}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
