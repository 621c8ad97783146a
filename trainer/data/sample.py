"""A sample: one view of a picture, a crop or its mirror image, at one size, with its captions."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trainer.config import DataConfig
from trainer.data import decoding
from trainer.data.buckets import CENTRE, Fit, Size
from trainer.data.items import Item
from trainer.errors import UserError


@dataclass(kw_only=True)
class Sample:
    """One picture; its pixels are read on demand (`read_pixels`)."""

    item: Item
    source: str  # the name of the folder or file that it is from
    digest: str  # sha256 of the picture's bytes, and of its mask's if it has one
    picture_digest: str  # sha256 of the picture's bytes
    is_transparent: bool  # anywhere
    caption: str  # the first, unshuffled, with prefix and suffix: for eval points and samples
    captions: tuple[str, ...]  # a step draws one of these, all equally likely
    size: Size  # of the upright picture
    fit: Fit
    loss_weight: float
    prior: bool  # from a regularisation source
    held_out: bool  # never trained on
    mirrored: bool = False
    config: DataConfig

    def views(self) -> list["Sample"]:
        """What is trained on of it: `data.crops` crops, and with `data.random_flip` the mirror
        images of these first."""
        places = self.fit.places(self.config.crops)
        crops = [replace(self, fit=replace(self.fit, place=place)) for place in places]
        mirrored = [replace(crop, mirrored=True) for crop in crops]
        return [*mirrored, *crops] if self.config.random_flip else crops

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def is_central(self) -> bool:
        """Whether it is the central crop, not mirrored."""
        return self.fit.place == CENTRE and not self.mirrored

    @property
    def bucket(self) -> Size:
        """Height and width that it is trained at, in pixels."""
        return self.fit.bucket

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: original h, w; crop top, left; target h, w."""
        top, left = self.fit.crop
        if self.mirrored:
            left = self.fit.resized[1] - self.bucket[1] - left
        first, crop = {
            "original": (self.size, (top, left)),
            "resized": (self.fit.resized, (top, left)),
            "bucket": (self.bucket, (0, 0)),
        }[self.config.time_ids]
        return (*first, *crop, *self.bucket)

    @property
    def transform(self) -> str:
        """Everything besides the file that may affect the pixels or the mask."""
        return self._transform(self.config.background, self.config.mask)

    @property
    def pixels_key(self) -> tuple[str, str]:
        """Everything the pixels depend on: not the mask, nor an opaque picture's background."""
        background = self.config.background if self.is_transparent else "white"
        return self.picture_digest, self._transform(background, "none")

    @property
    def mask_key(self) -> tuple[str, ...]:
        """Everything the mask depends on, except its size; () if nothing is masked."""
        return (self.digest, self.transform) if self._has_mask else ()

    @property
    def _has_mask(self) -> bool:
        """Whether the loss may exclude parts of the picture."""
        is_of_file = self.config.mask == "file" and self.item.read_mask is not None
        return is_of_file or (self.config.mask == "alpha" and self.is_transparent)

    def _transform(self, background: str, mask: str) -> str:
        place = "centre" if self.fit.place == CENTRE else f"place {self.fit.place}"
        how = f"{place}, lanczos, mirrored" if self.mirrored else f"{place}, lanczos"
        return repr((self.bucket, self.size, background, mask, how))

    def read_pixels(self) -> Tensor:
        """The picture as the VAE's input: -> fp32 (3, h, w) in [-1, 1]."""
        return self._turned(decoding.pixels(self._decoded(self._read()).rgb, self.fit))

    def read_mask(self) -> Tensor:
        """The loss weight of each pixel: -> fp32 (1, h, w) in [0, 1]."""
        if not self._has_mask:
            return torch.ones(1, *self.bucket)
        content = self._read()
        if content.mask is not None:
            grey = decoding.decode_mask(content.mask, self.size, self.config.max_pixels)
            return self._turned(decoding.mask(grey, self.fit))
        alpha = self._decoded(content).alpha
        assert alpha is not None  # `_has_mask` implies is_transparent
        return self._turned(decoding.mask(alpha, self.fit))

    def _turned(self, planes: Tensor) -> Tensor:
        """(..., h, w), flipped horizontally if the sample is a mirror image."""
        return planes.flip(-1) if self.mirrored else planes

    def _decoded(self, content: "Content") -> decoding.Picture:
        return decoding.decode(content.picture, self.config.max_pixels, self.config.background)

    def _read(self) -> "Content":
        content = read(self.item, self.config)
        if content.digest != self.digest:
            raise UserError(f"{self.name} has changed since this run began; restart the run")
        return content


@dataclass(kw_only=True)
class Content:
    """A picture's bytes as stored."""

    picture: bytes
    mask: bytes | None  # with data.mask=file, if it has one

    @cached_property
    def picture_digest(self) -> str:
        """sha256 of the picture's bytes."""
        return hashlib.sha256(self.picture).hexdigest()

    @cached_property
    def digest(self) -> str:
        """sha256 of the picture's bytes, and of its mask's if it has one."""
        if not self.mask:
            return self.picture_digest
        return hashlib.sha256(bytes.fromhex(self.picture_digest) + self.mask).hexdigest()


def read(item: Item, config: DataConfig) -> Content:
    read_mask = item.read_mask if config.mask == "file" else None
    return Content(picture=item.read(), mask=read_mask() if read_mask else None)
