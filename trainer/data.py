"""Pictures and captions from a folder, and which of them make up the batch of a step.

Which samples a step sees depends on (seed, step) alone: an epoch is a permutation drawn from a
counter, and step k takes the next `batch_size` places of the endless row of epochs.  So a resumed
run needs no sampler state, and runs that differ in the optimizer see the same batches.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from optim import rng
from trainer.config import PICTURE_SUFFIXES, DataConfig
from trainer.errors import UserError
from trainer.streams import Stream

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Sample:
    """One picture on the disk; its pixels are read when they are needed (`read_pixels`)."""

    path: Path
    caption: str
    time_ids: tuple[int, int, int, int, int, int]  # original h, w; crop top, left; target h, w

    @property
    def side(self) -> int:
        """Height and width of the square that is trained on, in pixels."""
        return self.time_ids[-1]


def load_folder(config: DataConfig) -> list[Sample]:
    """Check every picture below `config.path` and read its caption, in the order of their paths.

    Raises UserError when there are none, or more than `max_unreadable` cannot be read, or a caption
    is missing and that is an error.  Whatever is skipped is named and counted.
    """
    folder = Path(config.path).expanduser()
    paths = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file()
    )
    if not paths:
        raise UserError(
            f"data.path={folder} has no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})"
        )
    uncaptioned = [p for p in paths if not p.with_suffix(config.caption_extension).is_file()]
    _report_uncaptioned(uncaptioned, config)
    if config.on_missing_caption == "skip":
        paths = [p for p in paths if p not in set(uncaptioned)]

    samples, unreadable = [], 0
    for path in paths:
        try:
            samples.append(_load(path, config))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, UserError):
                raise
            unreadable += 1
            log.warning("skipped unreadable picture %s: %s", path, error)
            if unreadable > config.max_unreadable:
                raise UserError(
                    f"{unreadable} unreadable pictures, the last {path} ({error}); "
                    f"remove them, or allow more with data.max_unreadable={unreadable}"
                ) from error
    if not samples:
        raise UserError(
            f"data.path={folder}: of {len(paths)} pictures none can be used; see the warnings above"
        )
    form = "data: %d pictures in %s, %d unreadable, %d without a caption"
    log.info(form, len(samples), folder, unreadable, len(uncaptioned))
    return samples


def read_pixels(sample: Sample) -> Tensor:
    """The picture as the VAE takes it: -> fp32 (3, side, side) in [-1, 1]."""
    side = sample.side
    rgb = _read_rgb(sample.path)
    # The central square, resampled to side x side.
    edge = min(rgb.size)
    left, top = (rgb.width - edge) / 2, (rgb.height - edge) / 2
    box = (left, top, left + edge, top + edge)
    square = rgb.resize((side, side), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def fingerprint(samples: list[Sample]) -> str:
    """A hash of what is trained on: names, captions and sizes, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.path.name, sample.caption, sample.time_ids)).encode())
    return digest.hexdigest()


def batch_indices(seed: int, step: int, batch_size: int, num_samples: int) -> list[int]:
    """Which samples step `step` (from 0) trains on."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [
        _permutation(seed, place // num_samples, num_samples)[place % num_samples]
        for place in places
    ]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=rng.generator(seed, Stream.EPOCH, epoch)).tolist()


def _load(path: Path, config: DataConfig) -> Sample:
    rgb, side = _read_rgb(path), config.resolution
    scale = side / min(rgb.size)
    width, height = (max(side, round(length * scale)) for length in rgb.size)
    original = (rgb.height, rgb.width) if config.time_ids == "original" else (height, width)
    crop = ((height - side) // 2, (width - side) // 2)
    return Sample(
        path=path, caption=_caption(path, config), time_ids=(*original, *crop, side, side)
    )


def _read_rgb(path: Path) -> Image.Image:
    """RGB, upright as its EXIF says; transparent pixels show white.

    Raises ValueError for a format whose values have no defined place between black and white.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16"):  # 16 bits a pixel: Pillow would clip instead of scale
        return Image.fromarray(
            (np.asarray(image, dtype=np.float32) / 257).round().astype("uint8")
        ).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} pixels (32 bits) have no defined range; save it as 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
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
    consequence = "skipped" if config.on_missing_caption == "skip" else "trained without a caption"
    log.warning("%s; %s", message, consequence)
