"""metadata.jsonl and metadata.csv: what they say of the pictures of their folder."""

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from trainer.data import captions
from trainer.data.items import read_file, shown
from trainer.errors import UserError

_REST = "more cells than the header has"


def listed(files: Collection[Path], caption_column: str | None) -> dict[Path, dict[str, Any]]:
    """What the metadata among these files says, by the pictures that it is about.

    Raises UserError for a line that cannot be used, for a picture that has two, and for a file
    without the column that was asked for.
    """
    found: dict[Path, dict[str, Any]] = {}
    walked = _Walked(files)
    for file in files:
        columns: dict[str, None] = {}  # in their order
        for named, record in _records(file):
            picture = walked.path(named)
            if picture in found:
                raise UserError(
                    f"{shown(file)}: {record['file_name']} is listed for the second time"
                )
            found[picture] = record
            columns |= dict.fromkeys(record)
        if caption_column is not None and columns and caption_column not in columns:
            raise UserError(
                f"{shown(file)} has no data.caption_column={caption_column}; there is "
                f"{shown(', '.join(columns))}"
            )
    return found


def _records(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Of a metadata file: each picture and what is said of it; of any other file nothing."""
    reader = READERS.get(path.name)
    for number, record in reader(path) if reader else ():
        where = f"{shown(path)}, line {number}"
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f'{where}: it has no "file_name"')
        if not isinstance(record.get("mask", ""), str | None):
            raise UserError(f'{where}: "mask" is not the name of a file')
        yield path.parent / record["file_name"], record


class _Walked:
    """The files of a folder, by any path that leads to them (../b.png, /abs/b.png): a picture that
    is listed is one of them, not another beside it."""

    def __init__(self, files: Collection[Path]):
        self.files = {*files}

    def path(self, named: Path) -> Path:
        """That of the walk; where it has not been there, the given one without ".."."""
        if named in self.files:
            return named
        place = _place(named)
        return self._by_place.get(place, place if ".." in named.parts else named)

    @cached_property
    def _by_place(self) -> dict[Path, Path]:
        real = cache(os.path.realpath)
        return {Path(real(file.parent), file.name): file for file in self.files}


def _place(path: Path) -> Path:
    return Path(os.path.realpath(path.parent), path.name)


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error}") from error


def _lines_of_json(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(captions.decode(_content(path), shown(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{shown(path)}, line {number}: it is not JSON: {error}") from error


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows below the header; an empty cell is as good as none, and a weight is a number."""
    text = captions.decode(_content(path), shown(path))
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey=_REST)
    for row in rows:
        if _REST in row:
            raise UserError(
                f"{shown(path)}, line {rows.line_num}: it has more cells than the header; put a "
                "caption that has commas in double quotes"
            )
        record: dict[str, Any] = {key: cell for key, cell in row.items() if cell}
        with suppress(KeyError, ValueError):  # what is no number is refused with all bad weights
            record["weight"] = float(record["weight"])
        yield rows.line_num, record


READERS = {"metadata.jsonl": _lines_of_json, "metadata.csv": _rows_of_csv}
