"""How many bytes of tensors are alive at once while some code runs, whether there are numbers in
them or not."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512  # bytes: torch's CUDA allocator gives multiples of it


class Ledger(TorchDispatchMode):
    """Within it, every storage that an operation makes is counted until the last tensor of it is
    gone; a view adds nothing.

    What an operation needs for its own duration (a library's workspace, the partial results of a
    sum) is no tensor, and not seen.
    """

    def __init__(self, kind: str) -> None:
        """`kind`: the category of tensors that operations create."""
        super().__init__()
        self.alive: Counter[str] = Counter()  # bytes of each kind, now
        self.peak: Counter[str] = Counter()  # and when they were most
        self._kind = kind
        self._entries: dict[int, tuple[str, int]] = {}  # of storages, by their addresses

    def enter(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors as this kind, those too that are counted as another."""
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
        address = storage._cdata  # by which a storage without memory is known
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
