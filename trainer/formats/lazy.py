"""Tensors that are read on demand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read on demand; `read` may return a view of a file or of a module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> "Lazy":
        """The same tensor, cast when it is read."""
        return Lazy(shape=self.shape, dtype=dtype, read=lambda: self.read().to(dtype))
