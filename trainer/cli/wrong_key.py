"""Why an option cannot be set: its name is wrong, or it belongs to another choice."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from optim.options import nearest, unknown
from trainer.cli import elsewhere
from trainer.cli.choices import group_choices, options_by_choice, valid_keys
from trainer.config import group_names
from trainer.wording import some

_FEW = 3  # choices, at most, that are named as having an option


@dataclass(frozen=True, kw_only=True)
class _WrongKey:
    """A key that cannot be set, and the configuration without it."""

    key: str
    valid: list[str]  # its keys
    choices: list[str]  # its group choices, as overrides

    @property
    def owner(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def siblings(self) -> list[str]:
        """The options beside it."""
        owner = self.owner
        return [k.removeprefix(f"{owner}.") for k in self.valid if k.startswith(f"{owner}.")]


def explain_key(key: str, overrides: list[str]) -> str:
    """Explain a key that cannot be set, by the valid ones (in a sweep, of the first run that lacks
    it)."""
    for choices in group_choices([o for o in overrides if not _sets(o, key)]):
        valid = valid_keys(choices)
        if key not in valid:
            break
    wrong = _WrongKey(key=key, valid=valid, choices=choices)
    return next(filter(None, (explained(wrong) for explained in _REASONS)))


def _sets(override: str, key: str) -> bool:
    return override.lstrip("+~").startswith(key)


def _exists(wrong: _WrongKey) -> str | None:
    if wrong.key in wrong.valid or wrong.key in group_names():
        return f"{wrong.key} already exists; set it without + or ~: {wrong.key}=..."
    return None


def _of_another_trainer(wrong: _WrongKey) -> str | None:
    if ours := elsewhere.NAMES.get(wrong.key) or elsewhere.NAMES.get(wrong.name):
        return f"there is no option {wrong.key!r}; it is called {ours!r} here"
    if written := elsewhere.WRITTEN.get(wrong.name):
        return f"there is no option {wrong.key!r}; write {written}"
    return None


def _of_a_class(wrong: _WrongKey) -> str | None:
    if f"{wrong.owner}.class_path" in wrong.valid or wrong.owner.endswith(".options"):
        new = "NAME" if wrong.key == "optim.options" else wrong.name
        return f"{wrong.key}: add arguments of the class with a +: '+optim.options.{new}=...'"
    return None


def _those_called(name: str, wrong: _WrongKey) -> str | None:
    """Proposes the options of this name, in whichever group."""
    if called := [k for k in wrong.valid if k.endswith(f".{name}")]:
        meant = " or ".join(map(repr, called))
        return f"there is no option {wrong.key!r}; did you mean {meant}?"
    return None


def _of_another_choice(wrong: _WrongKey) -> str | None:
    if nearest(wrong.name, wrong.siblings):
        return None  # rather a typing error
    having = _choices_with(wrong.key, wrong.choices)
    if 0 < len(having) <= _FEW:
        verb = "has" if len(having) == 1 else "have"
        return f"there is no option {wrong.key!r} here; {', '.join(having)} {verb} it"
    return None


def _of_other_groups(wrong: _WrongKey) -> str | None:
    """For a key without its group, which other choices have such an option."""
    if wrong.owner or wrong.key in group_names():
        return None
    having = {
        f"{group}.{wrong.key}": _choices_with(f"{group}.{wrong.key}", wrong.choices)
        for group in group_names()
    }
    told = [f"{key} with {some(choices)}" for key, choices in having.items() if choices]
    return f"there is no option {wrong.key!r} here; there is {' and '.join(told)}" if told else None


def _mistyped_option(wrong: _WrongKey) -> str | None:
    if not wrong.siblings:
        return None
    chosen = next((c for c in wrong.choices if c.startswith(f"{wrong.owner}=")), wrong.owner)
    return f"{wrong.key}: {unknown(f'option of {chosen}', wrong.name, wrong.siblings)}"


def _mistyped_key(wrong: _WrongKey) -> str:
    if wrong.owner and difflib.get_close_matches(wrong.key, wrong.valid, n=1):
        return unknown("option", wrong.key, wrong.valid)
    top = {k.split(".")[0] for k in wrong.valid} | set(group_names())
    if not wrong.owner and not nearest(wrong.key, top):
        near = nearest(wrong.key, {k.rpartition(".")[2] for k in wrong.valid})
        if near and (line := _those_called(near, wrong)):
            return line
    return unknown("option or group", wrong.key, top)


# What may be wrong with a key, the most certain first.
_REASONS: tuple[Callable[[_WrongKey], str | None], ...] = (
    _exists,
    _of_another_trainer,
    _of_a_class,
    lambda wrong: _those_called(wrong.name, wrong),
    _of_another_choice,
    _of_other_groups,
    _mistyped_option,
    _mistyped_key,
)


def _choices_with(key: str, chosen: list[str]) -> list[str]:
    """Other choices of the option's group that have it: method.rank -> method=lora."""
    group, _, option = key.partition(".")
    having = [name for name, options in options_by_choice(group).items() if option in options]
    return [f"{group}={name}" for name in having if f"{group}={name}" not in chosen]
