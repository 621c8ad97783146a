"""Tables as text: Markdown that can be read without being rendered, too."""

from collections.abc import Collection, Sequence
from typing import Any

from trainer.report import format_bytes


def table(rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> str:
    """A table of these cells, the first row its titles.  The first column, and those whose titles
    are in `words`, are of words; the others are of numbers, and end at the right."""
    titles = rows[0]
    left = [place == 0 or title in words for place, title in enumerate(titles)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(titles))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        )
        + " |"
        for row in rows
    ]
    rule = "|".join(
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":"
        for width, is_left in zip(widths, left, strict=True)
    )
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def cell(value: Any, form: str) -> str:
    """A value in a form of `str.format`, or as `bytes`; nothing where it is not known."""
    if value is None:
        return ""
    return format_bytes(value) if form == "bytes" else form.format(value)
