"""What to convert, and how to write it: the arguments of `python -m trainer.export`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.formats.weights import PICKLED


@dataclass(frozen=True, kw_only=True)
class Request:
    """One conversion."""

    source: str  # a path, or a name on the hub
    target: Path
    form: str | None = None  # diffusers, single_file or kohya; None: by source and target
    dtype: torch.dtype | None = None  # None: unchanged
    base: str | None = None  # of a LoRA, or where the model of a checkpoint is now
    variant: str | None = None  # of a diffusers folder's files: fp16
    merge: bool = False  # write the base model with the LoRA merged into it
    scale: float | None = None  # of what is merged; None: 1
    extract: bool = False  # write the difference between a model and its base as a LoRA
    rank: int | None = None  # of the LoRA that is written; None: as it is, or 64 if it is extracted

    def check(self) -> None:
        """Refuse a target that exists, or whose suffix is that of a file type that is not
        written; options that contradict each other."""
        self._check_scale()
        self._check_rank()
        if self.target.exists() or self.target.is_symlink():
            raise UserError(f"{self.target} exists; name another target, or remove it")
        ending = self.target.suffix
        if ending != ".safetensors" and ending.lower() in (".safetensors", ".sft", *PICKLED):
            raise UserError(
                f"{self.target} ends in {ending}: single files are written as .safetensors; name "
                f"it {self.target.with_suffix('.safetensors').name}, or drop the suffix for a "
                "folder"
            )

    def refuse_merge(self, what: str) -> None:
        """Refuse --merge of something that is not a LoRA.  what: a phrase that says what it is."""
        if self.merge:
            raise UserError(f"--merge is for LoRAs, and {what}; leave out --merge")

    def refuse_extract(self, what: str) -> None:
        """Refuse --extract of a LoRA.  what: a phrase that says what it is."""
        if self.extract:
            raise UserError(
                f"--extract is for models, and {what}; leave out --extract (--rank alone makes a "
                "smaller LoRA of a LoRA)"
            )

    def refuse_rank(self, what: str) -> None:
        """Refuse --rank for a model that is written as one.  what: says what it is."""
        if self.rank is not None and not self.extract:
            raise UserError(
                f"--rank={self.rank} is for LoRAs, and {what}; add --extract to make a LoRA of it"
            )

    def _check_rank(self) -> None:
        if self.extract and self.merge:
            raise UserError(
                "--extract makes a LoRA of a model, and --merge a model of a LoRA; leave one out"
            )
        if self.rank is None:
            return
        if self.merge:
            raise UserError(
                f"--rank={self.rank} has no effect with --merge, which writes a model; leave out "
                "--rank"
            )
        if self.rank < 1:
            raise UserError(f"--rank={self.rank} must be at least 1")

    def _check_scale(self) -> None:
        if self.scale is None:
            return
        if not self.merge:
            raise UserError(f"--scale={self.scale:g} has no effect without --merge")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UserError(f"--scale={self.scale:g} must be a finite number other than 0")

    def check_file(self) -> None:
        """Refuse a target that does not look like the file it would be."""
        if self.target.suffix != ".safetensors":
            raise UserError(f"{self.target} must end in .safetensors, the format that is written")
