"""Digests and traits of pictures, remembered between runs in `data.cache`."""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from trainer.config import DataConfig
from trainer.data.buckets import Size
from trainer.data.items import Item
from trainer.errors import UserError
from trainer.system import disk
from trainer.system.retry import with_retries

Traits = tuple[Size, bool, list[str]]  # size; whether any of it is transparent; notes
Digests = tuple[str, str]  # as of a Sample: with the mask, and of the picture alone

_SETTLED = 3  # seconds after which writing a file again is sure to change its time


class PictureIndex:
    """Digests and traits of pictures, kept in the cache: a picture that was once decoded without
    error is not decoded again, and a file whose size and time are unchanged is not read again."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._path = Path(config.cache).expanduser() / "pictures.json" if config.cache else None
        self._traits: dict[str, Any] = {}  # by digests
        self._digests: dict[str, Any] = {}  # by stamps
        self._has_new_traits = self._has_new_stamps = False
        if self._path and self._path.is_file():
            try:
                saved = json.loads(self._path.read_text(encoding="utf-8"))
                self._traits, self._digests = dict(saved["pictures"]), dict(saved["files"])
            except (OSError, ValueError, TypeError, KeyError):
                self._traits = {}  # it only saves time

    def stamp(self, item: Item) -> str | None:
        """A key that changes whenever the picture does, from its files' sizes and times.

        None without a cache, and where such a key is unreliable: for a picture whose files are not
        known, and for one just written, as another write may get the same time stamp.
        """
        if not self._path:
            return None
        stats = [(os.path.abspath(file), with_retries(file.stat)) for file in item.files]
        if max((x.st_mtime for _, x in stats), default=math.inf) > time.time() - _SETTLED:
            return None
        files = [(file, x.st_size, x.st_mtime_ns, x.st_ctime_ns, x.st_ino) for file, x in stats]
        key = (item.path, self._config.mask == "file", files)
        return hashlib.sha256(repr(key).encode()).hexdigest()

    def digests(self, stamp: str | None) -> Digests | None:
        """The digests of the picture with this stamp, if known."""
        try:
            digest, of_picture = self._digests[stamp or ""]
            return str(digest), str(of_picture)
        except (KeyError, ValueError, TypeError):
            return None

    def traits(self, digests: Digests) -> Traits | None:
        """The traits of the picture with these digests, if known and within `max_pixels`."""
        try:
            height, width, is_transparent, notes = self._traits[digests[0]]
            fits = height * width <= self._config.max_pixels
            return ((height, width), is_transparent, notes) if fits else None
        except (KeyError, ValueError, TypeError):
            return None

    def add(self, stamp: str | None, digests: Digests, traits: Traits) -> None:
        size, is_transparent, notes = traits
        self._has_new_traits |= digests[0] not in self._traits
        self._traits[digests[0]] = [*size, is_transparent, notes]
        if stamp:
            self._digests[stamp] = digests
            self._has_new_stamps = True

    def save(self) -> None:
        """Write the cache's file.  Raises UserError if new traits cannot be saved."""
        if self._path and (self._has_new_traits or self._has_new_stamps):
            copies = {"pictures": {**self._traits}, "files": {**self._digests}}  # threads may add
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                disk.replace_text(self._path, json.dumps(copies))
            except OSError as error:
                if not self._has_new_traits:  # only stamps are lost; the cache may be read-only
                    return
                raise UserError(
                    f"data.cache={self._path.parent} cannot be written: {error}; name another "
                    "folder, or set data.cache=null"
                ) from error
