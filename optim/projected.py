"""How the fused engines step APOLLO: two ordinary steps, one of projections and one of weights.

The projection P G (r, L) of a matrix gradient is a parameter of its own to an engine: Adam or
Adafactor steps it from zero with a learning rate of -1, so that what its "weight" becomes is the
step N.  The ratio of the lengths of N and P G is a number for each channel, and with these the
engine steps the weights along G itself (the rule "scaled").  What is not projected is stepped by
Adam or Adafactor as it is.

Tensors of one kind make portions, whose P, P G and N share one scratch that every portion uses
anew.  Steps of a portion: P is drawn from step counts; P G is computed; an engine steps it; and
factors are made of what came of it.  This is what all devices do, and a CPU's way;
`optim/projected_cuda.py` is a GPU's.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optim import features, native, plan
from optim.conditioned import conditioned_product
from optim.engine import HOST, Work, buckets, checked_state, storing, superfluous
from optim.interface import Engine, Owner, RuledOwner
from optim.portion import Portion, ProjectedKind, is_conditioned, kind_of
from optim.projection import parted
from optim.share import Place, Places, Share, Trait
from optim.standins import LowSteps, ScaledSteps

Make = Callable[[Owner, str], Engine]  # (owner, rule) -> what steps its tensors by the rule

# Bytes of P, P G and N that are alive at once on a CPU, unless a single tensor has more.
SCRATCH_BYTES = 32 << 20
# What a portion is made of, besides the tensors' shapes.
_SHAPING = (
    "rank",
    "scale",
    "scaling",
    "update_gap",
    "projection",
    "seed",
    "orthograd",
    "grad_clip",
)


class Portions(Work):
    """The portions of a set of parameters, and what they were made from."""

    def __init__(self, optimizer: RuledOwner, places: Places, stamp: list[Any]) -> None:
        self.wide, self.others = parted(places)
        states = [checked_state(optimizer, *place) for place in self.wide]
        super().__init__(places, stamp, states)
        self.asked = self.wide.params  # in the order of `states`
        self.portions: list[Portion] = []
        self.grads = torch.empty(0, dtype=torch.int64, device=HOST)  # their addresses, for engines
        self.known = self.grads  # the same, on the host


class ProjectedEngine(ABC):
    """Steps the parameters of an APOLLO, by engines that `make(owner, rule)` gives for the steps of
    `dense` (a rule's name) and for "scaled".

    A subclass draws P, multiplies and measures, for a portion at a time.
    """

    def __init__(self, optimizer: RuledOwner, dense: str, make: Make, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._low, self._scaled = LowSteps(optimizer), ScaledSteps(optimizer)
        self._dense_engine = make(optimizer, dense)
        self._low_engine: Any = make(self._low, dense)
        self._scaled_engine = make(self._scaled, "scaled")
        self._works: dict[tuple[int, ...], Portions] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    def _here(self) -> contextlib.AbstractContextManager[Any]:
        """Where everything happens."""
        return contextlib.nullcontext()

    @abstractmethod
    def _scratch_bytes(self) -> int:
        """Of P, P G and N that are alive at once."""

    @abstractmethod
    def _p_dtype(self, grad_dtype: torch.dtype) -> torch.dtype:
        """What P is drawn in, to meet such gradients."""

    @abstractmethod
    def _before_making(self) -> None:
        """Raise RuntimeError where nothing can be made now."""

    @abstractmethod
    def _prepare(self, work: Portions, kinds: Iterable[ProjectedKind]) -> None:
        """What is left to do for a work whose portions are known."""

    @abstractmethod
    def _put(self, work: Portions, addresses: Tensor) -> None:
        """Take over the addresses of gradients, int64 (n,)."""

    @abstractmethod
    def _draw(self, portion: Portion) -> None:
        """P of every tensor."""

    @abstractmethod
    def _project(self, portion: Portion, grads: list[Tensor]) -> None:
        """P G of every tensor, NaN in a channel without a usable element."""

    @abstractmethod
    def _measure(self, portion: Portion) -> None:
        """Factors, from P G and N."""

    def step(self, places: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.interface.Engine`."""
        with self._here():
            work = self._work_of(places)
            if work.others:
                self._dense_engine.step(Share(work.others), coefficients)
            if not work.wide:
                return
            share = Share(work.wide)
            grads = share.readable_grads()
            addresses = share.addresses[:, 1]
            if share.traits & (Trait.FOREIGN | Trait.SCATTERED):
                addresses = torch.tensor([grad.data_ptr() for grad in grads], device="cpu")
            self._put(work, addresses)
            self._low.refresh(work.wide.groups)
            of_lows, of_scaled = self._coefficients(work.wide.groups, coefficients)
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
            del grads, own  # the launches are in the stream that will reuse their memory
            self._scaled_engine.step(share, of_scaled)

    def grad_sq(self, places: Share) -> float | Tensor:
        """As `optim.interface.Engine`."""
        with self._here():
            work = self._work_of(places)
            return features.total(
                [
                    self._scaled_engine.grad_sq(Share(work.wide)),
                    self._dense_engine.grad_sq(Share(work.others)),
                ]
            )

    def _coefficients(
        self, groups: list[dict[str, Any]], coefficients: dict[int, float | Tensor]
    ) -> tuple[dict[int, float | Tensor], dict[int, float | Tensor]]:
        """What multiplies the gradients of projections and those of the weights.

        A step of the weights is as long as N is, whatever multiplies G: nothing does, unless G is
        conditioned, when P G has what multiplies it.
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
            c, state = coefficients.get(id(group), 1.0), self._optimizer.state[param]
            low.copy_(conditioned_product(place, grad, p.float(), c, state))

    def _work_of(self, places: Share) -> Portions:
        """The portions of these parameters: kept from an earlier step where nothing that they
        depend on has changed since."""
        groups = [(*storing(group), *map(group.get, _SHAPING)) for group in places.places.groups]
        members, stamp = places.places.members, [groups, places.kinds]
        work = self._works.get(members)
        state = self._optimizer.state
        if work is None or work.stamp != stamp or not work.holds(state, work.asked):
            self._before_making()
            if work is not None:
                self._drop(members)
            with HOST:
                work = Portions(self._optimizer, places.places, stamp)
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

    def _make(self, work: Portions) -> None:
        """Fill in the portions, and put the parameters into their order."""
        by_kind: dict[ProjectedKind, list[Place]] = {}
        for place, grad in zip(work.wide, Share(work.wide).grads, strict=True):
            dtype = grad.dtype if grad.dtype in plan.DTYPES else torch.float32
            by_kind.setdefault(kind_of(place, dtype, self._p_dtype(dtype)), []).append(place)
        for kind, members in by_kind.items():
            sizes = [(place, Portion.bytes_of(place, kind)) for place in members]
            work.portions += [Portion(kind, some) for some in buckets(sizes, self._scratch_bytes())]
        work.wide = Places(place for portion in work.portions for place in portion.places)
        need = max(portion.num_bytes for portion in work.portions)
        if need > self._scratch.numel():
            self._drop(*self._works)  # they point into the old one
            self._scratch = torch.empty(need, dtype=torch.uint8, device=self._device)
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
        self._isa = native.isa()  # for good: portions have P in the dtype that it wants

    def _scratch_bytes(self) -> int:
        return SCRATCH_BYTES

    def _p_dtype(self, grad_dtype: torch.dtype) -> torch.dtype:
        pairs = grad_dtype is torch.bfloat16 and native.multiplies_pairs(self._isa)
        return torch.bfloat16 if pairs else torch.float32

    def _before_making(self) -> None:
        """Nothing: there is always memory to be had."""

    def _prepare(self, work: Portions, kinds: Iterable[ProjectedKind]) -> None:
        """Nothing: its loops are compiled."""

    def _put(self, work: Portions, addresses: Tensor) -> None:
        work.grads.copy_(addresses)

    def _draw(self, portion: Portion) -> None:
        self._run("draw", portion, sum(portion.num_draws))

    def _project(self, portion: Portion, grads: list[Tensor]) -> None:
        self._run("project", portion, sum(portion.num_channels))

    def _measure(self, portion: Portion) -> None:
        self._run("lengths", portion, sum(portion.num_channels))
        if portion.kind.whole:
            self._run("whole", portion, len(portion.places))

    def _run(self, use: str, portion: Portion, count: int) -> None:
        native.project(use, portion.table, count, self._isa)
