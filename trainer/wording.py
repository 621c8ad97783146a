"""Parts of messages."""

from collections.abc import Iterable


def plural(count: int | str, noun: str, ending: str = "s") -> str:
    """A number with its noun: 1 picture, 2 pictures.  count: may be formatted already."""
    return f"{count} {noun}{'' if str(count) == '1' else ending}"


def some(names: Iterable[str]) -> str:
    """The first five distinct names, for a message."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")
