"""Values on their way from the host to a GPU: what a copy reads, in a step and in a CUDA graph."""

from typing import Any

from torch import Tensor

from optim.gpu import Gpu

# Times that one capture may copy the same values: a step with a global norm copies its addresses
# twice.
COPIES = 2
_WANTS_A_STEP = (
    "a CUDA graph of optimizer.step() needs an ordinary step() of the same parameters before each "
    "capture"
)


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

    def refuse_in_capture(self) -> None:
        """Raise RuntimeError where a CUDA graph is being captured, which is no place for what a
        first step makes: zeros would be recorded and not written, and a copy that waits breaks the
        capture."""
        if self._gpu.capturing():
            raise RuntimeError(_WANTS_A_STEP)

    def spare(self, values: Tensor, count: int) -> None:
        """Before captures: have room for so many values of this shape and dtype, COPIES times."""
        spares = self._spares.setdefault(_key(values), [])
        missing = COPIES * count - len(spares)
        if missing > 0:
            spares += self._gpu.pinned(missing, *values.shape, dtype=values.dtype)

    def readable(self, values: Tensor) -> Tensor:
        """Host values where a copy to the device may read them."""
        if not self._gpu.capturing():
            return values
        spares = self._spares.get(_key(values))
        if not spares:
            raise RuntimeError(_WANTS_A_STEP)
        self.of_graphs.append(spares.pop().copy_(values))
        return self.of_graphs[-1]


def _key(values: Tensor) -> tuple[Any, ...]:
    return (*values.shape, values.dtype)
