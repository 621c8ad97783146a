"""A sample: one picture at one size, with all that may be said of it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor

from trainer.config import DataConfig
from trainer.data import pictures
from trainer.data.buckets import Fit, Size
from trainer.data.items import Item
from trainer.errors import UserError


@dataclass(kw_only=True)
class Sample:
    """One picture; its pixels are read when they are needed (`read_pixels`)."""

    item: Item
    digest: str  # sha256 of the picture's bytes, and of its mask's where it has one
    caption: str  # as it is written, with prefix and suffix: for eval points and samples
    captions: tuple[str, ...]  # that a step draws from, all equally likely
    size: Size  # of the file, upright
    fit: Fit
    time_ids: tuple[int, int, int, int, int, int]  # original h, w; crop top, left; target h, w
    loss_weight: float
    prior: bool  # of a source for regularisation
    held_out: bool  # never trained on
    config: DataConfig

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def bucket(self) -> Size:
        """Height and width that are trained on, in pixels."""
        return self.fit.bucket

    @property
    def transform(self) -> str:
        """All that decides the pixels (and the mask) but the bytes: a part of the cache's key."""
        config = self.config
        return repr((self.bucket, self.size, config.background, config.mask, "centre, lanczos"))

    def read_pixels(self) -> Tensor:
        """The picture as the VAE takes it: -> fp32 (3, h, w) in [-1, 1]."""
        return self.read()[0]

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Pixels, and where the loss is masked, the mask: fp32 (1, h, w) in [0, 1]."""
        config = self.config
        content = read(self.item, config)
        if content.digest != self.digest:
            raise UserError(f"{self.name} has changed since this run began; start it again")
        picture = pictures.decode(content.picture, config.max_pixels, config.background)
        pixels = pictures.pixels(picture.rgb, self.bucket)
        if config.mask == "none":
            return pixels, None
        grey = picture.alpha if config.mask == "alpha" else None
        if content.mask is not None:
            grey = pictures.decode_mask(content.mask, picture.size, config.max_pixels)
        return pixels, pictures.mask(grey or Image.new("L", picture.rgb.size, 255), self.bucket)


@dataclass(kw_only=True)
class Content:
    """What is on the disk of a picture."""

    picture: bytes
    mask: bytes | None  # where masks are wanted and it has one

    @cached_property
    def digest(self) -> str:
        """sha256 of the picture's bytes, and of its mask's where it has one."""
        own = hashlib.sha256(self.picture)
        return (hashlib.sha256(own.digest() + self.mask) if self.mask else own).hexdigest()


def read(item: Item, config: DataConfig) -> Content:
    read_mask = item.read_mask if config.mask == "file" else None
    return Content(picture=item.read(), mask=read_mask() if read_mask else None)
