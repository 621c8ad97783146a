"""How APOLLO is stepped on a GPU: as `optim/projected.py` says, for many tensors at once.

One launch draws P for all of a portion, from step counts that stay on the device; the products are
torch's matmuls, on tensor cores where gradients have 16 bits; one launch looks for unusable
elements in them (or computes the products, if the rank is small); and one computes the factors.
Nothing is read back, so that a step can be captured in a CUDA graph; `optim/cuda.py` says how long
it may be replayed.

The factor 1 / sqrt(rank) of P is applied by the engine that steps P G, in the coefficient of its
gradients, together with that of the clip by the global norm.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optim import plan
from optim.gpu import Gpu, gpu_of
from optim.indirect import Make, Portions
from optim.interface import RuledOwner
from optim.portion import Portion, ProjectedKind
from optim.projected import ProjectedEngine
from optim.projection import channels
from optim.staging import Staging

FEW_ROWS = (1, 4, 8)  # rows of P G that our own kernels compute; at most the warps of a block
CHUNK = 1 << 22  # gradient elements converted to fp32 at a time, without `_WIDENS`
THREADS = 256  # per block: csrc/engine/projected_cuda.h
# Whether torch multiplies 16-bit matrices into fp32 ones: 2.8 and later, on a GPU.
_WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()


class CudaProjectedEngine(ProjectedEngine):
    """On one GPU, by the kernels of `csrc/engine/projected_cuda.h` and torch's matmul."""

    def __init__(
        self,
        optimizer: RuledOwner,
        dense: str,
        make: Make,
        device: torch.device,
        gpu: Gpu | None = None,
    ) -> None:
        super().__init__(optimizer, dense, make, device)
        self._gpu = gpu or gpu_of(device)
        self._staging = Staging(self._gpu)
        self._captured = False  # if so, a graph's replays write addresses too
        self._of_graphs: dict[int, Portions] = {}  # kept alive for graphs

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        return self._gpu.here()

    def _p_dtype(self, grad_dtype: torch.dtype) -> torch.dtype:
        return grad_dtype

    def _prepare(self, work: Portions, kinds: Iterable[ProjectedKind]) -> None:
        self._gpu.load(name for kind in kinds for name in kernels_of(kind).values())

    def _put(self, work: Portions, addresses: Tensor) -> None:
        if self._gpu.capturing():
            self._captured = True
            self._of_graphs[id(work)] = work
        else:
            alike = sum(len(one.wide) == len(work.wide) for one in self._works.values())
            self._staging.spare(addresses, alike)
        if self._captured or not torch.equal(addresses, work.known):
            known = addresses.clone()
            work.grads.copy_(self._staging.readable(known), non_blocking=True)
            work.known = known  # last: the copy may have failed

    def _draw(self, portion: Portion) -> None:
        self._launch(portion, "draw", sum(portion.num_draws))

    def _project(self, portion: Portion, grads: list[Tensor]) -> None:
        if not few_rows(portion.kind.rank):
            for p, grad, low in zip(portion.p, grads, portion.products, strict=True):
                multiply(p, channels(grad), low)
        self._launch(portion, "project", sum(portion.num_channels))

    def _measure(self, portion: Portion) -> None:
        self._launch(portion, "lengths", sum(portion.num_channels))
        if portion.kind.per_tensor:
            self._launch(portion, "whole", len(portion.places))

    def _launch(self, portion: Portion, use: str, grid: int) -> None:
        name = kernels_of(portion.kind)[use]
        kernel = self._gpu.load([name])[name]
        self._gpu.launch(kernel, grid, THREADS, 0, portion.table.data_ptr())


def few_rows(rank: int) -> int:
    """The rows of our own kernel for this rank; 0 if torch computes P G."""
    return next((few for few in FEW_ROWS if rank <= few), 0)


def kernels_of(kind: ProjectedKind) -> dict[str, str]:
    """The names of a portion's kernels, by their use."""
    dtype = plan.DTYPES[kind.grad_dtype]
    names = {
        "draw": f"draw_kernel<{dtype}, {str(kind.signs).lower()}>",
        "lengths": f"lengths_kernel<{str(kind.per_tensor).lower()}>",
    }
    if not kind.conditioned:
        few = few_rows(kind.rank)
        names["project"] = f"few_kernel<{dtype}, {few}>" if few else f"mend_kernel<{dtype}>"
    if kind.per_tensor:
        names["whole"] = "whole_kernel<0>"
    return {use: "engine::cuda::projected::" + name for use, name in names.items()}


def multiply(p: Tensor, g: Tensor, out: Tensor) -> None:
    """out fp32 (r, L) = p (r, D) g (D, L), which have one dtype, with fp32 sums."""
    if p.dtype is torch.float32:
        torch.mm(p, g, out=out)
    elif _WIDENS and p.is_cuda:
        torch.mm(p, g, out_dtype=torch.float32, out=out)
    else:
        width, p = max(1, CHUNK // g.shape[0]), p.float()
        for at in range(0, g.shape[1], width):
            span = slice(at, at + width)
            torch.matmul(p, g[:, span].float(), out=out[:, span])
