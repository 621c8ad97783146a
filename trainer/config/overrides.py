"""Options by their keys, of command-line overrides and of a whole configuration; and values as
Hydra reads them."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_SAFE = re.compile(r"[\w./:@%+-]+", re.ASCII)  # what Hydra takes for a text without quotes


def key_of(override: str) -> str:
    """+optim.lr=1e-4 -> optim.lr"""
    return override.lstrip("+~").partition("=")[0]


def keys_of(overrides: Iterable[str]) -> frozenset[str]:
    """The options and groups that the overrides set."""
    return frozenset(map(key_of, overrides))


def is_in(key: str, groups: Collection[str]) -> bool:
    """Whether an option, or a group, is one of these or below one of them, as method.metadata.title
    is below method.metadata."""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def for_hydra(value: Any) -> str:
    """A value in the notation of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(for_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {for_hydra(x)}' for key, x in value.items())}}}"
    text = str(value)
    if _SAFE.fullmatch(text):
        return text
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)  # a backslash is only special before a quote
    at_the_end = escaped[len(escaped.rstrip("\\")) :]
    return f'"{escaped}{at_the_end}"'
