"""Groups of a saved configuration, which may be of another version: one that had fewer options, or
others."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from trainer.config.files import choices_of, values_of

log = logging.getLogger(__name__)

# The choice that the others of its group are based on, for groups that do not record theirs.
_BASIC = {"data": "folder", "log": "jsonl", "model": "sdxl", "noise": "default"}
_Group = TypeVar("_Group")


def of_saved(
    group: str,
    schema: type[_Group],
    saved: Mapping[str, Any],
    usual: Mapping[str, Any] | None = None,
) -> _Group:
    """A group of a saved configuration, such as model.

    usual: the values of options that it does not have yet, those in `conf/` if not given.  An
    option that there is no longer is left out, with a warning if it was set.  Raises KeyError for
    an option without a value.
    """
    options = [option.name for option in fields(schema)]  # type: ignore[arg-type]
    for name, value in saved.items():
        if name not in options and value is not None:
            log.warning("%s.%s=%s, of another version, is left out", group, name, value)
    known = with_usual(group, saved) if usual is None else {**usual, **saved}
    values = {name: known.get(name, "???") for name in options}
    if missing := [name for name, value in values.items() if value == "???"]:
        raise KeyError(f"{group}.{missing[0]}")
    return schema(**values)


def with_usual(group: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a saved configuration, with the values in `conf/` of options that it does not have
    yet.  Raises KeyError for a group without its choice, or with one that there is no longer."""
    if group not in _BASIC and "name" not in saved:
        raise KeyError(f"{group}.name")
    choice = _BASIC.get(group) or saved["name"]
    if choice not in choices_of(group):
        raise KeyError(f"{group}={choice}")
    usual = values_of(group, choice)
    return dict(saved) | {name: usual[name] for name in usual if name not in saved}
