"""metadata.jsonl and metadata.csv: captions, masks and weights for the pictures of a folder."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from trainer.data import captions
from trainer.data.items import PLACE, Reading, read_file, shown
from trainer.errors import UserError

_REST = "more cells than the header has"
_SEPARATORS = ";\t|"  # of a table that is not separated by commas


def listed(files: Collection[Path], reading: Reading) -> dict[Path, dict[str, Any]]:
    """The records of the metadata files among `files`, by picture.

    Unusable lines, a second line for the same picture, and files without the requested caption
    column are added to `reading.broken`.
    """
    records: dict[Path, dict[str, Any]] = {}
    walked, column = _Walked(files), reading.caption_column
    for file in files:
        columns: dict[str, None] = {}  # an ordered set
        for where, record in _records(file, reading):
            picture = walked.path(file.parent / record["file_name"])
            if picture in records:
                twice = f"{where}: {record['file_name']} is listed twice"
                reading.broken.append(f"{twice}; keep one of them")
            if record.get("mask"):
                record["mask"] = str(walked.path(picture.parent / record["mask"]))
            columns |= dict.fromkeys(record)
            records.setdefault(picture, record | {PLACE: where})
        if column is not None and columns and column not in columns:
            reading.broken.append(
                f"{shown(file)} has no data.caption_column={column}; it has "
                f"{shown(', '.join(columns))}"
            )
    return records


def _records(path: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a metadata file: its place, for messages, and its record.  Nothing for other
    files."""
    if path.name not in READERS:
        return
    with reading.going_on():
        for number, line in READERS[path.name](path):
            where = f"{shown(path)}, line {number}"
            with reading.going_on():
                yield where, _record(line, where)


def _record(line: Any, where: str) -> dict[str, Any]:
    """A line's record.  Raises UserError if it is unusable."""
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where}: it is not JSON: {error}; correct it, or leave it out"
            ) from error
    if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
        raise UserError(f'{where}: it has no "file_name"; name a picture, or leave it out')
    if _REST in line:
        raise UserError(
            f"{where}: it has more cells than the header; put a caption that has commas in double "
            "quotes"
        )
    if not isinstance(line.get("mask", ""), str | None):
        raise UserError(f'{where}: "mask" is not the name of a file; name one, or leave it out')
    return line


class _Walked:
    """Looks up a folder's files by any path to them (../b.png, /abs/b.png) and in any Unicode form,
    so that a listed picture is recognised as the file that was found."""

    def __init__(self, files: Collection[Path]):
        self.files = {*files}

    def path(self, named: Path) -> Path:
        """The path as the walk found it; for a file it did not find, the given one without ".."."""
        if named in self.files:
            return named
        real_path = _real_path(named)
        return self._by_real_path.get(
            _normal(real_path), real_path if ".." in named.parts else named
        )

    @cached_property
    def _by_real_path(self) -> dict[str, Path]:
        real = cache(os.path.realpath)
        return {_normal(Path(real(file.parent), file.name)): file for file in self.files}


def _real_path(path: Path) -> Path:
    return Path(os.path.realpath(path.parent), path.name)


def _normal(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error}") from error


def _lines_of_json(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(captions.decode(_content(path), shown(path)).split("\n"), 1):
        if line.strip():
            yield number, line


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows below the header, without empty cells; the weight becomes a number."""
    text = captions.decode(_content(path), shown(path))
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey=_REST, strict=True)
    try:
        header = list(rows.fieldnames or [])
        if len(header) == 1 and (other := next((x for x in _SEPARATORS if x in header[0]), None)):
            raise UserError(
                f"{shown(path)}: its columns are separated by {other!r}; separate them by commas"
            )
        for row in rows:
            record: dict[str, Any] = {key: cell for key, cell in row.items() if cell}
            with suppress(KeyError, ValueError):  # `item` rejects a weight that is no number
                record["weight"] = float(record["weight"])
            yield rows.line_num, record
    except csv.Error as error:
        where = f"{shown(path)}, from line {rows.line_num + 1} on"
        raise UserError(f"{where}: {error}; is a quote unclosed?") from error


# Each gives (line number, line); lines are JSON text or already a record.
READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    "metadata.jsonl": _lines_of_json,
    "metadata.csv": _rows_of_csv,
}
