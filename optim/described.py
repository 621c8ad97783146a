"""What `help` and `inspect.signature` say of an optimizer's class: every option that it has, those
of its bases and of `Features` included, with the class's own defaults."""

import inspect
import re
import textwrap
from collections.abc import Callable
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any, get_type_hints

from optim.features import Features

_WIDTH = 96  # of a line of arguments: what is left of 100 in a class's docstring
_DEFAULT = "Default: "


def with_defaults(init: Any, defaults: dict[str, Any]) -> FunctionType:
    """A copy of a constructor with other defaults, of those of its arguments that are given."""
    code = init.__code__
    twin = FunctionType(code, init.__globals__, code.co_name, closure=init.__closure__)
    positional = code.co_varnames[: code.co_argcount]
    old = init.__defaults__ or ()
    names = positional[len(positional) - len(old) :]
    twin.__defaults__ = tuple(defaults.get(k, x) for k, x in zip(names, old, strict=True))
    twin.__kwdefaults__ = {k: defaults.get(k, x) for k, x in (init.__kwdefaults__ or {}).items()}
    twin.__annotations__, twin.__qualname__ = init.__annotations__, init.__qualname__
    twin.__doc__ = init.__doc__
    return twin


def signature(init: Callable[..., Any], defaults: dict[str, Any]) -> Signature:
    """The signature of a class whose constructor takes some options and, as `**features`, the
    others of `defaults`, which has the defaults of all."""
    _, *listed = inspect.signature(init).parameters.values()  # without self
    own = [
        each.replace(default=defaults.get(each.name, each.default))
        for each in listed
        if each.kind is not Parameter.VAR_KEYWORD
    ]
    types, names = get_type_hints(Features), {each.name for each in own}
    features = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in defaults.items()
        if name in types and name not in names
    ]
    return Signature(own + features)


def documentation(cls: type) -> str:
    """A class's docstring whose Args are all arguments of its signature, with their defaults."""
    described = arguments(cls)
    lines = ["Args:"]
    for name, argument in inspect.signature(cls).parameters.items():
        words = [f"{name}:", described.get(name, "")]
        if argument.default is not argument.empty:
            words.append(f"{_DEFAULT}{argument.default!r}.")
        lines += textwrap.wrap(
            " ".join(filter(None, words)),
            _WIDTH,
            initial_indent="    ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
    sections = list(filter(None, inspect.cleandoc(cls.__doc__ or "").split("\n\n")))
    starts = [section.partition(":")[0] for section in sections]
    if "Args" in starts:
        sections[starts.index("Args")] = "\n".join(lines)
    else:
        place = starts.index("Source") if "Source" in starts else len(sections)
        sections.insert(place, "\n".join(lines))
    return "\n\n".join(sections) + "\n"


def arguments(cls: type) -> dict[str, str]:
    """What each argument of a class means, by name."""
    found = _paragraphs(Features.__doc__ or "")
    for base in reversed(cls.__mro__):
        found |= _arguments(base.__doc__ or "")
    return found


def _arguments(doc: str) -> dict[str, str]:
    """The descriptions of a docstring's Args, by name, without defaults."""
    for section in inspect.cleandoc(doc).split("\n\n"):
        if section.startswith("Args:\n"):
            entries = re.split(r"^    (?=\w)", section, flags=re.MULTILINE)[1:]
            return dict(map(_described, entries))
    return {}


def _paragraphs(doc: str) -> dict[str, str]:
    """The descriptions in a docstring that has a paragraph for each name."""
    sections = inspect.cleandoc(doc).split("\n\n")
    return dict(_described(section) for section in sections if re.match(r"\w+: ", section))


def _described(entry: str) -> tuple[str, str]:
    """'name: text', of several lines, as (name, text in one without a default)."""
    start, _, text = " ".join(entry.split()).partition(": ")
    return start.partition(" ")[0], text.partition(_DEFAULT)[0].strip()
