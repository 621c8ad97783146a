"""The text of `python -m trainer --help TOPIC ...`: groups, their choices, and options."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

import optim
from optim import described
from optim.options import allowed as allowed_in_family
from trainer.cli.compose import composed
from trainer.cli.wrong_key import explain_key
from trainer.config import choices_of, documented, for_hydra, group_names
from trainer.config.fields import allowed
from trainer.errors import UserError

_WIDTH = 100  # of a line
_INDENT = " " * 4


@dataclass(frozen=True, kw_only=True)
class _Option:
    """An option with its present value, the values that it may have, and what it means."""

    key: str
    value: str
    allowed: str
    text: str

    def __str__(self) -> str:
        about = [f"({self.allowed})" if self.allowed else "", self.text]
        return "\n".join([f"{self.key}={self.value}", *_wrapped(" ".join(filter(None, about)))])


def about(words: list[str]) -> str:
    """What these topics are.

    words: groups (data), choices (optim=lion) and options (data.mask; mask is every option with
    this word in its name).  Values are those under the choices among them.  Raises UserError for a
    word that is none of these.
    """
    words = [word.lstrip("+~") for word in words]  # as overrides may begin
    overrides = [word for word in words if "=" in word]
    options = list(_options(composed(overrides)))
    topics = [word for word in words if "=" not in word] or overrides
    return "\n\n".join(text for topic in topics for text in _about(topic, options, overrides))


def _about(topic: str, options: list[_Option], overrides: list[str]) -> list[str]:
    """The paragraphs on a topic."""
    name, _, choice = topic.partition("=")
    inside = [o for o in options if f".{name}." in f".{o.key}.".replace("[]", ".")]
    if name in group_names():
        first = _about_choices(name, choice.strip("[]").split(",")) if choice else _of_group(name)
        return [first, *map(str, inside)]
    found = [o for o in options if o in inside or name in o.key.rpartition(".")[2]]
    if not found:
        raise UserError(_why_unknown(name, overrides))
    return [*map(str, found)]


def _why_unknown(word: str, overrides: list[str]) -> str:
    if word.partition(".")[0] == "hydra":
        return (
            f"{word} is Hydra's own; its options with their values: python -m trainer --cfg hydra "
            "(hydra.run.dir=... is the folder of a run)"
        )
    if owners := [group for group in group_names() if word in choices_of(group)]:
        every = " or ".join(f"--help {group}={word}" for group in owners)
        return f"{word!r} is a choice; to explain it and its options: {every}"
    return explain_key(word, overrides)


def _of_group(group: str) -> str:
    """A line for each choice of a group."""
    choices = choices_of(group)
    width = max(map(len, choices)) + 4
    lines = [f"{group}=CHOICE"]
    for choice in choices:
        summary = documented.of_choice(group, choice)[0]
        wrapped = textwrap.wrap(summary, _WIDTH - width)
        lines += [f"  {choice}".ljust(width) + wrapped[0]]
        lines += [" " * width + line for line in wrapped[1:]]
    return "\n".join(lines)


def _about_choices(group: str, choices: list[str]) -> str:
    """What these choices are; of presets also which values they change."""
    lines = []
    for choice in choices:
        lines += [f"{group}={choice}", *_wrapped(" ".join(documented.of_choice(group, choice)))]
    if group == "experiment":
        usual = _values([])
        preset = _values([f"{group}=[{','.join(choices)}]"])
        changed = [f"{key}={value}" for key, value in preset.items() if usual.get(key) != value]
        lines += ["", "Other values than without it:", *(_INDENT + line for line in changed)]
    return "\n".join(lines)


def _values(overrides: list[str]) -> dict[str, str]:
    return {option.key: option.value for option in _options(composed(overrides))}


def _options(node: DictConfig, prefix: str = "") -> Iterator[_Option]:
    """The options of a dataclass, and of those in it."""
    schema: Any = OmegaConf.get_type(node)
    family = optim.FAMILY.get(node.name) if prefix == "optim." else None
    texts = described.arguments(family) if family else documented.of_fields(schema)
    types = get_type_hints(schema)
    for option in fields(schema):
        key, name, kind = f"{prefix}{option.name}", option.name, types[option.name]
        is_missing = OmegaConf.is_missing(node, name)
        value = None if is_missing else node[name]
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            yield from _options(value, f"{key}.")
        elif name in texts:  # not the name of the choice itself
            bounds = allowed_in_family(name, option.default) if family else _bounds(option, kind)
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            shown = "..." if is_missing else for_hydra(plain)
            allows, text = _as_written(bounds), _as_written(texts[name])
            yield _Option(key=key, value=shown, allowed=allows, text=text)
            if isinstance(value, ListConfig):
                for item in filter(is_dataclass, get_args(kind)):
                    yield from _options(OmegaConf.structured(item), f"{key}[].")


def _as_written(words: str) -> str:
    """Python's None as it is written on a command line."""
    return re.sub(r"\bNone\b|(?<=, or )none$", "null", words)


def _bounds(option: Field[Any], kind: Any) -> str:
    """Which values an option may have, in words; "" for any."""
    words = allowed(option) or ("true or false" if bool in (kind, *get_args(kind)) else "")
    return f"{words}, or null" if words and NoneType in get_args(kind) else words


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
    )
