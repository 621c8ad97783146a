"""Host memory that copies to a GPU read from, in ordinary steps and in CUDA graphs."""

from typing import Any

from torch import Tensor

from optim.gpu import Gpu

# How often one capture may copy the same values: a step with a global norm copies its addresses
# twice.
COPIES = 2
_WANTS_A_STEP = (
    "a CUDA graph of optimizer.step() needs an ordinary step() of the same parameters before each "
    "capture"
)


class Staging:
    """The host memory that the copies of an engine's steps read from.

    An ordinary copy reads its values once, in place.  A captured copy reads them again at every
    replay, from page-locked memory of its own.  That cannot be allocated during a capture, so the
    steps before it allocate spares.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._spares: dict[tuple[Any, ...], list[Tensor]] = {}  # pinned, for later captures
        self.of_graphs: list[Tensor] = []  # pinned, read by graphs

    def refuse_in_capture(self) -> None:
        """Raise RuntimeError during the capture of a CUDA graph, where a first step cannot set up
        its memory: zeroing would be recorded and not executed, and a copy that waits breaks the
        capture."""
        if self._gpu.capturing():
            raise RuntimeError(_WANTS_A_STEP)

    def spare(self, values: Tensor, count: int) -> None:
        """Before captures: allocate spares for `count` tensors like `values`, COPIES for each."""
        spares = self._spares.setdefault(_key(values), [])
        missing = COPIES * count - len(spares)
        if missing > 0:
            spares += self._gpu.pinned(missing, *values.shape, dtype=values.dtype)

    def readable(self, values: Tensor) -> Tensor:
        """Host values in memory that a copy to the device may read."""
        if not self._gpu.capturing():
            return values
        spares = self._spares.get(_key(values))
        if not spares:
            raise RuntimeError(_WANTS_A_STEP)
        self.of_graphs.append(spares.pop().copy_(values))
        return self.of_graphs[-1]


def _key(values: Tensor) -> tuple[Any, ...]:
    return (*values.shape, values.dtype)
