"""The parameters of a step, and the properties of them and their gradients that it needs.

A UNet has 1680 parameters.  Reading one property of all of them in Python takes 0.1 ms or more, and
a step needs a dozen: address, size, dtype and contiguity of each weight and each gradient.  So all
are read in one pass, in `csrc/survey.h` if torch has an interface for that; and again at every
step, as they may have changed.
"""

from array import array
from collections.abc import Iterable, Iterator
from enum import IntFlag
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor

from optim import compiled

Place = tuple[int, dict[str, Any], Tensor]  # a parameter with its index and its group

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters
_native = compiled.module
_EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # of torch 2.10 and later


class Trait(IntFlag):
    """What holds for some parameter or gradient of a share (`Trait` in `csrc/survey.h`)."""

    MISSING = 1  # a parameter has no gradient
    SCATTERED = 2  # a tensor is not contiguous, or has its negative bit set (torch.conj)
    ELSEWHERE = 4  # a tensor is not on the CPU
    FOREIGN = 8  # a tensor has a dtype that parameters cannot have
    SPARSE = 16  # a gradient is sparse
    MISSHAPEN = 32  # a gradient has another shape than its parameter
    HIDDEN = 64  # a tensor has no memory of its own: a subclass holds others, or it has no data


class Places(list[Place]):
    """Parameters in order; the list is not changed once it is complete."""

    @cached_property
    def params(self) -> list[Tensor]:
        return [param for _, _, param in self]

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The parameters' indices."""
        return tuple([index for index, _, _ in self])

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """The groups that they belong to, each once."""
        return list({id(group): group for _, group, _ in self}.values())


class Share:
    """Parameters that are stepped together, as they and their gradients are now.

    `kinds` are their properties without the addresses: equal for two shares of the same parameters
    if no size, dtype, device or contiguity has changed.  `addresses` are int64 (n, 2), of each
    parameter and its gradient.  If `traits` has MISSING, SPARSE or MISSHAPEN, no other attribute is
    reliable.
    """

    def __init__(self, places: Places, grads: list[Tensor] | None = None) -> None:
        """`grads` replaces the parameters' own gradients."""
        self.places = places
        self.params: list[Any] = places.params
        self.grads: list[Any]
        own = _native is not None and grads is None
        seen = _native.parameters(self.params, _EXCHANGE) if own else None
        self.grads, self.kinds, addresses, traits = seen or seen_in_python(self.params, grads)
        self.addresses = pairs(addresses)
        self.traits = Trait(traits)

    @property
    def members(self) -> tuple[int, ...]:
        """The parameters' indices."""
        return self.places.members

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups that the parameters belong to, each once."""
        return self.places.groups

    def readable_grads(self) -> list[Tensor]:
        """The gradients, contiguous and in a dtype that engines know."""
        grads = self.grads
        if Trait.FOREIGN in self.traits:
            grads = [grad if grad.dtype in DTYPES else grad.float() for grad in grads]
        if Trait.SCATTERED in self.traits:
            grads = [grad.contiguous().resolve_neg() for grad in grads]
        return grads

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Place]:
        return iter(self.places)


def pairs(addresses: array | bytearray) -> Tensor:
    """Addresses of a parameter, its gradient, the next parameter, ...: -> int64 (n, 2)."""
    if not addresses:
        return torch.empty((0, 2), dtype=torch.int64, device="cpu")
    return torch.frombuffer(addresses, dtype=torch.int64).view(-1, 2)


def addresses_of(params: Iterable[Tensor], grads: Iterable[Tensor]) -> array:
    """The addresses, in the order that `pairs` takes."""
    return array("q", [x.data_ptr() for both in zip(params, grads, strict=True) for x in both])


def where(tensors: list[Tensor]) -> bytes:
    """The addresses of tensors, int64 each."""
    seen = _native.addresses(tensors, _EXCHANGE) if _native else None
    return seen or array("q", [x.data_ptr() for x in tensors]).tobytes()


def seen_in_python(
    params: list[Tensor], grads: list[Any] | None = None
) -> tuple[list[Any], Any, array, Trait]:
    """What `_native.parameters` returns, for tensors of any kind: gradients (the parameters' own,
    if none are given), kinds, addresses and traits."""
    grads = [param.grad for param in params] if grads is None else grads
    if any([grad is None for grad in grads]):
        return grads, None, array("q"), Trait.MISSING
    if not all([grad.layout is torch.strided for grad in grads]):
        return grads, None, array("q"), Trait.SPARSE
    if [param.shape for param in params] != [grad.shape for grad in grads]:
        return grads, None, array("q"), Trait.MISSHAPEN
    # A list for each property: several times faster than one loop over all of them.
    both = params + grads
    numels, dtypes = [x.numel() for x in both], [x.dtype for x in both]
    devices, contiguous = [x.device.type for x in both], [x.is_contiguous() for x in both]
    traits = Trait(0)
    if not all(contiguous) or any([grad.is_neg() for grad in grads]):
        traits |= Trait.SCATTERED
    if set(devices) - {"cpu"}:
        traits |= Trait.ELSEWHERE
    if not set(DTYPES) >= set(dtypes):
        traits |= Trait.FOREIGN
    addresses = addresses_of(params, grads)
    if not all(addresses) and any(x.numel() and not x.data_ptr() for x in both):
        traits |= Trait.HIDDEN
    return grads, (numels, dtypes, devices, contiguous), addresses, traits


def same_objects_in_python(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def same_state_in_python(
    state: dict[Tensor, dict[str, Tensor]],
    params: list[Tensor],
    parts: list[Tensor],
    counts: bytes,
) -> bool:
    """Whether `state` holds the same tensor objects as `parts` for these parameters: those of all
    parameters in order, with their int32 numbers in `counts`."""
    states = [state.get(param, {}) for param in params]
    return array("i", map(len, states)).tobytes() == counts and same_objects_in_python(
        [x for each in states for x in each.values()], parts
    )


same_objects = _native.same_objects if _native else same_objects_in_python
same_state = _native.same_state if _native else same_state_in_python
