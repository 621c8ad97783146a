"""Named tensors that are read on demand, from files or from a module in memory.

So a checkpoint of 7 GB is converted, compared or loaded with one tensor in memory at a time.
"""

import hashlib
import logging
import pickle
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.errors import UserError, reason
from trainer.formats import pickled
from trainer.formats.lazy import Lazy

log = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {
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
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_WINDOW_BYTES = 256 << 20
_END_BYTES = 1024  # hashed at each end of a tensor by `digest(ends_only=True)`

Weights = dict[str, Lazy]


def of_file(path: Path) -> tuple[Weights, dict[str, str]]:
    """The tensors of a .safetensors or .ckpt file, and its metadata (none in a .ckpt).

    The format is recognised by the file's first bytes, else by its name.  Raises UserError if the
    file is damaged, or if reading it would run code.
    """
    ending = path.suffix.lower()
    if ending not in (".safetensors", *PICKLED):
        raise UserError(
            f"{path} is not a checkpoint that can be read; its name ends in none of .safetensors, "
            + ", ".join(PICKLED)
        )
    called = ".safetensors" if ending == ".safetensors" else ".ckpt"
    form = _form(path) or called
    if form != called:
        log.info("%s is a %s file despite its name, and is read as such", path, form)
    return _of_safetensors(path) if form == ".safetensors" else (_of_pickle(path), {})


def _form(path: Path) -> str | None:
    """A file's format by its first bytes: .safetensors or .ckpt; None if neither."""
    try:
        with open(path, "rb") as file:
            begin, size = file.read(9), path.stat().st_size
    except OSError:
        return None
    if begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < size:  # length of a JSON header
        return ".safetensors"
    return ".ckpt" if begin.startswith((b"PK\3\4", b"\x80\2")) else None  # a zip, or a pickle


def _of_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    try:
        mapped = _Mapped(path)
        file = safe_open(path, framework="pt")
        metadata = dict(file.metadata() or {})
        weights = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            if kind not in SAFETENSORS_DTYPES:
                raise UserError(f"{path}: {name} is of the type {kind}, which cannot be read")
            weights[name] = Lazy(
                shape=tuple(tensor.get_shape()),
                dtype=SAFETENSORS_DTYPES[kind],
                read=partial(mapped.read, name),
            )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete: "
            "fetch or copy it again"
        ) from error
    return weights, metadata


class _Mapped:
    """Tensors of a safetensors file, which is mapped anew after every `_WINDOW_BYTES` read.

    Pages read from a mapping count as the process's memory until it is unmapped; with one mapping
    that would be the whole checkpoint, in addition to the model made from it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._bytes = 0  # read through this mapping

    def read(self, name: str) -> Tensor:
        """A view of the file.  Raises UserError if the file can no longer be read."""
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
        content = pickled.read(path) if zipfile.is_zipfile(path) else _of_old_pickle(path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any
        raise UserError(
            f"{path} cannot be read as a torch checkpoint ({reason(error)}); it is damaged or "
            "incomplete: fetch or copy it again"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    entries = dict(content) if isinstance(content, dict) else {}
    weights = of_tensors({name: t for name, t in entries.items() if isinstance(t, Tensor)})
    weights |= {name: lazy for name, lazy in entries.items() if isinstance(lazy, Lazy)}
    if not weights:
        raise UserError(f"{path} holds no named tensors")
    return weights


def _of_old_pickle(path: Path) -> Any:
    """The format before torch 1.6, which is not a zip."""
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise
        raise UserError(
            f"{path} holds more than tensors, in the format of before torch 1.6, and unpickling it "
            "could run any code; it is not loaded. If you trust it, convert it to .safetensors "
            "with the program it came from"
        ) from error


def of_tensors(tensors: dict[str, Tensor]) -> Weights:
    """Tensors that are in memory already."""
    return {
        name: Lazy(shape=tuple(t.shape), dtype=t.dtype, read=t.detach)
        for name, t in tensors.items()
    }


def of_module(module: nn.Module) -> Weights:
    """A module's parameters and buffers, by its own names."""
    return of_tensors(module.state_dict(keep_vars=True))


def contents(tensor: Tensor) -> Tensor:
    """A tensor's bytes (n,) uint8 on the CPU, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def digest(weights: Weights, names: Iterable[str], ends_only: bool = False) -> str:
    """sha256 over names, types, shapes and bytes.  `ends_only` hashes only the first and last bytes
    of each tensor, which makes it cheap for a model of gigabytes."""
    sha = hashlib.sha256()
    for name in sorted(names):
        lazy = weights[name]
        sha.update(f"{name} {lazy.dtype} {lazy.shape}\n".encode())
        content = contents(lazy.read()).numpy()
        for part in (content[:_END_BYTES], content[-_END_BYTES:]) if ends_only else (content,):
            sha.update(part.data)
    return sha.hexdigest()
