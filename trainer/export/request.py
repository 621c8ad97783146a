"""What to convert, and how to write it: the arguments of `python -m trainer.export`."""

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

    def check(self) -> None:
        """Refuse a target that exists, or whose suffix is that of a file type that is not
        written."""
        if self.target.exists() or self.target.is_symlink():
            raise UserError(f"{self.target} exists; name another target, or remove it")
        ending = self.target.suffix
        if ending != ".safetensors" and ending.lower() in (".safetensors", ".sft", *PICKLED):
            raise UserError(
                f"{self.target} ends in {ending}: single files are written as .safetensors; name "
                f"it {self.target.with_suffix('.safetensors').name}, or drop the suffix for a "
                "folder"
            )

    def check_file(self) -> None:
        """Refuse a target that does not look like the file it would be."""
        if self.target.suffix != ".safetensors":
            raise UserError(f"{self.target} must end in .safetensors, the format that is written")
