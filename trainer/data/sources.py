"""Where pictures come from: a folder of files, or a file that holds many."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data import captions, tables, tars
from trainer.data.items import Item, is_picture, item, shown
from trainer.errors import UserError

log = logging.getLogger(__name__)

_HOLDERS = {".tar": tars.items, ".parquet": tables.items, ".arrow": tables.items}


def find(path: Path, extensions: list[str]) -> Iterator[Item]:
    """Everything in a folder, in the order of the paths, or in one file.

    Hidden files and folders (.name) are left alone.  Raises UserError for what cannot be read at
    all.
    """
    if not path.is_dir():
        yield from _expand(path, extensions)
        return
    files = sorted(_walk(path, ()))
    listed: dict[Path, dict[str, Any]] = {}
    for file in files:
        for picture, record in _metadata(file):
            if picture in listed:
                raise UserError(
                    f"{shown(file)}: {record['file_name']} is listed for the second time"
                )
            listed[picture] = record
    for file in sorted({*files, *listed}):
        if file in listed or is_picture(file.name):
            yield _picture(file, listed.get(file, {}), extensions)
        elif file.suffix.lower() in _HOLDERS and not file.name.startswith("cache-"):
            yield from _expand(file, extensions)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All files below, through links too, but not round in circles."""
    try:
        state = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    here = (state.st_dev, state.st_ino)
    if here in above:
        log.warning("data: passed over %s, a link to a folder above it", shown(folder))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, here))
        else:
            yield folder / entry.name


def _picture(path: Path, record: dict[str, Any], extensions: list[str]) -> Item:
    """A picture file, with what a metadata file says of it and what lies beside it."""
    usual = path.with_name(f"{path.stem}.mask.png")
    mask = path.parent / record["mask"] if record.get("mask") else usual
    has_mask = bool(record.get("mask")) or mask.is_file()
    beside = [file for e in extensions if (file := path.with_suffix(e)).is_file()]
    made = item(
        str(path),
        path.read_bytes,
        record,
        mask.read_bytes if has_mask else None,
        partial(_caption, beside[:1]),
    )
    if len(beside) > 1:
        made.notes.append(f"a {beside[1].suffix} beside their {beside[0].suffix}; it is not read")
    return made


def _caption(files: list[Path]) -> list[str]:
    return [captions.one_line(captions.decode(file.read_bytes(), shown(file))) for file in files]


def _metadata(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What a metadata.jsonl or metadata.csv says, by the files that it is about; any other file
    says nothing."""
    reader = _METADATA.get(path.name)
    for number, record in reader(path) if reader else ():
        where = f"{shown(path)}, line {number}"
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f'{where}: it has no "file_name"')
        if not isinstance(record.get("mask", ""), str | None):
            raise UserError(f'{where}: "mask" is not the name of a file')
        yield path.parent / record["file_name"], record


def _lines_of_json(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(captions.decode(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise UserError(f"{shown(path)}, line {number}: it is not JSON: {error}") from error


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows below the header; an empty cell is as good as none, and a weight is a number."""
    text = captions.decode(path.read_bytes(), path)
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


_METADATA = {"metadata.jsonl": _lines_of_json, "metadata.csv": _rows_of_csv}
_REST = "more cells than the header has"


def _expand(path: Path, extensions: list[str]) -> Iterator[Item]:
    """The pictures inside one file."""
    reader = _HOLDERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{shown(path)} is no folder and no file of pictures ({', '.join(_HOLDERS)})"
        )
    return reader(path, extensions)
