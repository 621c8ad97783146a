"""What engines share that step matrices indirectly, by two ordinary steps: one of stand-ins, from
zero with a learning rate of -1, whose "weights" so become a step; and, once something has been made
of that, one of the weights.  Other tensors are stepped directly.

Stand-ins share one scratch, so they are processed in portions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from optim.engine import HOST, Work, checked_state, storing, superfluous
from optim.interface import Engine, Owner, RuledOwner
from optim.share import Place, Places, Share
from optim.standins import LowSteps, ScaledSteps

Make = Callable[[Owner, str], Engine]  # (owner, rule) -> the engine that runs it on its tensors
Parted = Callable[[Iterable[Place]], tuple[Places, Places]]


class Portions(Work):
    """The matrices of a set of parameters, in portions, and the other tensors."""

    def __init__(
        self, optimizer: RuledOwner, places: Places, stamp: list[Any], parted: Parted
    ) -> None:
        self.wide, self.others = parted(places)
        states = [checked_state(optimizer, *place) for place in self.wide]
        super().__init__(places, stamp, states)
        self.asked = self.wide.params  # in the order of `states`
        self.portions: list[Any] = []  # each has `places`, and as `lows` their stand-ins
        self.grads = torch.empty(0, dtype=torch.int64, device=HOST)  # addresses, for engines
        self.known = self.grads  # the same, on the host


class IndirectEngine(ABC):
    """Steps an optimizer's parameters, with engines from `make(owner, rule)`: for the rule `dense`
    of other tensors, for `low` of stand-ins, and for "scaled" of the weights."""

    # The options that a portion depends on, besides the tensors' shapes and storage.
    shaping: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        optimizer: RuledOwner,
        dense: str,
        low: tuple[LowSteps, str],
        scaled: ScaledSteps,
        make: Make,
        device: torch.device,
    ) -> None:
        self._optimizer, self._device = optimizer, device
        self._low, self._scaled = low[0], scaled
        self._dense_engine = make(optimizer, dense)
        self._low_engine: Any = make(*low)
        self._scaled_engine = make(scaled, "scaled")
        self._works: dict[tuple[int, ...], Portions] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)

    @abstractmethod
    def _parted(self, places: Iterable[Place]) -> tuple[Places, Places]:
        """The parameters that are stepped indirectly, and the others."""

    @abstractmethod
    def _make(self, work: Portions) -> None:
        """Fill in the portions, and sort the parameters into their order."""

    def _work_of(self, share: Share) -> Portions:
        """The portions of these parameters, reused from an earlier step if nothing that they depend
        on has changed since."""
        groups = [(*storing(group), *map(group.get, self.shaping)) for group in share.groups]
        members, stamp = share.members, [groups, share.kinds]
        work = self._works.get(members)
        state = self._optimizer.state
        if work is None or work.stamp != stamp or not work.holds(state, work.asked):
            self._low_engine.before_making()
            if work is not None:
                self._drop(members)
            with HOST:
                work = Portions(self._optimizer, share.places, stamp, self._parted)
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

    def _reserve(self, num_bytes: int) -> None:
        """Have a scratch of this size at least."""
        if num_bytes > self._scratch.numel():
            self._drop(*self._works)  # they point into the old one
            self._scratch = self._scratch.new_empty(0)  # so that there are never two
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
