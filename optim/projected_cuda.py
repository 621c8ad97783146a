"""How APOLLO is stepped on a GPU: the two steps of `optim/projected.py`, for many tensors at once.

Tensors of one kind make portions, whose P, P G and N share one scratch that every portion uses
anew.  P is drawn for all of a portion by one launch, from step counts that stay on the device; the
products are torch's matmuls, on tensor cores where gradients have 16 bits; one launch looks for
what is not usable in them (or computes them, where the rank is small); an engine steps the
projections; and one launch makes factors of what came of it.  Nothing is read back, so that a step
can be captured in a CUDA graph, for which `optim/cuda.py` says how long it may be replayed.

The factor 1 / sqrt(rank) of P is left to the engine that steps P G, as what multiplies its
gradients, together with what a global norm makes of them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim import features, plan
from optim.engine import HOST, Work, buckets, superfluous
from optim.gpu import Gpu, gpu_of
from optim.portion import Portion, ProjectedKind, kind_of
from optim.projected import LowSteps, Make, ScaledSteps, is_conditioned, parted, projected
from optim.projection import channels
from optim.share import Place, Places, Share, Trait
from optim.staging import Staging

if TYPE_CHECKING:
    from optim.fused import FusedOptimizer

# Bytes of P, P G and N that are alive at once: at rank 256 the SDXL UNet has 4.9 GB of them, and
# each portion costs a dozen launches.
SCRATCH_BYTES = 256 << 20
CHUNK = 1 << 22  # gradient elements that are fp32 at once where torch cannot multiply as they are
THREADS = 256  # of a block: csrc/engine/projected_cuda.h
# What a portion and its launches are made of, besides the tensors' shapes.
_SHAPING = (
    *("rank", "scale", "scaling", "update_gap", "projection", "seed", "orthograd", "grad_clip"),
)
# Whether torch multiplies 16-bit matrices into fp32 ones: 2.8 and later, on a GPU.
_WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()


class _Portions(Work):
    """The portions of a set of parameters, and what they were made from."""

    def __init__(self, optimizer: "FusedOptimizer", places: Places, stamp: list[Any]) -> None:
        self.wide, self.others = parted(places)
        states = [optimizer.state_of(param, group) for _, group, param in self.wide]
        super().__init__(places, stamp, states)
        self.asked = self.wide.params  # in the order of `states`
        self.portions: list[Portion] = []
        self.grads = torch.empty(
            0, dtype=torch.int64, device="cpu"
        )  # their addresses, on the device
        self.known = self.grads  # the same, on the host


class CudaProjectedEngine:
    """Steps the parameters of an APOLLO on one GPU, by engines that `make(owner, rule)` gives for
    the steps of `dense` (a rule's name) and for "scaled"."""

    def __init__(
        self,
        optimizer: "FusedOptimizer",
        dense: str,
        make: Make,
        device: torch.device,
        gpu: Gpu | None = None,
    ) -> None:
        self._optimizer, self._device = optimizer, device
        self._gpu = gpu or gpu_of(device)
        self._staging = Staging(self._gpu)
        self._low, self._scaled = LowSteps(optimizer), ScaledSteps(optimizer)
        self._dense_engine = make(optimizer, dense)
        self._low_engine: Any = make(self._low, dense)
        self._scaled_engine = make(self._scaled, "scaled")
        self._works: dict[tuple[int, ...], _Portions] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._captured = False  # a graph's replays write addresses too, unseen
        self._of_graphs: dict[int, _Portions] = {}  # what graphs point to

    def step(self, places: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.backend.Engine`."""
        with self._gpu.here():
            work = self._work_of(places)
            if work.others:
                self._dense_engine.step(Share(work.others), coefficients)
            if not work.wide:
                return
            share = Share(work.wide)
            grads = self._refresh(work, share)
            self._low.refresh()
            of_lows, of_scaled = self._coefficients(coefficients)
            first = 0
            for portion in work.portions:
                own = grads[first : first + len(portion.places)]
                first += len(own)
                self._step(portion, own, coefficients, of_lows)
            del grads  # the launches are in the stream that will reuse their memory
            self._scaled_engine.step(share, of_scaled)

    def grad_sq(self, places: Share) -> float | Tensor:
        """As `optim.backend.Engine`."""
        with self._gpu.here():
            work = self._work_of(places)
            return features.summed(
                [
                    self._scaled_engine.grad_sq(Share(work.wide)),
                    self._dense_engine.grad_sq(Share(work.others)),
                ]
            )

    def _coefficients(
        self, coefficients: dict[int, float | Tensor]
    ) -> tuple[dict[int, float | Tensor], dict[int, float | Tensor]]:
        """What multiplies the gradients of projections and those of the weights.

        A step of the weights is as long as N is, whatever multiplies G: nothing does, unless G is
        conditioned, when P G has what multiplies it.
        """
        of_lows: dict[int, float | Tensor] = {}
        of_scaled: dict[int, float | Tensor] = {}
        for group, own in zip(self._optimizer.param_groups, self._low.param_groups, strict=True):
            of_lows[id(own)] = group["rank"] ** -0.5
            if is_conditioned(group):
                of_scaled[id(group)] = coefficients.get(id(group), 1.0)
            else:
                of_lows[id(own)] *= coefficients.get(id(group), 1.0)
        return of_lows, of_scaled

    def _step(
        self,
        portion: Portion,
        grads: list[Tensor],
        coefficients: dict[int, float | Tensor],
        of_lows: dict[int, float | Tensor],
    ) -> None:
        """From gradients to factors."""
        self._launch(portion, "draw", sum(portion.num_draws))
        num_parts = sum(portion.num_channels)
        if portion.kind.conditioned:
            for place, p, grad, low in zip(
                portion.places, portion.p, grads, portion.products, strict=True
            ):
                _, group, param = place
                c, state = coefficients.get(id(group), 1.0), self._optimizer.state[param]
                low.copy_(projected(place, grad, p.float(), c, state, CHUNK))
        else:
            if not portion.kind.few:
                for p, grad, low in zip(portion.p, grads, portion.products, strict=True):
                    multiply(p, channels(grad), low)
            self._launch(portion, "project", num_parts)
        portion.steps.zero_()
        self._low_engine.step(Share(portion.lows), of_lows)
        self._launch(portion, "lengths", num_parts)
        if portion.kind.whole:
            self._launch(portion, "whole", len(portion.places))

    def _launch(self, portion: Portion, use: str, grid: int) -> None:
        name = portion.names[use]
        kernel = self._gpu.load([name])[name]
        self._gpu.launch(kernel, grid, THREADS, 0, portion.table.data_ptr())

    def _refresh(self, work: _Portions, share: Share) -> list[Tensor]:
        """The gradients as they can be read, their addresses on the device."""
        grads = _readable(share)
        addresses = share.addresses[:, 1]
        if share.traits & (Trait.FOREIGN | Trait.SCATTERED):
            addresses = torch.tensor([grad.data_ptr() for grad in grads], device="cpu")
        if self._gpu.capturing():
            self._captured = True
            self._of_graphs[id(work)] = work
        if self._captured or not torch.equal(addresses, work.known):
            work.known = addresses.clone()
            work.grads.copy_(self._staging.readable(work.known), non_blocking=True)
        return grads

    def _work_of(self, places: Share) -> _Portions:
        """The portions of these parameters: kept from an earlier step where nothing that they
        depend on has changed since."""
        groups = [
            (id(g), *(g.get(name) for name in _SHAPING)) for g in self._optimizer.param_groups
        ]
        members, stamp = places.places.members, [groups, places.kinds]
        work = self._works.get(members)
        state = self._optimizer.state
        if work is None or work.stamp != stamp or not work.holds(state, work.asked):
            if work is not None:
                self._drop(members)
            with HOST:
                work = _Portions(self._optimizer, places.places, stamp)
                if work.wide:
                    self._make(work)
            count = sum(len(group["params"]) for group in self._optimizer.param_groups)
            self._drop(*superfluous(self._works, members, count))
            self._works[members] = work
        elif len(self._works) > 1:  # the oldest are first
            self._works[members] = self._works.pop(members)
        return work

    def _drop(self, *keys: tuple[int, ...]) -> None:
        for key in keys:
            for portion in self._works.pop(key).portions:
                for _, _, low in portion.lows:
                    self._low.drop(low)

    def _make(self, work: _Portions) -> None:
        """Fill in the portions, and put the parameters into their order."""
        by_kind: dict[ProjectedKind, list[Place]] = {}
        for place, grad in zip(work.wide, Share(work.wide).grads, strict=True):
            dtype = grad.dtype if grad.dtype in plan.DTYPES else torch.float32  # as _readable
            by_kind.setdefault(kind_of(place, dtype), []).append(place)
        self._gpu.load(name for kind in by_kind for name in kind.kernels().values())
        for kind, members in by_kind.items():
            sizes = [(place, Portion.bytes_of(place, kind)) for place in members]
            work.portions += [Portion(kind, some) for some in buckets(sizes, SCRATCH_BYTES)]
        work.wide = Places(place for portion in work.portions for place in portion.places)
        need = max(portion.num_bytes for portion in work.portions)
        if need > self._scratch.numel():
            self._drop(*self._works)  # they point into the old one
            self._scratch = torch.empty(need, dtype=torch.uint8, device=self._device)
        work.grads = torch.empty(len(work.wide), dtype=torch.int64, device=self._device)
        self._low_engine.copies = max(self._low_engine.copies, len(work.portions))
        first = 0
        for portion in work.portions:
            factors = [self._scaled.factors_of(place) for place in portion.places]
            portion.lay_out(self._scratch, self._low)
            portion.send(factors, work.grads.data_ptr() + 8 * first)
            first += len(portion.places)


def multiply(p: Tensor, g: Tensor, out: Tensor) -> None:
    """out fp32 (r, L) = p (r, D) g (D, L), which have one dtype, in fp32 sums."""
    if p.dtype is torch.float32:
        torch.mm(p, g, out=out)
    elif _WIDENS and p.is_cuda:
        torch.mm(p, g, out_dtype=torch.float32, out=out)
    else:
        width, p = max(1, CHUNK // g.shape[0]), p.float()
        for at in range(0, g.shape[1], width):
            span = slice(at, at + width)
            torch.matmul(p, g[:, span].float(), out=out[:, span])


def _readable(share: Share) -> list[Tensor]:
    """Gradients in a dtype and an order that the kernels know."""
    grads = share.grads
    if Trait.FOREIGN in share.traits:
        grads = [grad if grad.dtype in plan.DTYPES else grad.float() for grad in grads]
    if Trait.SCATTERED in share.traits:
        grads = [grad.contiguous() for grad in grads]
    return grads
