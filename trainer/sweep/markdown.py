"""Tables as Markdown that is also readable as plain text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.reporting.report import format_bytes


@dataclass(kw_only=True)
class Table:
    """Rows of cells; the first row has the titles."""

    rows: Sequence[Sequence[str]]
    words: Collection[str] = ()  # titles of text columns; the first column always is one

    @property
    def is_left(self) -> list[bool]:
        """Whether each column is text, which is aligned left; numbers are aligned right."""
        return [not place or title in self.words for place, title in enumerate(self.rows[0])]


def written(table: Table) -> str:
    """Markdown."""
    # A name may have a bar: a pattern of method.rules.
    rows = [[text.replace("|", r"\|") for text in row] for row in table.rows]
    left, titles = table.is_left, rows[0]
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


def first(names: Sequence[str], count: int) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def cell(value: Any, form: str) -> str:
    """A value formatted by `str.format`, or as `bytes`; "" for None."""
    if value is None:
        return ""
    return format_bytes(value) if form == "bytes" else form.format(value)
