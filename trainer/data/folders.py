"""A folder of pictures: its files, the text files and masks of each picture, and ignored files.

No picture is dropped silently: unused files that look like pictures, or like files that belong to
one, are listed in `Reading.problems`, by kind.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer.data import captions, metadata
from trainer.data.items import (
    Item,
    Reading,
    is_hidden,
    is_mask,
    is_picture,
    item,
    note_texts,
    read_file,
    shown,
)
from trainer.errors import UserError

# Files that may hold pictures, or be one, but are not read.
_ARCHIVES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    *(".zip", ".7z", ".rar"),
)
_OTHER_PICTURES = (
    *(".svg", ".svgz", ".pdf", ".ps", ".eps", ".ai", ".wmf", ".emf", ".mpo", ".exr", ".hdr"),
    *(".fits", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".xcf", ".kra"),
)
_ABOUT_ALL = {"readme", "license", "licence", "copying", "notice"}  # not captions
_RUNS = "folders of runs are ignored (to read one, make it data.path)"
_COUNTED = re.compile(r"(\d+)_(.+)")  # 10_cat: ten repeats
_REPEATS = (
    "folders are named in kohya's style (REPEATS_CAPTION), which is only read with "
    "data.kohya_folders=true"
)
_TABLES = (".csv", ".tsv", ".jsonl")
_OTHER_TABLES = "tables are ignored (only metadata.csv and metadata.jsonl are read)"
_HIDDEN = "paths are hidden (by a name that starts with a dot) and ignored"


def walk(folder: Path, reading: Reading) -> Iterator[Path]:
    """All files below, following links (but no link cycles), without those in hidden folders."""
    return _walk(folder, (), reading)


def kohya_folders(folder: Path) -> list[tuple[Path, int, str]]:
    """The folders named REPEATS_CAPTION in a folder: their paths, repeats and captions."""
    if not folder.is_dir():  # an archive, or a file of a table
        return []
    matches = [(path, _COUNTED.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    found = [(path, int(match[1]), match[2]) for path, match in matches if match and path.is_dir()]
    if wrong := [path for path, repeats, _ in found if not repeats]:
        raise UserError(f"data.kohya_folders: {shown(wrong[0])} has 0 repeats; rename or move it")
    return found


def _walk(folder: Path, above: tuple[tuple[int, int], ...], reading: Reading) -> Iterator[Path]:
    try:
        state = folder.stat()
        entries = [(entry.name, _is_folder(entry)) for entry in os.scandir(folder)]
    except OSError as error:
        reading.broken.append(
            f"{shown(folder)} cannot be read: {error.strerror}; make it readable, or move it "
            "elsewhere"
        )
        return
    here = (state.st_dev, state.st_ino)
    if here in above:
        reading.remarks["links to a parent folder are ignored"].append(shown(folder))
        return
    if above and _is_run({name for name, _ in entries}):
        reading.remarks[_RUNS].append(shown(folder))
        return
    for name, is_folder in entries:
        if not is_folder:
            yield folder / name
        elif os.path.abspath(folder / name) in reading.apart:
            continue
        elif not is_hidden(name):
            if (match := _COUNTED.fullmatch(name)) and int(match[1]) != 1:  # 1 changes nothing
                reading.remarks[_REPEATS].append(shown(folder / name))
            yield from _walk(folder / name, (*above, here), reading)
        elif _has_pictures(folder / name):
            reading.problems[_HIDDEN].append(shown(folder / name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; if it is named like a picture, reading it fails later
        return False


def _has_pictures(folder: Path) -> bool:
    return any(is_picture(name) for _, _, names in os.walk(folder) for name in names)


def _is_run(names: Collection[str]) -> bool:
    """Whether a folder with these names is the output of a run of this trainer or of Hydra.  Its
    pictures are results; a run inside data.path must not train on those of the previous run."""
    signs = ({"environment.json", "config.yaml"}, {"metrics.jsonl", "checkpoints"}, {".hydra"})
    return any(sign <= set(names) for sign in signs)


class Beside:
    """Text files and masks, by the path of the picture beside them without its extension."""

    def __init__(self, files: Collection[Path], pictures: Collection[Path], reading: Reading):
        self.pictures = Counter(_stem(picture) for picture in pictures)
        self.texts: dict[str, list[Path]] = defaultdict(list)
        self.masks: dict[str, Path] = {}
        elsewhere = {picture.parent for picture in {*pictures} - {*files}}  # named in metadata
        files = [*files, *(file for folder in sorted(elsewhere) for file in _files(folder))]
        files = [file for file in files if file not in pictures]
        given = reading.extensions
        suffixes = list(dict.fromkeys(extension.lower() for extension in given))
        for file in files:
            kind = file.suffix.lower()
            if kind in suffixes and file.name not in metadata.READERS:
                self.texts[_stem(file)].append(file)
            elif is_mask(file.name) and kind == ".png":
                self.masks[_stem(file)[: -len(".mask")]] = file
        for texts in self.texts.values():  # the first is used: .txt before .TXT before .caption
            texts.sort(key=lambda f: (suffixes.index(f.suffix.lower()), f.suffix not in given))


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):  # the picture itself will be reported as unreadable
        return sorted(folder.iterdir())
    return []


def _stem(path: Path) -> str:
    """The path without extension, in NFC: archives made on a Mac use another Unicode form."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def picture(path: Path, record: dict[str, Any], beside: Beside, reading: Reading) -> Item:
    """A picture file with its metadata record and the text file and mask beside it."""
    stem = _stem(path)
    mask = Path(record["mask"]) if record.get("mask") else beside.masks.get(stem)
    texts = [file for file in beside.texts.get(stem, ()) if file.is_file()]
    picture_item = item(
        str(path),
        partial(read_file, path),
        record,
        partial(read_file, mask) if mask else None,
        reading,
        partial(_caption, texts[:1]),
        files=(path, mask) if mask else (path,),
    )
    note_texts(picture_item, [file.suffix for file in texts], beside.pictures[stem] > 1)
    return picture_item


def _caption(files: list[Path]) -> list[str]:
    return [captions.one_line(captions.decode(read_file(file), shown(file))) for file in files]


def named_masks(listed: Mapping[Path, dict[str, Any]]) -> set[str]:
    """The files that metadata names as masks."""
    return {os.path.normpath(record["mask"]) for record in listed.values() if record.get("mask")}


def name_unused(
    files: Iterable[Path], listed: Mapping[Path, dict[str, Any]], beside: Beside, reading: Reading
) -> None:
    """Add unused files that look like pictures, or belong to one, to `reading.problems`."""
    masks = named_masks(listed)
    masks |= {str(mask) for stem, mask in beside.masks.items() if stem in beside.pictures}
    texts = {
        text
        for stem, text_files in beside.texts.items()
        for text in text_files
        if stem not in beside.pictures
    }
    for file in files:
        if file.suffix.lower() in _TABLES and file.name not in metadata.READERS:
            reading.remarks[_OTHER_TABLES].append(shown(file))
        elif file not in listed and (kind := _unused(file, masks, texts)):
            reading.problems[kind].append(shown(file))


def _unused(file: Path, masks: Collection[str], texts: Collection[Path]) -> str | None:
    """The message for a file that may be meant to be used but is not; None for others."""
    name = file.name.lower()
    if is_hidden(name):
        return _HIDDEN if is_picture(name) else None
    if file in texts:
        return None if file.stem.lower() in _ABOUT_ALL else "captions have no picture"
    if is_mask(name) and os.path.normpath(file) not in masks:
        return (
            "masks without a picture (NAME.mask.png belongs to NAME; rename it if it is a picture)"
        )
    if name.endswith(_ARCHIVES):
        return "archives are ignored (only uncompressed .tar files are read; unpack the others)"
    if name.endswith(_OTHER_PICTURES):
        return "pictures in unsupported formats are ignored (convert them)"
    return None
