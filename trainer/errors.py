"""Errors that the user can fix, and how an error is reported; parts of messages.

A UserError is printed as one line, without a traceback, and the exit status is 2.
"""

from collections.abc import Iterable


class UserError(ValueError):
    """A wrong option, file or folder.  The message names it and says what to do."""


def reason(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def plural(count: int | str, noun: str, ending: str = "s") -> str:
    """A number with its noun: 1 picture, 2 pictures.  count: may be formatted already."""
    return f"{count} {noun}{'' if str(count) == '1' else ending}"


def some(names: Iterable[str]) -> str:
    """The first five distinct names, for a message."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")
