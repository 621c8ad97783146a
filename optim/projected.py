"""How the fused engines step APOLLO: two ordinary steps, one of projections and one of weights.

To an engine, the projection P G (r, L) of a matrix gradient is the gradient of a separate
parameter: Adam or Adafactor steps that from zero with a learning rate of -1, so that its "weight"
becomes the step N.  The ratio of the lengths of N and P G is a factor for each channel, and with
these the engine steps the weights along G itself (the rule "scaled").  Tensors that are not
projected are stepped by Adam or Adafactor directly.

Tensors of one kind form portions, which in turn use one scratch for P, P G and N.  For a portion,
P is drawn from step counts; P G is computed; an engine steps it; and the factors are computed from
P G and N.  Here is what all devices have in common, and the CPU's part; `optim/projected_cuda.py`
has the GPU's.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optim import features, native, plan
from optim.conditioned import conditioned_product
from optim.engine import buckets
from optim.indirect import IndirectEngine, Make, Portions
from optim.interface import RuledOwner
from optim.portion import SCRATCH_BYTES, Portion, ProjectedKind, is_conditioned, kind_of
from optim.projection import parted
from optim.share import Place, Places, Share, Trait
from optim.standins import LowSteps, ScaledSteps


class ProjectedEngine(IndirectEngine):
    """Steps the parameters of an APOLLO.

    A subclass draws P, multiplies and measures, one portion at a time.
    """

    shaping = (
        "rank",
        "scale",
        "scaling",
        "update_gap",
        "projection",
        "seed",
        "orthograd",
        "grad_clip",
    )

    def __init__(self, optimizer: RuledOwner, dense: str, make: Make, device: torch.device) -> None:
        low, scaled = LowSteps(optimizer), ScaledSteps(optimizer)
        super().__init__(optimizer, dense, (low, dense), scaled, make, device)

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        """A context that makes the device current."""
        return contextlib.nullcontext()

    @abstractmethod
    def _p_dtype(self, grad_dtype: torch.dtype) -> torch.dtype:
        """The dtype of P for gradients of this dtype."""

    @abstractmethod
    def _prepare(self, work: Portions, kinds: Iterable[ProjectedKind]) -> None:
        """Prepare a work whose portions are known: load the kernels of these kinds."""

    @abstractmethod
    def _put(self, work: Portions, addresses: Tensor) -> None:
        """Write the addresses of gradients, int64 (n,), to where engines read them."""

    @abstractmethod
    def _draw(self, portion: Portion) -> None:
        """Draw P of every tensor."""

    @abstractmethod
    def _project(self, portion: Portion, grads: list[Tensor]) -> None:
        """Compute P G of every tensor, NaN in a channel without a usable element."""

    @abstractmethod
    def _measure(self, portion: Portion) -> None:
        """Compute the factors from P G and N."""

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.interface.Engine`."""
        with self._here():
            work = self._work_of(share)
            wide = Share(work.wide)
            grads = wide.readable_grads()
            if work.wide:  # before anything is stepped: it may find no memory
                addresses = wide.addresses[:, 1]
                if wide.traits & (Trait.FOREIGN | Trait.SCATTERED):
                    addresses = torch.tensor([grad.data_ptr() for grad in grads], device="cpu")
                self._put(work, addresses)
            if work.others:
                self._dense_engine.step(Share(work.others), coefficients)
            if not work.wide:
                return
            self._low.refresh(wide.groups)
            of_lows, of_scaled = self._coefficients(wide.groups, coefficients)
            first = 0
            for portion in work.portions:
                own = grads[first : first + len(portion.places)]
                first += len(own)
                self._draw(portion)
                if portion.kind.conditioned:
                    self._project_conditioned(portion, own, coefficients)
                else:
                    self._project(portion, own)
                portion.steps.zero_()
                self._low_engine.step(Share(portion.lows), of_lows)
                self._measure(portion)
            del grads, own  # safe: the stream that reuses their memory runs the launches first
            self._scaled_engine.step(wide, of_scaled)

    def grad_sq(self, share: Share) -> float | Tensor:
        """As `optim.interface.Engine`."""
        with self._here():
            work = self._work_of(share)
            return features.total(
                [
                    self._scaled_engine.grad_sq(Share(work.wide)),
                    self._dense_engine.grad_sq(Share(work.others)),
                ]
            )

    def _coefficients(
        self, groups: list[dict[str, Any]], coefficients: dict[int, float | Tensor]
    ) -> tuple[dict[int, float | Tensor], dict[int, float | Tensor]]:
        """The coefficients for gradients of projections and for those of weights.

        Weights are stepped by G times |N| / |P G|, so G has the coefficient only where the stored
        P G has it: if G is conditioned.  Otherwise it is applied to P G as it is stepped.
        """
        of_lows: dict[int, float | Tensor] = {}
        of_scaled: dict[int, float | Tensor] = {}
        for group in groups:
            own = self._low.group_of(group)
            of_lows[id(own)] = group["rank"] ** -0.5
            if is_conditioned(group):
                of_scaled[id(group)] = coefficients.get(id(group), 1.0)
            else:
                of_lows[id(own)] *= coefficients.get(id(group), 1.0)
        return of_lows, of_scaled

    def _project_conditioned(
        self, portion: Portion, grads: list[Tensor], coefficients: dict[int, float | Tensor]
    ) -> None:
        for place, p, grad, low in zip(
            portion.places, portion.p, grads, portion.products, strict=True
        ):
            _, group, param = place
            c, kept = coefficients.get(id(group), 1.0), self._optimizer.state[param]
            lost = kept["compensation"] if self._optimizer.compensates(param, group) else None
            low.copy_(conditioned_product(place, grad, p.float(), c, lost))

    def _parted(self, places: Iterable[Place]) -> tuple[Places, Places]:
        return parted(places)

    def _make(self, work: Portions) -> None:
        by_kind: dict[ProjectedKind, list[Place]] = {}
        for place, grad in zip(work.wide, Share(work.wide).grads, strict=True):
            dtype = grad.dtype if grad.dtype in plan.DTYPES else torch.float32
            by_kind.setdefault(kind_of(place, dtype, self._p_dtype(dtype)), []).append(place)
        limit = SCRATCH_BYTES[self._device.type]
        for kind, members in by_kind.items():
            sizes = [(place, Portion.bytes_of(place, kind)) for place in members]
            work.portions += [Portion(kind, some) for some in buckets(sizes, limit)]
        work.wide = Places(place for portion in work.portions for place in portion.places)
        self._reserve(max(portion.num_bytes for portion in work.portions))
        work.grads = torch.empty(len(work.wide), dtype=torch.int64, device=self._device)
        self._prepare(work, by_kind)
        first = 0
        for portion in work.portions:
            factors = [self._scaled.factors_of(place) for place in portion.places]
            portion.lay_out(self._scratch, self._low)
            portion.send(factors, work.grads.data_ptr() + 8 * first)
            first += len(portion.places)


class NativeProjectedEngine(ProjectedEngine):
    """On a CPU, by the loops of `csrc/engine/projected_cpu.h`."""

    def __init__(self, optimizer: RuledOwner, dense: str, make: Make, device: torch.device) -> None:
        super().__init__(optimizer, dense, make, device)
        self._isa = native.isa()  # fixed: it determines the dtype of P in portions

    def _p_dtype(self, grad_dtype: torch.dtype) -> torch.dtype:
        pairs = grad_dtype is torch.bfloat16 and native.multiplies_pairs(self._isa)
        return torch.bfloat16 if pairs else torch.float32

    def _prepare(self, work: Portions, kinds: Iterable[ProjectedKind]) -> None:
        """Nothing: its loops are compiled already."""

    def _put(self, work: Portions, addresses: Tensor) -> None:
        work.grads.copy_(addresses)

    def _draw(self, portion: Portion) -> None:
        self._run("draw", portion, sum(portion.num_draws))

    def _project(self, portion: Portion, grads: list[Tensor]) -> None:
        self._run("project", portion, sum(portion.num_channels))

    def _measure(self, portion: Portion) -> None:
        self._run("lengths", portion, sum(portion.num_channels))
        if portion.kind.per_tensor:
            self._run("whole", portion, len(portion.places))

    def _run(self, use: str, portion: Portion, count: int) -> None:
        native.project(use, portion.table, count, self._isa)
