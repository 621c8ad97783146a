"""Entries of the store: an encoded picture or caption, or a mask, as named tensors, in memory or in
a file of its own."""

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from trainer.data.buckets import Size
from trainer.data.sample import Sample
from trainer.errors import UserError
from trainer.formats.weights import SAFETENSORS_DTYPES
from trainer.system.retry import with_retries

Entry = dict[str, Tensor]


@dataclass(kw_only=True)
class Entries:
    """Entries of samples by their index, or of captions by their text."""

    keys: dict[Any, str]
    memory: dict[str, Entry] = field(default_factory=dict)
    folder: Path | None = None  # if set, every access reads the entry from here

    def __getitem__(self, name: Hashable) -> Entry:
        key = self.keys[name]
        if self.folder is None:
            return self.memory[key]
        path = path_of(self.folder, key)
        try:
            # Not memory-mapped: truncating a mapped file would kill the process.
            entry = load(with_retries(path.read_bytes))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the cache's {path} has become unreadable since the run began: {error}; resume or "
                "restart to recreate it"
            ) from error
        if not is_finite(entry):
            with suppress(OSError):
                path.unlink()  # else the next run would find it again
            raise UserError(
                f"the cache's {path} was not finite and has been deleted; resume or restart to "
                "recreate it"
            )
        return entry


def read_header(path: Path) -> Entry:
    """An entry's tensors on the meta device.  Raises SafetensorError if the file's length
    contradicts its header."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {
            name: torch.empty(s.get_shape(), dtype=SAFETENSORS_DTYPES[s.get_dtype()], device="meta")
            for name, s in slices.items()
        }


def path_of(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def is_finite(entry: Entry) -> bool:
    return all(tensor.isfinite().all() for tensor in entry.values())


def is_latent(entry: Entry, sample: Sample) -> bool:
    """Whether both sides are the bucket's, divided by the same integer (the VAE's scale)."""
    if entry.keys() != {"latent"} or entry["latent"].ndim != 3:
        return False
    sides = zip(sample.bucket, entry["latent"].shape[1:], strict=True)
    scales = {whole / part if part else 0.0 for whole, part in sides}
    return len(scales) == 1 and all(scale >= 1 and scale.is_integer() for scale in scales)


def is_mask(entry: Entry, size: Size) -> bool:
    return entry.keys() == {"mask"} and entry["mask"].shape == (1, *size)


def is_text(entry: Entry) -> bool:
    dims = {name: tensor.ndim for name, tensor in entry.items()}
    return dims in ({"prompt": 2}, {"prompt": 2, "pooled": 1})
