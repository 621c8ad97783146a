"""A tensor that is known before it is read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lazy:
    """A tensor that is read when it is wanted; `read` may give a view of a file or of a module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> "Lazy":
        """The same, cast when it is read."""
        return Lazy(shape=self.shape, dtype=dtype, read=lambda: self.read().to(dtype))
