"""A safetensors file that is written one tensor at a time.

The safetensors package takes all tensors at once, twice in memory.  The format allows better: eight
bytes of length, a JSON header with each tensor's type, shape and place, then the tensors' bytes.
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.formats.weights import DTYPES, Weights, contents

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_HASH = "0x" + 64 * "0"
HASH = "modelspec.hash_sha256"  # of the tensors' bytes; as wide before it is known as after


def write(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    dtypes: dict[str, torch.dtype] | None = None,
) -> None:
    """Write `weights`, each in its type of `dtypes` where it has one there.

    If metadata has HASH, its value becomes the sha256 of everything after the header.
    """
    kinds = {name: (dtypes or {}).get(name, lazy.dtype) for name, lazy in weights.items()}
    if HASH in metadata:
        metadata = metadata | {HASH: _NO_HASH}
    header = _header(weights, kinds, metadata)
    sha = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(header)
        for name in tqdm(_order(kinds), desc=path.name, unit="tensor", disable=None, leave=False):
            tensor = weights[name].read()
            assert tuple(tensor.shape) == weights[name].shape, name
            data = contents(tensor.to(kinds[name]))
            sha.update(data)
            file.write(data)
        if HASH in metadata:
            file.seek(0)
            file.write(_header(weights, kinds, metadata | {HASH: f"0x{sha.hexdigest()}"}))


def _order(kinds: dict[str, torch.dtype]) -> list[str]:
    """Wide types first, so that every tensor lies at a multiple of its element's size."""
    return sorted(kinds, key=lambda name: (-kinds[name].itemsize, name))


def _header(weights: Weights, kinds: dict[str, torch.dtype], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    place = 0
    for name in _order(kinds):
        shape = weights[name].shape
        end = place + torch.Size(shape).numel() * kinds[name].itemsize
        header[name] = {
            "dtype": _NAMES[kinds[name]],
            "shape": list(shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
