"""Writes a safetensors file one tensor at a time.

The safetensors package takes all tensors at once, so a checkpoint that is being converted, or whose
weights are on a GPU, would have to be in memory as a whole.  The format does not require that: it
is eight bytes of length, a JSON header with each tensor's type, shape and place, then the bytes.
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.errors import UserError
from trainer.formats.weights import SAFETENSORS_DTYPES, Weights, contents

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# Keys for the hash of the tensors' bytes, in modelspec's and A1111's form.  Its length is fixed, so
# a placeholder can be overwritten once it is known.
HASH = "modelspec.hash_sha256"
SSHS = "sshs_model_hash"
_FORMS = {HASH: "0x{}", SSHS: "{}"}


def write(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    dtypes: dict[str, torch.dtype] | None = None,
) -> None:
    """Write `weights`, each in its type from `dtypes`, or its own if it is not in there.

    If metadata has HASH or SSHS, its value becomes the sha256 of everything after the header.
    """
    dtypes = {name: (dtypes or {}).get(name, lazy.dtype) for name, lazy in weights.items()}
    header = _header(weights, dtypes, metadata | _hashes(metadata, 64 * "0"))
    sha, is_hashed = hashlib.sha256(), bool(_hashes(metadata, ""))
    with open(path, "wb") as file:
        file.write(header)
        for name in tqdm(_order(dtypes), desc=path.name, unit="tensor", disable=None, leave=False):
            tensor = weights[name].read()
            assert tuple(tensor.shape) == weights[name].shape, name
            data = contents(rounded(name, tensor, dtypes[name])).numpy().data
            file.write(data)
            if is_hashed:
                sha.update(data)
        file.seek(0)
        file.write(_header(weights, dtypes, metadata | _hashes(metadata, sha.hexdigest())))


def _hashes(metadata: dict[str, str], digest: str) -> dict[str, str]:
    return {key: form.format(digest) for key, form in _FORMS.items() if key in metadata}


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`.  Raises UserError if a finite value overflows."""
    rounded = tensor.to(dtype)
    if dtype != tensor.dtype and dtype.is_floating_point:
        lost = tensor.isfinite() & ~rounded.isfinite()
        if lost.any():
            raise UserError(
                f"{name} has values up to {tensor[lost].abs().max():.3g}, which "
                f"{str(dtype).removeprefix('torch.')} cannot represent; choose another dtype"
            )
    return rounded


def _order(dtypes: dict[str, torch.dtype]) -> list[str]:
    """Wide types first, so that every tensor is aligned to its element size."""
    return sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name))


def _header(weights: Weights, dtypes: dict[str, torch.dtype], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    offset = 0
    for name in _order(dtypes):
        shape = weights[name].shape
        end = offset + torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
