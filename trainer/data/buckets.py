"""Aspect buckets: a batch holds pictures of similar aspect ratio, resized to about equal area."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from trainer.config import DataConfig
from trainer.errors import UserError

Size = tuple[int, int]  # height, width, in pixels
LATENT_SCALE = 8  # of the VAEs: pixels to a cell of the latent
CENTRE = 0.5  # place of a crop, from 0, the top or left edge, to 1, the bottom or right one


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a picture is fitted to its bucket: resized to cover it, then cropped."""

    bucket: Size
    resized: Size
    undersized: bool  # the picture is smaller than a bucket of its shape
    place: float = CENTRE  # of the crop

    @property
    def crop(self) -> tuple[int, int]:
        """Its top and left, in pixels of the resized picture."""
        top, left = (int(excess * self.place) for excess in self._excess)
        return top, left

    @property
    def _excess(self) -> Size:
        """Rows and columns that the crop cuts off."""
        (height, width), (rows, cols) = self.resized, self.bucket
        return height - rows, width - cols

    def places(self, count: int) -> list[float]:
        """Up to `count` places from one edge to the other, at least a cell of the latent apart; of
        a single one, the centre."""
        count = min(count, max(self._excess) // LATENT_SCALE + 1)
        return [i / (count - 1) for i in range(count)] if count > 1 else [CENTRE]

    @property
    def lost(self) -> float:
        """The share of the picture's area that the crop cuts off."""
        return 1 - math.prod(self.bucket) / math.prod(self.resized)


@lru_cache(maxsize=64)
def sizes(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """All buckets: sides are multiples of `step`, aspects within [1 / max_aspect, max_aspect], and
    areas as close to resolution^2 as that allows, never above (the square needs most memory)."""
    area = resolution * resolution
    buckets = set()
    for side in range(step, int(resolution * math.sqrt(max_aspect)) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            buckets |= {(side, other), (other, side)}
    return tuple(sorted(buckets))


def check(config: DataConfig) -> None:
    """Raise UserError for sizes that the VAE or the buckets do not allow."""
    scale = LATENT_SCALE
    if config.bucket_step % scale:
        raise UserError(f"data.bucket_step={config.bucket_step} is not a multiple of {scale}")
    sides = [(f"data.resolution={config.resolution}", config.resolution)]
    sides += [(f"data.resolutions={config.resolutions}: {s}", s) for s in config.resolutions]
    for option, side in sides:
        if side % scale:
            multiple = side // scale * scale
            raise UserError(f"{option} is not a multiple of {scale}; {multiple} is")
        if config.buckets and side < config.bucket_step:
            raise UserError(
                f"{option} is less than data.bucket_step={config.bucket_step}; "
                "choose a smaller step, or data.buckets=false"
            )
        if config.buckets and not sizes(side, config.bucket_step, config.max_aspect):
            raise UserError(
                f"{option} has no bucket with data.bucket_step={config.bucket_step} and "
                f"data.max_aspect={config.max_aspect:g}; choose a smaller step, or a larger aspect"
            )


def fit(size: Size, resolution: int, config: DataConfig) -> Fit:
    """Fit a picture of this size to the bucket whose log aspect ratio is nearest.

    Raises ValueError for a picture that is smaller than one step and may not be enlarged.
    """
    if not config.buckets:
        return covering(size, (resolution, resolution))
    aspect = math.log(size[1] / size[0])
    candidates = sizes(resolution, config.bucket_step, config.max_aspect)
    nearest = min(candidates, key=lambda b: (abs(math.log(b[1] / b[0]) - aspect), b))
    fitted = covering(size, nearest)
    if config.upscale or not fitted.undersized:
        return fitted
    return replace(covering(size, _largest_covered(size, resolution, config)), undersized=True)


def covering(size: Size, bucket: Size) -> Fit:
    """Resized so that the picture just covers the bucket, with its central crop."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height, width = (max(b, round(s * scale)) for b, s in zip(bucket, size, strict=True))
    return Fit(bucket=bucket, resized=(height, width), undersized=scale > 1)


def _largest_covered(size: Size, resolution: int, config: DataConfig) -> Size:
    """The largest bucket that this picture covers without being enlarged."""
    step, longest = config.bucket_step, config.max_aspect
    short, long = (side // step * step for side in sorted(size))
    if not short:
        raise ValueError(
            f"it is {size[1]} x {size[0]} pixels, smaller than a step of the buckets "
            f"(data.bucket_step={step}); data.upscale=true would enlarge it"
        )
    limit = min(short * longest, resolution * resolution / short)
    long = min(long, int(limit) // step * step)
    return (long, short) if size[0] > size[1] else (short, long)
