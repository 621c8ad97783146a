"""Stand-ins for an optimizer, for the engines that step APOLLO's and Muon's matrices in two steps.

An engine asks an optimizer for groups, codecs and state.  `LowSteps` gives it other tensors (a
projection) instead of the parameters, and `ScaledSteps` factors instead of the moments.
"""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from optim.codecs import Codec, Given
from optim.features import DEFAULTS
from optim.interface import RuledOwner
from optim.projection import matrix_sides
from optim.share import Place, Places

# The shared options of its group that a stand-in's step keeps (how moments are stored, above
# all); `_BARE` resets the others: no feature applies.
_KEPT = ("storage", "factor_1d", "on_nonfinite", "seed", "backend")
_BARE: dict[str, Any] = {
    **{name: default for name, default in DEFAULTS.items() if name not in _KEPT},
    **{"lr": -1.0, "weight_decay": 0.0, "rounding": "nearest", "clip_threshold": None},
}


class LowSteps:
    """The optimizer for the engine that steps other tensors instead of parameters, from zero with a
    learning rate of -1; of the features, only those in `kept` apply."""

    shared: tuple[str, ...] = ()

    def __init__(self, optimizer: RuledOwner, kept: tuple[str, ...] = ()) -> None:
        self._optimizer = optimizer
        self._bare = {name: x for name, x in _BARE.items() if name not in kept}
        self._groups = {id(group): dict(group) for group in optimizer.param_groups}
        self.param_groups = list(self._groups.values())
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._places: dict[Tensor, Place] = {}
        self._unread: dict[int, Tensor] = {}  # counts of unusable elements, which nobody reads

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Copy the current options of these groups."""
        for group in groups:
            bare = {name: x for name, x in self._bare.items() if name in group}
            self.group_of(group).update(group | bare)

    def adopt(self, place: Place, low: Tensor) -> Place:
        """Let a tensor, of the shape of the moments, stand in for a parameter, with these and its
        step count."""
        index, group, param = place
        state = self._optimizer.state_of(param, group)
        moments = {k: x for k, x in state.items() if k == "step" or k.startswith("exp_avg")}
        unread = self._unread.get(index)
        if unread is None or unread.device != param.device:
            unread = torch.zeros((), dtype=torch.int64, device=param.device)
        self._unread[index] = unread
        self.state[low] = {"nonfinite": unread} | moments
        self._places[low] = place
        return index, self.group_of(group), low

    def drop(self, low: Tensor) -> None:
        """Forget a tensor, and release its memory."""
        del self.state[low], self._places[low]
        low.grad, low.data = None, low.data.new_empty(0)

    def group_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options for the stand-ins of a group's parameters."""
        return self._groups[id(group)]

    def codecs(self, low: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """The codecs of the parameter's moments."""
        _, own, param = self._places[low]
        return self._optimizer.moments(param, own)

    def compensates(self, low: Tensor, group: dict[str, Any]) -> bool:
        """No: a stand-in is not a weight."""
        return False

    def state_of(self, low: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's moments and step count."""
        return self.state[low]

    def check_state(self, index: int, group: dict[str, Any], low: Tensor) -> None:
        """Raise ValueError where the parameter's state is not what its options ask for."""
        self._optimizer.check_state(*self._places[low])


class ScaledSteps:
    """The optimizer for the engine that steps weights along the gradient, scaled by channel."""

    shared: tuple[str, ...] = ()

    def __init__(self, optimizer: RuledOwner) -> None:
        self._optimizer = optimizer
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._factors: dict[int, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self._optimizer.param_groups

    def factors_of(self, place: Place) -> Tensor:
        """The tensor for the factors of a parameter's channels: fp32 (L,)."""
        index, group, param = place
        length = matrix_sides(tuple(param.shape))[1]
        factors = self._factors.get(index)
        if factors is None or factors.device != param.device or factors.numel() != length:
            factors = torch.zeros(length, dtype=torch.float32, device=param.device)
            self._factors[index] = factors
        state = self._optimizer.state_of(param, group)
        kept = {k: x for k, x in state.items() if not k.startswith("exp_avg")}
        side = "row" if param.shape[0] >= prod(param.shape[1:]) else "col"
        self.state[param] = kept | {f"scales.{side}": factors}
        return factors

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """The factors, instead of the moments."""
        shape = tuple(param.shape)
        codecs = self._optimizer.codecs(param, group)
        others = {k: codec for k, codec in codecs.items() if not k.startswith("exp_avg")}
        return {"scales": Given(shape, (shape[0], prod(shape[1:])))} | others

    def compensates(self, param: Tensor, group: dict[str, Any]) -> bool:
        """As the optimizer."""
        return self._optimizer.compensates(param, group)

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state without its moments, and the factors."""
        return self.state[param]

    def check_state(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """Raise ValueError where the parameter's state is not what its options ask for."""
        self._optimizer.check_state(index, group, param)


class DirectedSteps(ScaledSteps):
    """The same for steps along given directions instead of gradients: nothing clips them."""

    def __init__(self, optimizer: RuledOwner) -> None:
        super().__init__(optimizer)
        self._groups = {id(group): dict(group) for group in optimizer.param_groups}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, without a clip."""
        return list(self._groups.values())

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Copy the current options of these groups."""
        for group in groups:
            self._groups[id(group)].update(group | {"grad_clip": None})

    def places_of(self, places: Iterable[Place]) -> Places:
        """The same parameters with these groups."""
        return Places((index, self._groups[id(group)], param) for index, group, param in places)
