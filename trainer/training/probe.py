"""How far a step moves the weights, from a small fixed sample of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PER_TENSOR = 4096


class UpdateProbe:
    """RMS(new - old) / RMS(old) over at most 4096 evenly spaced elements of every tensor.

    A full copy of the weights would cost as much memory as the model; the sample costs 18 MB
    for the SDXL UNet, twice.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._before = self._read()

    def ratio(self) -> float:
        """The update-to-weight ratio since construction."""
        before, after = self._before, self._read()
        return ((after - before).norm() / before.norm().clamp_min(1e-30)).item()

    @torch.no_grad()
    def _read(self) -> Tensor:
        views = (x.reshape(-1) for x in self._tensors)
        return torch.cat([x[:: -(-x.numel() // _PER_TENSOR) or 1].float() for x in views])
