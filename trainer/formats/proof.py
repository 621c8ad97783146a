"""Reading back what was written: an export that differs from what was trained raises an error."""

from collections.abc import Mapping

import torch
from tqdm import tqdm

from trainer.errors import UserError
from trainer.formats.weights import Weights, contents


class NotProved(UserError):
    """The written file differs from what was to be written; the disk may be full or failing."""


def same(written: Weights, wanted: Weights, dtypes: Mapping[str, torch.dtype], where: str) -> int:
    """Compare names, shapes, types and every byte, one tensor at a time; returns how many.

    `wanted` was written in `dtypes`.  Raises NotProved for the first tensor that differs.
    """
    for name in (*wanted, *written):
        if name not in written or name not in wanted:
            lost = "is missing in" if name in wanted else "should not be in"
            raise NotProved(f"{where}, read back: {name} {lost} it; the file is discarded")
    bar = tqdm(wanted.items(), desc="reading back", unit="tensor", disable=None, leave=False)
    for name, lazy in bar:
        read_back, dtype = written[name], dtypes.get(name, lazy.dtype)
        if (read_back.shape, read_back.dtype) != (lazy.shape, dtype):
            raise NotProved(
                f"{where}, read back: {name} is {read_back.dtype} {read_back.shape} "
                f"instead of {dtype} {lazy.shape}; the file is discarded"
            )
        if not torch.equal(contents(read_back.read()), contents(lazy.read().to(dtype))):
            raise NotProved(f"{where}, read back: {name} has other values; the file is discarded")
    return len(wanted)
