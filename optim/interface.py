"""The interfaces between engines and the owners of the parameters that they step.

An owner is an optimizer, or a stand-in for one (`optim/standins.py`).  What the methods of an owner
do is said where the optimizer has them (`optim/base.py`).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor

from optim.codecs import Codec
from optim.share import Share


class Engine(Protocol):
    """Steps parameters of one owner; every engine computes the same."""

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        """One step of these parameters, which have gradients; `coefficients` maps the id of a group
        to the factor of its gradients (1 if absent)."""

    def grad_sq(self, share: Share) -> float | Tensor:
        """The sum of the squares of the usable elements of these parameters' gradients; a 0-d fp64
        tensor on their device if reading it would mean waiting."""


class InBackward(Protocol):
    """Steps an optimizer inside the backward pass (`optim/backward.py`)."""

    def attach(self) -> None:
        """Hook the optimizer's current parameters."""

    def check_unchanged(self) -> None:
        """Raise RuntimeError if some gradients were changed after others had been stepped."""

    def end_round(self) -> None:
        """Start a new round: the gradients of the last one are used or cleared."""


class Owner(Protocol):
    """What an engine that steps by descriptors needs from the owner of its parameters."""

    @property
    def shared(self) -> tuple[str, ...]:
        """The group keys of tensors that all groups share."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's: options, and the parameters under "params"."""

    @property
    def state(self) -> dict[Tensor, Any]:
        """As torch's: for each parameter its tensors, by name."""

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]: ...

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]: ...

    def compensates(self, param: Tensor, group: dict[str, Any]) -> bool: ...

    def check_state(self, index: int, group: dict[str, Any], param: Tensor) -> None: ...


class RuledOwner(Owner, Protocol):
    """An owner that has a rule: an optimizer."""

    rule: ClassVar[Callable[..., Any]]  # of optim/reference.py
    backend: str  # "native" or "torch"

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]: ...

    def layout(self, param: Tensor, group: dict[str, Any]) -> tuple[int, int]: ...
