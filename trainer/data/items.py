"""One picture, from a file, an archive or a row of a table."""

import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data import captions
from trainer.errors import UserError
from trainer.system.retry import with_retries

CAPTION_COLUMNS = ("captions", "text", "caption")
IRREGULAR = "is not a regular file (a pipe, a socket or a device)"
PLACE = "the line of metadata"  # in a record: metadata.jsonl, line 3
# Pillow formats that are not a raster picture: drawings, films, tables of measurements.
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def _picture_suffixes() -> set[str]:
    """Suffixes of the formats that this Pillow opens, and of some that not every Pillow does, so
    that such pictures are reported instead of silently ignored."""
    Image.preinit()  # so that Pillow still tries common formats first
    known = Image.registered_extensions().items()
    opened = {end for end, kind in known if kind in Image.OPEN and kind not in _NO_PICTURES}
    return opened | {".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff", ".webp"}


PICTURE_SUFFIXES = _picture_suffixes()


@dataclass(kw_only=True)
class Item:
    """One picture, not read yet."""

    # Shown in messages; unique: the file's path, FILE:MEMBER in an archive, FILE:ROW in a table.
    name: str
    path: str  # the same, unescaped
    read: Callable[[], bytes]
    # [] if there is none.  Raises UserError for text that cannot be decoded.
    captions: Callable[[], list[str]]
    # The files that hold the picture and its mask: while they are unchanged, so is the picture.
    # () if they are not known.
    files: tuple[Path, ...]
    weight: float = 1.0
    place: str | None = None  # the line of metadata that names it, if any
    read_mask: Callable[[], bytes] | None = None
    notes: list[str] = field(default_factory=list)  # what is ignored or odd about it


@dataclass(kw_only=True)
class Reading:
    """Options for reading sources, and findings: {message: file names}."""

    extensions: list[str]  # of caption files; the first one found is used
    caption_column: str | None = None  # in tables and metadata; None: any of CAPTION_COLUMNS
    apart: Collection[str] = ()  # absolute paths of sources, which no other source reads
    has_column: bool = False  # whether a record of the current source has `caption_column`
    broken: list[str] = field(default_factory=list)  # messages: what cannot be read at all
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # harmless

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns that may hold captions; the first one present is used."""
        return (self.caption_column,) if self.caption_column is not None else CAPTION_COLUMNS

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Add a UserError raised in the block to `broken` and continue after it."""
        try:
            yield
        except UserError as error:
            self.broken.append(str(error))


def is_picture(name: str) -> bool:
    """By extension; NAME.mask.png is a mask, not a picture."""
    return _has_suffix(name) and not is_mask(name) and not name.startswith("._")


def is_mask(name: str) -> bool:
    return _has_suffix(name) and os.path.splitext(name)[0].lower().endswith(".mask")


def is_hidden(name: str) -> bool:
    """By the leading dot.  ._NAME, which macOS writes beside NAME, is hidden and not a picture."""
    return name.startswith(".")


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def item(
    name: str,
    read: Callable[[], bytes],
    record: dict[str, Any],
    read_mask: Callable[[], bytes] | None,
    reading: Reading,
    otherwise: Callable[[], list[str]] = list,
    *,
    files: tuple[Path, ...],
) -> Item:
    """A picture with the captions (a string or a list, in one of the caption columns) and the loss
    weight from `record`.  Without captions there, they come from `otherwise`."""
    reading.has_column |= reading.caption_column in record
    cells = (record.get(column) for column in reading.caption_columns)
    caption = next((cell for cell in cells if cell is not None), None)
    texts = [caption] if isinstance(caption, str) else caption
    if texts is not None and not (
        isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    ):
        raise UserError(f"{name}: its caption is {caption!r}, neither text nor a list of texts")
    weight = record.get("weight")
    weight = 1.0 if weight is None else weight
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < math.inf:
        raise UserError(f"{name}: its weight is {weight!r}; it must be a number >= 0")
    lines = [captions.one_line(text) for text in texts or []]
    is_overruled = texts is not None and _disagrees(otherwise, lines)
    return Item(
        name=shown(name),
        path=name,
        read=read,
        files=files,
        captions=(lambda: lines) if texts is not None else otherwise,
        weight=weight,
        place=record.get(PLACE),
        read_mask=read_mask,
        notes=["a text file that contradicts their metadata; it is ignored"]
        if is_overruled
        else [],
    )


def note_texts(picture: Item, endings: list[str], is_shared: bool) -> None:
    """Note what is odd about a picture's text files, of which the first is its caption.

    `is_shared`: another picture has the same text files.
    """
    if len(endings) > 1:
        picture.notes.append(f"a {endings[1]} next to their {endings[0]}; it is ignored")
    if endings and is_shared:
        picture.notes.append(f"a {endings[0]} that is another picture's too, of the same name")


def _disagrees(read: Callable[[], list[str]], lines: list[str]) -> bool:
    """Whether `read` gives a caption that is not among these lines."""
    try:
        return not {*read()} <= {*lines}
    except (UserError, OSError):  # harmless: the text is not used
        return True


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.  Raises OSError for anything else: a pipe may never end."""

    def read() -> bytes:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{shown(path)} {'is a folder' if stat.S_ISDIR(mode) else IRREGULAR}")
        return path.read_bytes()

    return with_retries(read)


def shown(name: object) -> str:
    """A name for messages, with unprintable characters escaped."""
    printable = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in printable)
