"""Webdataset shards: .tar files in which the members of one sample share a stem.

The stem is a member's path up to the first dot of its name: a/0001.jpg, a/0001.txt, a/0001.json
and a/0001.mask.png are one sample.  A shard is indexed once and its members are read by offset.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from trainer.data import captions
from trainer.data.items import Item, Reading, is_hidden, is_picture, item, note_texts, shown
from trainer.errors import UserError
from trainer.system.retry import with_retries

Place = tuple[int, int]  # offset and length, in bytes


def items(path: Path, reading: Reading) -> Iterator[Item]:
    """The pictures of a shard, in order, with captions from text or .json members.

    Raises UserError for a damaged or compressed archive.
    """
    samples: dict[str, dict[str, Place]] = {}
    for name, place in _members(path, reading):
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        members = samples.setdefault(f"{folder}/{stem}", {})
        if f".{ending.lower()}" in members:
            reading.problems[_TWICE].append(shown(f"{path}:{name}"))
        members[f".{ending.lower()}"] = place
    for stem, members in samples.items():
        pictures = [ending for ending in members if is_picture(f"x{ending}")]
        for ending in pictures:
            with reading.going_on():
                yield _item(path, f"{stem.lstrip('/')}{ending}", members, ending, reading)
        if not pictures:
            where = shown(f"{path}:{stem.lstrip('/')}")
            reading.problems["samples in archives have no picture"].append(where)


def _members(path: Path, reading: Reading) -> Iterator[tuple[str, Place]]:
    """Name and place of every regular file that is not hidden."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                unused = _HIDDEN if is_hidden(name) else None if member.isfile() else _LINK
                if not unused:
                    yield member.name, (member.offset_data, member.size)
                elif is_picture(name) and not member.isdir():
                    reading.problems[unused].append(shown(f"{path}:{member.name}"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{shown(path)} cannot be read as an uncompressed tar archive: {error}; recreate it, "
            "or remove it from the data (data.max_unreadable only covers pictures)"
        ) from error


_HIDDEN = "pictures in archives are hidden (by a name that starts with a dot) and ignored"
_LINK = "links to pictures in archives are ignored (pack with tar --hard-dereference -h)"
_TWICE = "members of archives have replaced an earlier one of the same name"


def _item(path: Path, name: str, members: dict[str, Place], ending: str, reading: Reading) -> Item:
    where = f"{path}:{name}"
    own_members = _own(members, ending)
    record = {}
    if ".json" in own_members:
        try:
            record = json.loads(_read(path, own_members[".json"]))
        except ValueError as error:
            raise UserError(f"{shown(where)}: its .json is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{shown(where)}: its .json is not a JSON object")
        record.pop("mask", None)
    suffixes = dict.fromkeys(extension.lower() for extension in reading.extensions)
    endings = [suffix for suffix in suffixes if suffix in own_members]
    text = own_members[endings[0]] if endings else None
    mask = own_members.get(".mask.png")
    picture = item(
        where,
        partial(_read, path, members[ending]),
        record,
        partial(_read, path, mask) if mask else None,
        reading,
        partial(_caption, path, text, where),
        files=(path,),
    )
    note_texts(picture, endings, sum(is_picture(f"x{e}") for e in members) > 1)
    return picture


def _own(members: dict[str, Place], ending: str) -> dict[str, Place]:
    """The members of a picture's sample, by extension: photo.v2.txt is the .txt of photo.v2.png."""
    dots = os.path.splitext(f"x{ending}")[0][1:]
    named = {end.removeprefix(dots): at for end, at in members.items() if end.startswith(dots)}
    return members | named


def _caption(path: Path, place: Place | None, where: str) -> list[str]:
    if place is None:
        return []
    return [captions.one_line(captions.decode(_read(path, place), shown(where)))]


def _read(path: Path, place: Place) -> bytes:
    offset, length = place

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    content = with_retries(read)
    if len(content) < length:
        raise OSError(f"the archive ends after {len(content)} of its {length} bytes")
    return content
