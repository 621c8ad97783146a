"""Sources of pictures: a folder of files, or one file that holds many."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer.config import DataConfig, SourceConfig
from trainer.data import folders, metadata, tables, tars
from trainer.data.items import IRREGULAR, Item, Reading, is_hidden, is_picture, shown
from trainer.errors import UserError

_MASKS = (
    "pictures are named as a mask by metadata, and not trained on (list them there to train on "
    "them)"
)
_HOLDERS = {".tar": tars.items, ".parquet": tables.items, ".arrow": tables.items}


def check(config: DataConfig) -> None:
    """Raise UserError for sources that are missing, or would teach nothing."""
    if config.path is None and not config.sources:
        raise UserError(
            "data.path has no value; set it on the command line: data.path=... "
            "(or several: 'data.sources=[{path: ...}, {path: ...}]')"
        )
    if config.path is not None and config.sources:
        raise UserError(
            "data.path and data.sources are both set; set data.path=null, or no sources"
        )
    if config.sources and all(source.weight == 0 for source in config.sources):
        raise UserError(
            "data.sources: every weight is 0, so nothing would be learned; give one a larger weight"
        )
    places = [("data.path", config.path)] if config.path is not None else []
    places += [(f"data.sources.{i}.path", s.path) for i, s in enumerate(config.sources)]
    for key, path in places:
        if not path.strip():
            raise UserError(f"{key} is empty; name a folder")
        if not Path(path).expanduser().exists():
            raise UserError(
                f"{key}={path} is not a folder (or .tar, .parquet or .arrow file); name one that "
                "holds pictures"
            )


def of_config(config: DataConfig) -> list[SourceConfig]:
    """The configuration's sources, each followed by the folders in it that are sources of their
    own."""
    given = config.sources or [SourceConfig(path=str(config.path))]
    if not config.kohya_folders:
        return given
    return [each for source in given for each in (source, *_kohya_folders(source))]


def _kohya_folders(source: SourceConfig) -> list[SourceConfig]:
    """The folders named REPEATS_CAPTION in a source."""
    return [
        replace(
            source,
            path=str(folder),
            repeats=repeats * source.repeats,
            caption=caption if source.caption is None else source.caption,
        )
        for folder, repeats, caption in folders.kohya_folders(Path(source.path).expanduser())
    ]


def find(path: Path, reading: Reading) -> Iterator[Item]:
    """All pictures in a folder, in path order, or in one file.

    Ignored and unreadable files are recorded in `reading`.
    """
    if not path.is_dir():
        with reading.going_on():
            yield from _expand(path, reading)
        return
    files = sorted(folders.walk(path, reading))
    listed = metadata.listed(files, reading)
    masks = folders.named_masks(listed)
    pictures = {*listed}
    for file in files:
        if is_picture(file.name) and not is_hidden(file.name) and file not in pictures:
            if os.path.normpath(file) in masks:
                reading.remarks[_MASKS].append(shown(file))
            else:
                pictures.add(file)
    beside = folders.Beside(files, pictures, reading)
    for file in sorted({*files, *pictures}):
        with reading.going_on():
            if file in pictures:
                yield folders.picture(file, listed.get(file, {}), beside, reading)
            elif _is_holder(file) and not _is_aside(file, reading):
                yield from _expand(file, reading)
    folders.name_unused(files, listed, beside, reading)


def _is_holder(file: Path) -> bool:
    return file.suffix.lower() in _HOLDERS and not is_hidden(file.name)


def _is_aside(file: Path, reading: Reading) -> bool:
    """Whether an archive or table in a folder is not training data."""
    _check_regular(file)
    if file.name.startswith("cache-"):
        reading.remarks["caches of data sets are ignored"].append(shown(file))
    elif file.suffix.lower() in (".parquet", ".arrow") and not tables.has_pictures(file):
        # img2dataset writes a table beside each shard, which only repeats the shard's metadata
        is_listing = file.with_suffix(".tar").is_file()
        messages = reading.remarks if is_listing else reading.problems
        messages["tables without a column of pictures are ignored"].append(shown(file))
    else:
        return False
    return True


def _expand(path: Path, reading: Reading) -> Iterator[Item]:
    """The pictures inside one file."""
    _check_regular(path)
    reader = _HOLDERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{shown(path)} is not a folder or a file of pictures ({', '.join(_HOLDERS)})"
        )
    return reader(path, reading)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise UserError(f"{shown(path)} {IRREGULAR}")
