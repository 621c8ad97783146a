"""Keys of command-line overrides."""

from collections.abc import Iterable


def key_of(override: str) -> str:
    """+optim.lr=1e-4 -> optim.lr"""
    return override.lstrip("+~").partition("=")[0]


def keys_of(overrides: Iterable[str]) -> frozenset[str]:
    """The options and groups that the overrides set."""
    return frozenset(map(key_of, overrides))
