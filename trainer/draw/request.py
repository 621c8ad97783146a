"""What to draw: the arguments of `python -m trainer.draw`."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

_SIDE = 8  # pixels; sides of pictures are multiples of it


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts, what draws them, and how.  None: as its run did, or else a default."""

    sources: list[str]  # paths, or names on the hub
    out: Path  # the grid's file
    lines: list[str]  # prompts with their options
    prompts_file: str | None = None
    all_results: bool = False  # of runs, also the intermediate ones
    base: str | None = None  # the model of LoRAs
    with_base: bool = True
    scales: list[float] | None = None  # of LoRAs; None: 1, without saying so
    variant: str | None = None  # of a diffusers folder's files: fp16
    negative: str | None = None
    guidance: float | None = None
    steps: int | None = None  # of sampling
    seed: int = 0  # of the first prompt
    resolution: int | None = None  # pixels
    batch_size: int | None = None  # pictures drawn at a time
    device: str = "auto"
    dtype: str | None = None  # of the UNet
    quantization: str | None = None  # of the UNet

    @property
    def folder(self) -> Path:
        """Of the single pictures."""
        return self.out.with_suffix("")

    def check(self) -> None:
        """Refuse an output that exists or is no PNG, and numbers out of their ranges."""
        if self.out.suffix.lower() != ".png":
            raise UserError(f"--out={self.out}: the grid is a PNG; name it {self.out.name}.png")
        for path in (self.out, self.folder):
            if os.path.lexists(path):
                raise UserError(f"--out={self.out}: {path} already exists; name another file")
        folder = next(path for path in self.out.absolute().parents if path.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UserError(f"--out={self.out}: nothing can be written in {folder}")
        for scale in self.scales or []:
            if not math.isfinite(scale):
                raise UserError(f"--scale={scale:g} must be a finite number")
            if (self.scales or []).count(scale) > 1:
                raise UserError(f"--scale has {scale:g} twice; once is enough")
        side = self.resolution
        if side is not None and (side < _SIDE or side % _SIDE):
            raise UserError(f"--resolution={side} is not a multiple of {_SIDE} pixels")
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UserError(f"--guidance={self.guidance:g} must be from 0 to 100")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UserError(f"--steps={self.steps} must be from 1 to 1000")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed={self.seed} must be from 0 to 2^63 - 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size={self.batch_size} must be at least 1")
