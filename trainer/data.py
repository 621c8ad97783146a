"""Pictures and captions from a folder, and which of them make up the batch of a step.

Which samples a step sees depends on (seed, step) alone: an epoch is a permutation drawn from a
counter, and step k takes the next `batch_size` places of the endless row of epochs.  So a resumed
run needs no sampler state, and runs that differ in the optimizer see the same batches.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from optim import rng
from trainer.config import DataConfig
from trainer.errors import UserError

log = logging.getLogger(__name__)

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_EPOCH = 1  # counter stream of the permutations


@dataclass(kw_only=True)
class Sample:
    """One picture: `pixels` fp32 (3, H, W) in [-1, 1]; `time_ids` as SDXL orders them."""

    path: Path
    caption: str
    pixels: Tensor
    time_ids: tuple[int, int, int, int, int, int]  # original h, w; crop top, left; target h, w


def load_folder(config: DataConfig) -> list[Sample]:
    """Read every picture below `config.path` with its caption, in the order of their paths.

    Raises UserError when there are none, or more than `max_unreadable` cannot be read, or a caption
    is missing and that is an error.  Whatever is skipped is named and counted.
    """
    folder = Path(config.path).expanduser()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"data.path={folder} has no pictures ({', '.join(sorted(_SUFFIXES))})")

    uncaptioned = [p for p in paths if not p.with_suffix(config.caption_extension).is_file()]
    _report_uncaptioned(uncaptioned, config)
    if config.on_missing_caption == "skip":
        paths = [p for p in paths if p not in set(uncaptioned)]

    samples, unreadable = [], []
    for path in paths:
        try:
            samples.append(_load(path, config))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("skipped unreadable picture %s: %s", path, error)
            unreadable.append(path)
            if len(unreadable) > config.max_unreadable:
                raise UserError(
                    f"{len(unreadable)} unreadable pictures, the last {path} ({error}); "
                    f"remove them, or allow more with data.max_unreadable={len(unreadable)}"
                ) from error
    if not samples:
        raise UserError(
            f"data.path={folder}: of {len(paths)} pictures none can be used; see the warnings above"
        )
    log.info(
        "data: %d pictures in %s, %d unreadable, %d without a caption",
        len(samples),
        folder,
        len(unreadable),
        len(uncaptioned),
    )
    return samples


def batch_indices(seed: int, step: int, batch_size: int, num_samples: int) -> list[int]:
    """Which samples step `step` (from 0) trains on."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [
        _permutation(seed, place // num_samples, num_samples)[place % num_samples]
        for place in places
    ]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=rng.generator(seed, _EPOCH, epoch)).tolist()


def _load(path: Path, config: DataConfig) -> Sample:
    with Image.open(path) as image:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
    resized, crop = _resize_and_crop(rgb, config.resolution)
    original = rgb.size if config.time_ids == "original" else resized
    pixels = (
        torch.from_numpy(np.asarray(crop.image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5
        - 1
    )
    side = config.resolution
    time_ids = (original[1], original[0], crop.top, crop.left, side, side)
    return Sample(path=path, caption=_caption(path, config), pixels=pixels, time_ids=time_ids)


@dataclass
class _Crop:
    image: Image.Image
    top: int
    left: int


def _resize_and_crop(image: Image.Image, side: int) -> tuple[tuple[int, int], _Crop]:
    """Short side to `side`, then the central square: -> ((width, height) before the crop, crop)."""
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return size, _Crop(resized.crop((left, top, left + side, top + side)), top, left)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; transparent pixels show white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _caption(path: Path, config: DataConfig) -> str:
    caption = path.with_suffix(config.caption_extension)
    if not caption.is_file():
        return ""
    try:
        return " ".join(caption.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(
            f"caption {caption} is not UTF-8 ({error.reason} at byte {error.start}); "
            "save it as UTF-8"
        ) from error


def _report_uncaptioned(paths: list[Path], config: DataConfig) -> None:
    if not paths:
        return
    names = ", ".join(p.name for p in paths[:5]) + (", ..." if len(paths) > 5 else "")
    message = f"{len(paths)} pictures have no {config.caption_extension} file beside them: {names}"
    if config.on_missing_caption == "error":
        raise UserError(f"{message}; write them, or set data.on_missing_caption=empty or skip")
    log.warning(
        "%s; %s",
        message,
        "trained without a caption" if config.on_missing_caption == "empty" else "skipped",
    )
