"""Parts of messages."""

import re
from collections.abc import Iterable

_OF_ONE = {"are": "is", "have": "has", "their": "its", "them": "it"}


def plural(count: int | str, noun: str, ending: str = "s") -> str:
    """A number with its noun: 1 picture, 2 pictures.  count: may be formatted already."""
    return f"{count} {noun}{'' if str(count) == '1' else ending}"


def counted(count: int, what: str) -> str:
    """A number with what is said of so many: 2 pictures have no caption, 1 picture has no caption.

    what: begins with a noun in -s, whose one verb that has another form for 1 is `are` or `have`.
    """
    if count == 1:
        what = re.sub(r"^(\w+?)(ie)?s\b", lambda found: found[1] + "y" * bool(found[2]), what)
        for words, most in (("are|have", 1), ("their|them", 0)):
            what = re.sub(rf"\b({words})\b", lambda found: _OF_ONE[found[0]], what, count=most)
    return f"{count} {what}"


def some(names: Iterable[str]) -> str:
    """The first five distinct names, for a message."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")
