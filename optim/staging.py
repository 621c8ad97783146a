"""Values on their way from the host to a GPU: what a copy reads, in a step and in a CUDA graph."""

from typing import Any

from torch import Tensor

from optim.gpu import Gpu


class Staging:
    """Where the copies of an engine's steps read from.

    An ordinary copy reads once, from where the values are.  A graph that is being captured copies
    again at every replay, from page-locked memory of its own.  None can be had during a capture, so
    the steps before it see to spares.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._spares: dict[tuple[Any, ...], list[Tensor]] = {}  # pinned, for captures to come
        self.of_graphs: list[Tensor] = []  # pinned, from which graphs copy

    def readable(self, values: Tensor, copies: int = 2) -> Tensor:
        """Host values where a copy to the device may read them; a step copies values of this shape
        and dtype `copies` times at most.  (Two: a step with a global norm copies its addresses
        twice.)"""
        spares = self._spares.setdefault((*values.shape, values.dtype), [])
        if not self._gpu.capturing():
            while len(spares) < copies:
                spares.append(self._gpu.pinned(*values.shape, dtype=values.dtype))
            return values
        if not spares:
            raise RuntimeError(
                "a CUDA graph of optimizer.step() wants an ordinary step() of the same parameters "
                "before each capture"
            )
        self.of_graphs.append(spares.pop().copy_(values))
        return self.of_graphs[-1]
