"""What engines and whoever owns the parameters that they step ask of each other.

An owner is an optimizer, or what stands for one (`optim/standins.py`).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from optim.codecs import Codec
from optim.share import Share


class Engine(Protocol):
    """Steps parameters of one owner; every engine computes the same."""

    def step(self, places: Share, coefficients: dict[int, float | Tensor]) -> None:
        """One step of these parameters, which have gradients; `coefficients` holds, by the id of a
        group, what its gradients are multiplied by (1 where it is absent)."""

    def grad_sq(self, places: Share) -> float | Tensor:
        """The sum of the squares of the usable elements of these parameters' gradients; 0-d fp64
        on their device where reading it would mean waiting for it."""


class InBackward(Protocol):
    """Steps an optimizer inside the backward pass (`optim/backward.py`)."""

    def attach(self) -> None:
        """Take over the parameters that there are now."""

    def check_unchanged(self) -> None:
        """Raise RuntimeError where a part of the gradients was changed, and another was stepped as
        it came."""

    def end_round(self) -> None:
        """Begin anew: the gradients so far are gone."""


class Owner(Protocol):
    """What an engine asks that steps by descriptors."""

    @property
    def shared(self) -> tuple[str, ...]:
        """State of all groups together: group keys of tensors."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """torch's: options, and under "params" the parameters."""

    @property
    def state(self) -> dict[Tensor, Any]:
        """torch's: by parameter, tensors by their names."""

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How each moment of a parameter is stored, and what features keep besides."""

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """A parameter's state, allocated when there is none yet."""

    def check_state(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """Raise ValueError where a parameter's state is not what its group's options ask for."""


class RuledOwner(Owner, Protocol):
    """What is asked besides of an optimizer, which has a rule."""

    rule: ClassVar[Callable[..., Any]]  # of optim/reference.py
    backend: str  # "native" or "torch"

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How each moment of a parameter is stored."""

    def layout(self, param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        """The (R, C) matrix by which the draws of a parameter's rounding are addressed."""

    def rate(self, h: SimpleNamespace) -> float | Tensor:
        """What updates and decay are multiplied by."""
