"""Counts the bytes of live tensors while code runs, whether the tensors are real or fake."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512  # bytes: torch's CUDA allocator returns multiples of it


class Ledger(TorchDispatchMode):
    """Counts every storage that an operation creates until its last tensor is freed; views add
    nothing.

    Temporary memory inside an operation (a library's workspace, a sum's partial results) is not a
    tensor and not counted.
    """

    def __init__(self, kind: str) -> None:
        """`kind`: the category of tensors that operations create."""
        super().__init__()
        self.alive: Counter[str] = Counter()  # bytes of each kind, now
        self.peak: Counter[str] = Counter()  # the same, when their total was largest
        self._kind = kind
        self._entries: dict[int, tuple[str, int]] = {}  # storage's address -> kind, bytes

    def enter(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors as this kind, even if they are counted as another."""
        for tensor in tensors:
            self._enter(tensor, kind)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self._entries:
                self._enter(made, self._kind)
        return result

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata  # identifies a storage even if it has no memory
        if address in self._entries:
            self._strike(address)
        else:
            weakref.finalize(storage, self._strike, address).atexit = False
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._entries[address] = kind, size
        self.alive[kind] += size
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def _strike(self, address: int) -> None:
        kind, size = self._entries.pop(address)
        self.alive[kind] -= size
