"""Where pictures come from: a folder of files, or a file that holds many."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config import PICTURE_SUFFIXES
from trainer.data import captions
from trainer.errors import UserError

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"


@dataclass(kw_only=True)
class Item:
    """One picture, wherever it is; nothing of it has been read."""

    name: str  # as messages show it
    read: Callable[[], bytes]
    # [] where there is none.  Raises UserError for text that cannot be decoded.
    captions: Callable[[], list[str]]
    weight: float = 1.0
    read_mask: Callable[[], bytes] | None = None


def items(path: Path, extensions: list[str]) -> Iterator[Item]:
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
        if file.name == METADATA:
            listed |= _metadata(file)
    for file in sorted({*files, *listed}):
        if file in listed or is_picture(file.name):
            yield _picture(file, listed.get(file, {}), extensions)
        elif file.suffix.lower() in _holders() and not file.name.startswith("cache-"):
            yield from _expand(file, extensions)


def is_picture(name: str) -> bool:
    """By the ending; NAME.mask.png is a mask and no picture."""
    stem, suffix = os.path.splitext(name)
    return suffix.lower() in PICTURE_SUFFIXES and not stem.lower().endswith(".mask")


def item(
    name: str,
    read: Callable[[], bytes],
    record: dict[str, Any],
    read_mask: Callable[[], bytes] | None,
    otherwise: Callable[[], list[str]] = list,
) -> Item:
    """A picture whose `record` may hold its captions (`captions`, `text` or `caption`, a string or
    a list) and the weight of its loss; captions come from `otherwise` where it does not."""
    words = (record.get(key) for key in ("captions", "text", "caption"))
    given = next((word for word in words if word is not None), None)
    texts = [given] if isinstance(given, str) else given
    if texts is not None and not (
        isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    ):
        raise UserError(f"{name}: its caption is {given!r}, neither text nor a list of texts")
    weight = record.get("weight")
    weight = 1.0 if weight is None else weight
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise UserError(f"{name}: its weight is {weight!r}; it must be a number >= 0")
    lines = [captions.one_line(text) for text in texts or []]
    return Item(
        name=shown(name),
        read=read,
        captions=(lambda: lines) if texts is not None else otherwise,
        weight=weight,
        read_mask=read_mask,
    )


def shown(name: object) -> str:
    """A name on one line, whatever characters it has."""
    printable = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in printable)


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
    """A picture file, with what metadata.jsonl says of it and what lies beside it."""
    beside = path.with_name(f"{path.stem}.mask.png")
    mask = path.parent / record["mask"] if record.get("mask") else beside
    has_mask = "mask" in record or mask.is_file()
    texts = partial(_sidecar, path, extensions)
    return item(str(path), path.read_bytes, record, mask.read_bytes if has_mask else None, texts)


def _sidecar(path: Path, extensions: list[str]) -> list[str]:
    """The caption in the first of the text files beside a picture."""
    found = [file for e in extensions if (file := path.with_suffix(e)).is_file()]
    if len(found) > 1:
        form = "data: %s has %s too, which is not read"
        log.warning(form, shown(found[0]), ", ".join(file.suffix for file in found[1:]))
    return [
        captions.one_line(captions.decode(file.read_bytes(), shown(file))) for file in found[:1]
    ]


def _metadata(path: Path) -> dict[Path, dict[str, Any]]:
    """The records of a metadata.jsonl by the files that they are about."""
    records = {}
    for number, line in enumerate(captions.decode(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shown(path)}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: it is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise UserError(f'{where}: it has no "file_name"')
        if not isinstance(record.get("mask", ""), str | None):
            raise UserError(f'{where}: "mask" is not the name of a file')
        records[path.parent / record["file_name"]] = record
    return records


def _expand(path: Path, extensions: list[str]) -> Iterator[Item]:
    """The pictures inside one file."""
    reader = _holders().get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{shown(path)} is no folder and no file of pictures ({', '.join(_holders())})"
        )
    return reader(path, extensions)


def _holders() -> dict[str, Callable[[Path, list[str]], Iterator[Item]]]:
    from trainer.data import tables, tars  # they make Items

    return {".tar": tars.items, ".parquet": tables.items, ".arrow": tables.items}
