"""What the fused engines share: the descriptors of an optimizer's parameters, kept up to date.

An engine works on addresses (`optim/plan.py`), and between two steps the user may change anything:
replace a state, a parameter, a dtype.  So what a descriptor was built from is checked before every
step, and the descriptor is rebuilt when it has changed.  One exception is too slow to check at
once: state tensors moved in place, one here and there (`Work.holds`).
"""

import ctypes
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from optim import plan
from optim.codecs import Factored, FactoredSign, layout, salts, split
from optim.interface import Owner
from optim.share import Places, Share, Trait, addresses_of, pairs, same_state, where

Descriptors = ctypes.Array[plan.Descriptor]
Member = TypeVar("Member")

_KEPT = 8  # most works per parameter, on average
_ASKED = 256  # state tensors whose addresses are checked in a step
# The options of a group that determine its moments, their storage, and its kernels.
_SHAPING = ("storage", "factor_1d", "clip_norm", "rounding", "slice_p")
# Of these it only matters whether they are none or zero: a schedule may change their values.
_PRESENT = ("momentum", "beta1", "growth_limit", "clip_threshold")
# Addresses in a descriptor and in its samples that are called what they are in a state.
_OF_TENSOR = ("step", "nonfinite", "compensation", "update_norm", "update_rms")
_OF_SAMPLES = ("start", "numerator", "denominator", "weight_sum")
HOST = torch.device("cpu")  # a context: tables are on the host whatever torch's default device
_WORDS = ctypes.sizeof(plan.Descriptor) // 8
ADDRESSES = slice(plan.Descriptor.weight.offset // 8, plan.Descriptor.grad.offset // 8 + 1)


class Work:
    """The launches of a set of parameters, and what they were made from."""

    def __init__(self, places: Places, stamp: list[Any], states: list[dict[str, Tensor]]) -> None:
        self.members, self.stamp = torch.tensor(places.members), stamp
        self.launches: list[Any] = []  # filled in by the engine
        self.groups: list[int] = []  # the numbers of the members' groups
        self.on_device = self.members
        words = torch.arange(ADDRESSES.start, ADDRESSES.stop)
        self.addresses = self.members[:, None] * _WORDS + words  # their positions in the table
        self._parts = list(chain.from_iterable(state.values() for state in states))
        self._counts = array("i", map(len, states)).tobytes()
        starts = range(0, max(len(self._parts), 1), _ASKED)
        self._samples = [self._parts[start : start + _ASKED] for start in starts]
        self._addresses = [where(sample) for sample in self._samples]
        # Memory that is written through an address stays alive as long as the address is kept.
        self._storages = [x.untyped_storage() for x in self._parts]
        self._turn = 0
        # A vector's elements are the same in any shape.
        self._matrices = [param for param in places.params if param.ndim > 1]
        self._shapes = [param.shape for param in self._matrices]

    def holds(self, state: dict[Tensor, dict[str, Tensor]], params: list[Tensor]) -> bool:
        """Whether these parameters still have the shapes, and their state the tensors at the
        addresses, that the work was made from.

        A UNet's optimizer has nine thousand state tensors, too many to read every address at every
        step: it would take up to twice as long, where tensors are tiny.  So all are checked for
        being the same objects, and the addresses of _ASKED consecutive ones, in rotation: a move by
        assigning to `.data`, or by `set_()`, of all states or of one moment of each parameter, is
        detected at once; that of a single tensor within as many steps as there are samples, and
        until then the old memory, which is kept, is used.
        """
        if not same_state(state, params, self._parts, self._counts):
            return False
        if [param.shape for param in self._matrices] != self._shapes:
            return False
        self._turn = (self._turn + 1) % len(self._samples)
        return where(self._samples[self._turn]) == self._addresses[self._turn]


class DescriptorEngine:
    """Steps parameters of one owner by launches over descriptors.

    A subclass makes the launches of a set of parameters (`_make`), takes over their addresses
    (`_put`), and runs them (`step`, `grad_sq`).
    """

    def __init__(self, owner: Owner, rule: str) -> None:
        """`rule` is what to compute: the optimizer's own rule, or another that it uses."""
        self._owner, self._rule = owner, rule
        count = sum(len(group["params"]) for group in owner.param_groups)
        self._descriptors: Descriptors = (plan.Descriptor * count)()
        self._words = torch.frombuffer(self._descriptors, dtype=torch.int64).view(count, _WORDS)
        self._params: list[Tensor | None] = [None] * count
        self._numels = [-1] * count
        self._work: dict[tuple[int, ...], Work] = {}

    def before_making(self) -> None:
        """Raise RuntimeError if no work can be made now (during a graph capture)."""

    def _make(self, work: Work, share: Share) -> None:
        """Fill in the launches of a new work; its descriptors only lack addresses."""
        raise NotImplementedError

    def _groups(self, work: Work, device: torch.device) -> list[tuple[int, int, dict[str, Any]]]:
        """The groups of a work's members, as (number, id, group), with the tensors that all groups
        share copied to this device."""
        groups, shared = self._owner.param_groups, self._owner.shared
        found = []
        for number in work.groups:
            group = groups[number]
            if any(group[name].device != device for name in shared):
                group = group | {name: group[name].to(device) for name in shared}
            found.append((number, id(groups[number]), group))
        return found

    def _put(self, work: Work, addresses: Tensor) -> None:
        """Write the members' addresses, int64 (n, 2) of weight and gradient, to the descriptors."""
        self._words.view(-1)[work.addresses] = addresses

    def _refresh(
        self, share: Share
    ) -> tuple[Work, list[tuple[Tensor, Tensor]], tuple[list[Tensor], list[Tensor]]]:
        """Write the addresses of this step's weights and gradients into the descriptors.

        Returns the work of these parameters; the weights that are not contiguous, each with the
        contiguous copy to be copied back; and the tensors to keep alive until the launch is over,
        but no longer: a fused backward is about to free its gradients.
        """
        weights, grads, addresses = share.params, share.readable_grads(), share.addresses
        work = self._work_of(share, grads)
        copies: list[tuple[Tensor, Tensor]] = []
        if Trait.SCATTERED in share.traits:
            readable = [weight.contiguous() for weight in weights]
            copies = [(w, r) for w, r in zip(weights, readable, strict=True) if r is not w]
            weights = readable
        if share.traits & (Trait.FOREIGN | Trait.SCATTERED):
            addresses = pairs(addresses_of(weights, grads))
        if len(share):
            self._put(work, addresses)
        return work, copies, (weights, grads)

    def _write_back(self, share: Share, copies: list[tuple[Tensor, Tensor]]) -> None:
        """After the launches: copy weights back, and tell autograd that they have changed, so that
        a backward pass that needs the old ones fails."""
        for weight, copy in copies:
            weight.copy_(copy)
        if self._rule != plan.ESTIMATE:
            torch.autograd.graph.increment_version(share.params)

    def _work_of(self, share: Share, grads: list[Tensor]) -> Work:
        """The work of these parameters, reused from an earlier step if nothing that its descriptors
        depend on has changed since."""
        members, stamp = share.members, self._stamp(share)
        state = self._owner.state
        work = self._work.get(members)
        if work is None or work.stamp != stamp or not work.holds(state, share.params):
            self.before_making()
            with HOST:
                for place, grad in zip(share, grads, strict=True):
                    if self._describe(*place, grad.dtype):  # other works used the old one
                        self._drop([key for key in self._work if place[0] in key])
                work = Work(share.places, stamp, [state[param] for param in share.params])
                work.groups = sorted({self._descriptors[i].group for i in share.members})
                self._make(work, share)
            self._drop(superfluous(self._work, members, len(self._params)))
            self._work[members] = work
        elif len(self._work) > 1:  # the oldest are first
            self._work[members] = self._work.pop(members)
        return work

    def _stamp(self, share: Share) -> list[Any]:
        """What the descriptors of these parameters depend on, apart from their state: their groups,
        how these store moments, and the kinds of weights and gradients.  (The optimizer watches the
        set of parameters itself: it drops this engine when that changes.)"""
        return [[storing(group) for group in share.groups], share.kinds]

    def _drop(self, keys: list[tuple[int, ...]]) -> None:
        for key in keys:
            self._work.pop(key, None)

    def _describe(
        self, index: int, group: dict[str, Any], param: Tensor, grad_dtype: torch.dtype
    ) -> bool:
        """Fill in the descriptor of one parameter, allocating its state if there is none: ->
        whether this replaced a different descriptor."""
        if self._params[index] is param and self._numels[index] != param.numel():
            raise ValueError(
                f"parameter {index} has {param.numel()} elements now and had "
                f"{self._numels[index]} when its state was made; build a new optimizer"
            )
        owner = self._owner
        codecs, state = owner.codecs(param, group), checked_state(owner, index, group, param)
        rows, cols = plan.matrix_of(layout(codecs.values(), tuple(param.shape)))
        d = self._descriptors[index]
        before = bytes(d) if self._params[index] is not None else None
        d.moments, d.samples.sum = (plan.Moment * plan.NUM_SLOTS)(), plan.Moment()
        d.index, d.numel, d.rows, d.cols = index, param.numel(), rows, cols
        d.weight_dtype = plan.DTYPES[param.dtype]
        d.grad_dtype = plan.DTYPES[grad_dtype]
        d.group = next(i for i, g in enumerate(owner.param_groups) if g is group)
        # A state may hold more than the options need now: of one that was switched off.
        used = {"step", "nonfinite", *codecs}
        if owner.compensates(param, group):
            used.add("compensation")
        for name in _OF_TENSOR:
            setattr(d, name, state[name].data_ptr() if name in used else 0)
        for name in _OF_SAMPLES:
            setattr(d.samples, name, state[name].data_ptr() if name in used else 0)
        vectors = partials = 0
        for name, salt in salts(codecs).items():
            codec = codecs[name]
            if name == "grad_sum":
                d.samples.sum = plan.moment_of(codec, split(state, name), salt)
            if name not in plan.SLOTS:
                continue
            if self._rule == plan.ESTIMATE and name not in plan.ESTIMATED:
                continue
            moment = plan.moment_of(codec, split(state, name), salt)
            if isinstance(codec, (Factored, FactoredSign)):
                moment.vectors, moment.partials = vectors, partials
                vectors += plan.vector_size(rows, cols)
                partials += plan.PARTIALS
            d.moments[plan.SLOTS[name]] = moment
        self._params[index], self._numels[index] = param, param.numel()
        return before is not None and before != bytes(d)


def storing(group: dict[str, Any]) -> tuple[Any, ...]:
    """The group's identity, and its options that determine how moments are stored."""
    present = (_presence(group.get(name)) for name in _PRESENT)
    return (id(group), *(group.get(name) for name in _SHAPING), *present)


def checked_state(
    owner: Owner, index: int, group: dict[str, Any], param: Tensor
) -> dict[str, Tensor]:
    """A parameter's state, allocated if there is none yet.

    Tensors that are not contiguous are made so.  Raises ValueError if the state does not fit the
    group's options, or is not on the parameter's device.
    """
    state = owner.state_of(param, group)
    owner.check_state(index, group, param)
    state.update({name: x.contiguous() for name, x in state.items() if not x.is_contiguous()})
    for name, x in state.items():
        if x.device != param.device:
            raise ValueError(
                f"parameter {index} {tuple(param.shape)} is on {param.device}, and {name!r} of "
                f"its state on {x.device}; optimizer.load_state_dict(optimizer.state_dict()) "
                "moves the state to where the parameters are"
            )
    return state


def _presence(option: float | None) -> bool | None:
    """None, or whether it is not zero."""
    return None if option is None else bool(option)


def superfluous(
    works: Iterable[tuple[int, ...]], members: tuple[int, ...], count: int
) -> list[tuple[int, ...]]:
    """The works to drop for a new one, the oldest, so that all together have at most _KEPT times
    as many members as there are parameters (`count`).  A fused backward has each parameter in one
    work; if every step has gradients for another set of parameters, works are never reused."""
    room = _KEPT * count - len(members)
    dropped = []
    for key in reversed([key for key in works if key != members]):
        room -= len(key)
        if room < 0:
            dropped.append(key)
    return dropped


def buckets(sizes: Iterable[tuple[Member, int]], limit: int) -> list[list[Member]]:
    """Members, given with their sizes, in buckets of at most `limit`, or of one larger member."""
    filled: list[list[Member]] = []
    room = 0
    for member, size in sizes:
        room -= size
        if room < 0 or not filled:
            filled.append([])
            room = limit - size
        filled[-1].append(member)
    return filled


def in_lines(size: int) -> int:
    """`size` bytes, rounded up to whole cache lines of 64."""
    return -(-size // 64) * 64
