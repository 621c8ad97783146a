"""Tensors by name that are read when they are asked for: of files, or of a module in memory.

A checkpoint of 7 GB is then converted, compared or loaded a tensor at a time, in the memory of one.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import UserError

DTYPES = {  # as safetensors writes them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WINDOW_BYTES = 256 << 20
_END_BYTES = 1024  # of a tensor that is known by its ends
PICKLED = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when it is wanted; `read` may give a view of a file or of a module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> "Lazy":
        """The same, cast when it is read."""
        return Lazy(shape=self.shape, dtype=dtype, read=lambda: self.read().to(dtype))


Weights = dict[str, Lazy]


def of_file(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a .safetensors or .ckpt file, and its metadata (of a .ckpt: none).

    Raises UserError where the file is damaged or would run code to be read.
    """
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix in PICKLED:
        return _of_pickle(path), {}
    raise UserError(
        f"{path} is no checkpoint that can be read; its name ends in none of .safetensors, "
        + ", ".join(PICKLED)
    )


def _of_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    try:
        mapped = _Mapped(path)
        file = safe_open(path, framework="pt")
        metadata = dict(file.metadata() or {})
        weights = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            if kind not in DTYPES:
                raise UserError(f"{path}: {name} is of the type {kind}, which cannot be read")
            weights[name] = Lazy(
                shape=tuple(tensor.get_shape()),
                dtype=DTYPES[kind],
                read=partial(mapped.read, name),
            )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete: "
            "fetch or copy it again"
        ) from error
    return weights, metadata


class _Mapped:
    """Tensors of a safetensors file, through a mapping that lasts for `_WINDOW_BYTES` of them.

    What has been read of a mapping counts as the process's memory until the mapping ends, and would
    come to the whole checkpoint beside the model that was made of it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._bytes = 0  # read through this mapping

    def read(self, name: str) -> Tensor:
        """A view of the file.  Raises UserError where it is not what it was when it was opened."""
        try:
            if self._file is None or self._bytes > _WINDOW_BYTES:
                self._file, self._bytes = safe_open(self._path, framework="pt"), 0
            tensor = self._file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._path} was changed while it was in use: {error}") from error
        self._bytes += tensor.nbytes
        return tensor


def _of_pickle(path: Path) -> Weights:
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # of before torch 1.6: cannot be mapped
            if "mmap" not in str(error):
                raise
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and unpickling that can run any code; it is not "
            "loaded. Where you trust it, convert it to .safetensors with the program it came from"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a torch checkpoint ({reason}); it is damaged or incomplete: "
            "fetch or copy it again"
        ) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    tensors = {name: t for name, t in held.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return of_tensors(tensors)


def of_tensors(tensors: dict[str, Tensor]) -> Weights:
    """Tensors that are in memory already."""
    return {
        name: Lazy(shape=tuple(t.shape), dtype=t.dtype, read=lambda t=t: t.detach())
        for name, t in tensors.items()
    }


def of_module(module: nn.Module) -> Weights:
    """A module's parameters and buffers, by its own names."""
    return of_tensors(module.state_dict(keep_vars=True))


def contents(tensor: Tensor) -> Tensor:
    """A tensor's bytes (n,) uint8 on the CPU, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def digest(weights: Weights, names: Iterable[str], ends_only: bool = False) -> str:
    """sha256 over names, types, shapes and bytes; of the bytes only each tensor's first and last,
    where a look at a model of gigabytes must cost next to nothing."""
    sha = hashlib.sha256()
    for name in sorted(names):
        lazy = weights[name]
        sha.update(f"{name} {lazy.dtype} {lazy.shape}\n".encode())
        content = contents(lazy.read()).numpy()
        for part in (content[:_END_BYTES], content[-_END_BYTES:]) if ends_only else (content,):
            sha.update(part)
    return sha.hexdigest()
