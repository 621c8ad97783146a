"""Options by their keys: of command-line overrides, and of a whole configuration."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


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
