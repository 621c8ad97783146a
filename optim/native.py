"""backend="native": the CPU engine of `csrc/`, built by the install where a compiler exists.

It steps a bucket of parameters in one call: rules, codecs and features fused into one pass over
memory wherever the mathematics allows it.  `optim/reference.py` is what it computes.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim import plan
from optim.codecs import Factored, FactoredSign, layout, split

if TYPE_CHECKING:
    from optim.backend import Place
    from optim.fused import FusedOptimizer

try:
    from optim import _native  # type: ignore[attr-defined]
except ImportError as error:
    _native, _reason = None, str(error)

# Parameters are stepped in buckets of at most so many elements: 64 MB of bf16 gradients.
BUCKET_NUMEL = 32 << 20


def unavailable() -> str | None:
    """Why the native engine cannot be used, or None where it can."""
    if _native is None:
        return f"the native engine is not built ({_reason}); it needs a C++ compiler at the install"
    return None


def has_rule(rule: Callable[..., Any]) -> bool:
    """Whether the engine computes this rule of `optim/reference.py`."""
    return rule.__name__ in plan.RULES


def isa() -> str:
    """The instruction set in use: OPTIM_ISA, or the best one this machine has.

    Raises ValueError for a name that this machine does not have.
    """
    names = _native.isas()
    chosen = os.environ.get("OPTIM_ISA", names[-1])
    if chosen not in names:
        raise ValueError(f"OPTIM_ISA={chosen}: this machine has {', '.join(names)}")
    return chosen


def _sizes() -> dict[str, int]:
    """Sizes in bytes of the engine's structs, once `optim/plan.py` is seen to mirror them."""
    mirrored = {
        "Options": ctypes.sizeof(plan.Options),
        "Moment": ctypes.sizeof(plan.Moment),
        "Tensor": ctypes.sizeof(plan.Descriptor),
        "Launch": ctypes.sizeof(plan.Launch),
        "TILE_ROWS": plan.TILE_ROWS,
        "TILE_COLS": plan.TILE_COLS,
        "VECTOR_PAD": plan.VECTOR_PAD,
    }
    built: dict[str, int] = _native.describe()
    differing = [name for name, size in mirrored.items() if built[name] != size]
    if differing:
        raise ImportError(
            f"optim._native was built from other sources ({', '.join(differing)} differ); "
            "install again: pip install -e ."
        )
    return built


_SIZES = _sizes() if _native is not None else {}

_WORDS = ctypes.sizeof(plan.Descriptor) // 8
# The options of a group that say which moments there are and how they are stored.
_SHAPING = ("storage", "factor_1d", "momentum", "beta1", "growth_limit", "clip_norm", "rounding")
_ASKED = 256  # tensors of a state that are asked for their address at a step
_WEIGHT, _GRAD = plan.Descriptor.weight.offset // 8, plan.Descriptor.grad.offset // 8


class _Work:
    """The buckets of a set of parameters, as launches, and what they were made from."""

    def __init__(
        self,
        descriptors: "ctypes.Array[plan.Descriptor]",
        members: Sequence[int],
        stamp: list[Any],
        states: list[dict[str, Tensor]],
    ) -> None:
        self.members, self.stamp = torch.tensor(members), stamp
        self._parts = [list(state.values()) for state in states]
        parts = list(chain.from_iterable(self._parts))
        turns = max(1, -(-len(parts) // _ASKED))
        self._samples = [parts[first::turns] for first in range(turns)]
        self._addresses = [[x.data_ptr() for x in sample] for sample in self._samples]
        # What is written to through an address stays alive as long as the address is here.
        self._storages = [x.untyped_storage() for x in parts]
        self._turn = 0
        self.grad_dtypes: list[torch.dtype] = []
        self.launches: list[tuple[plan.Launch, plan.Bucket]] = []
        for chosen in _split(descriptors, members):
            shapes = [(descriptors[i].rows, descriptors[i].cols) for i in chosen]
            factored = [plan.num_factored(descriptors[i]) for i in chosen]
            bucket = plan.Bucket(chosen, shapes, factored)
            launch = plan.Launch(
                tensors=ctypes.addressof(descriptors),
                members=bucket.members.data_ptr(),
                tiles=bucket.tiles.data_ptr(),
                first_tile=bucket.first_tile.data_ptr(),
                vectors=bucket.vectors.data_ptr(),
                num_tensors=len(chosen),
                num_tiles=bucket.num_tiles,
            )
            self.launches.append((launch, bucket))

    def holds(self, states: list[dict[str, Tensor]]) -> bool:
        """Whether these are the tensors, at their addresses, that the work was made from.

        There are nine thousand of them in a UNet's optimizer, too many to ask each for its address
        at every step.  So all are looked at for being the same objects, and _ASKED of them, by
        turns, for their addresses: whoever moves a state by assigning to `.data`, or by `set_()`,
        moves all of its tensors, and is seen at once.
        """
        if not _native.same_values(states, self._parts):
            return False
        self._turn = (self._turn + 1) % len(self._samples)
        addresses = [x.data_ptr() for x in self._samples[self._turn]]
        return addresses == self._addresses[self._turn]


def _split(descriptors: "ctypes.Array[plan.Descriptor]", members: Sequence[int]) -> list[list[int]]:
    """Members in buckets of at most BUCKET_NUMEL elements, or a single larger one."""
    buckets: list[list[int]] = []
    room = 0
    for index in members:
        room -= descriptors[index].numel
        if room < 0 or not buckets:
            buckets.append([])
            room = BUCKET_NUMEL - descriptors[index].numel
        buckets[-1].append(index)
    return buckets


class NativeEngine:
    """Steps the CPU parameters of one optimizer.

    What it keeps is derived from the optimizer's groups and state, and made anew when those change:
    descriptors, work lists, and room for partial sums.
    """

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer, self._isa = optimizer, isa()
        self._rule = plan.RULES[type(optimizer).rule.__name__]
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        self._descriptors = (plan.Descriptor * count)()
        self._words = torch.frombuffer(self._descriptors, dtype=torch.int64).view(count, _WORDS)
        self._params: list[Tensor | None] = [None] * count
        self._numels = [-1] * count
        self._work: dict[tuple[int, ...], _Work] = {}
        self._room = torch.empty(0, dtype=torch.uint8)

    def split(self, places: "list[Place]") -> "tuple[list[Place], list[Place]]":
        """The parameters that this engine steps, and those it leaves to the reference: on another
        device, or factored as batches of matrices."""
        batched = any(g.get("conv_view") == "last2" for g in self._optimizer.param_groups)
        if not batched and all([param.is_cpu for _, _, param in places]):
            return places, []
        served: list[Place] = []
        rest: list[Place] = []
        for place in places:
            serves = place[2].is_cpu and place[1].get("conv_view") != "last2"
            (served if serves else rest).append(place)
        return served, rest

    def step(self, places: "Sequence[Place]", coefficients: dict[int, float]) -> None:
        """As `optim.backend.Engine`."""
        work, weights, read = self._refresh(places)
        groups = self._optimizer.param_groups
        options = (plan.Options * len(groups))(
            *(plan.group_options(group, coefficients.get(id(group), 1.0)) for group in groups)
        )
        self._launch(_native.launch, work, options)
        del read
        for param, copy in weights:
            param.copy_(copy)

    def grad_sq(self, places: "Sequence[Place]") -> float:
        """As `optim.backend.Engine`."""
        work, _, read = self._refresh(places)
        total = sum(self._launch(_native.grad_sq, work, None))
        del read
        return total

    def _launch(self, function: Any, work: _Work, options: Any) -> list[Any]:
        results = []
        for launch, bucket in work.launches:
            # Each on a cache line of its own: the workspace is read and written by whole vectors.
            hypers = _in_lines(bucket.num_tensors * _SIZES["Hyper"])
            sums = _in_lines(bucket.num_tiles * _SIZES["TileSums"])
            size = hypers + sums + bucket.workspace_size * 4
            if self._room.numel() < size:
                self._room = torch.empty(size, dtype=torch.uint8)
            launch.hypers = self._room.data_ptr()
            launch.sums = launch.hypers + hypers
            launch.workspace = launch.sums + sums
            launch.options = ctypes.addressof(options) if options is not None else 0
            launch.rule = self._rule
            results.append(function(ctypes.addressof(launch), self._isa, torch.get_num_threads()))
        return results

    def _refresh(
        self, places: "Sequence[Place]"
    ) -> tuple[_Work, list[tuple[Tensor, Tensor]], list[Tensor]]:
        """Write the addresses of this step's weights and gradients into the descriptors.

        Returns the work of these parameters; weights that are not contiguous, each with the
        contiguous copy that is to be copied back; and the tensors to keep alive until the launch is
        over, and no longer: a fused backward is about to free its gradients.
        """
        # A UNet has 1680 tensors, so each question put to all of them is a list of its own: that is
        # several times faster than a loop with all questions inside.
        weights: list[Any] = [param for _, _, param in places]
        work = self._work_of(places, weights)
        grads: list[Any] = [param.grad for param in weights]
        copies: list[tuple[Tensor, Tensor]] = []
        if [grad.dtype for grad in grads] != work.grad_dtypes:
            grads = [grad if grad.dtype in plan.DTYPES else grad.float() for grad in grads]
            for other in self._work.values():  # they share the descriptors
                other.grad_dtypes = []
            work.grad_dtypes = [grad.dtype for grad in grads]
            for (index, _, _), grad in zip(places, grads, strict=True):
                self._descriptors[index].grad_dtype = plan.DTYPES[grad.dtype]
        if not all([grad.is_contiguous() for grad in grads]):
            grads = [grad.contiguous() for grad in grads]
        if not all([weight.is_contiguous() for weight in weights]):
            readable = [weight.contiguous() for weight in weights]
            copies = [(w, r) for w, r in zip(weights, readable, strict=True) if r is not w]
            weights = readable
        if places:
            read = weights + grads
            addresses = array("q", [x.data_ptr() for x in read])
            table = torch.frombuffer(addresses, dtype=torch.int64).view(2, -1)
            self._words[work.members, _WEIGHT : _GRAD + 1] = table.t()
        return work, copies, weights + grads

    def _work_of(self, places: "Sequence[Place]", params: list[Tensor]) -> _Work:
        """The work of these parameters: kept from an earlier step where nothing that descriptors
        depend on has changed since, which is looked at every time."""
        members = tuple([index for index, _, _ in places])
        stamp = self._stamp(params)
        work = self._work.get(members)
        if work is None or work.stamp != stamp or not work.holds(self._states(params)):
            if len(self._work) > 4096:  # sets of parameters that do not come again
                self._work.clear()
            for place in places:
                self._describe(*place)
            work = _Work(self._descriptors, members, stamp, self._states(params))
            self._work[members] = work
        return work

    def _states(self, params: list[Tensor]) -> list[dict[str, Tensor]]:
        return list(map(self._optimizer.state.__getitem__, params))

    def _stamp(self, params: list[Tensor]) -> list[Any]:
        """What the descriptors of these parameters depend on, but for their state: which groups
        there are and how they store moments, and the weights' dtypes and sizes.  (Which parameters
        there are is the optimizer's to watch: it drops this engine when they change.)"""
        groups = [
            (id(g), *(g.get(name) for name in _SHAPING)) for g in self._optimizer.param_groups
        ]
        return [groups, [p.dtype for p in params], [p.numel() for p in params]]

    def _describe(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """Fill in the descriptor of one parameter, whose state is allocated if there is none."""
        if self._params[index] is param and self._numels[index] != param.numel():
            raise ValueError(
                f"parameter {index} has {param.numel()} elements now and had "
                f"{self._numels[index]} when its state was made; build a new optimizer"
            )
        self._params[index] = param
        self._numels[index] = param.numel()
        optimizer = self._optimizer
        codecs, state = optimizer.codecs(param, group), optimizer.state_of(param, group)
        optimizer.check_state(index, group, param)
        rows, cols = plan.matrix_of(layout(codecs.values(), param.numel()))
        d = self._descriptors[index]
        d.index, d.numel, d.rows, d.cols = index, param.numel(), rows, cols
        d.weight_dtype = plan.DTYPES[param.dtype]
        d.group = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
        for name in ("step", "nonfinite", "compensation", "update_norm", "update_rms"):
            setattr(d, name, state[name].data_ptr() if name in state else 0)
        vectors = partials = 0
        for salt, (name, codec) in enumerate(codecs.items(), start=1):
            if name not in plan.SLOTS:
                continue
            moment = plan.moment_of(codec, split(state, name), salt)
            if isinstance(codec, (Factored, FactoredSign)):
                moment.vectors, moment.partials = vectors, partials
                vectors += plan.vector_size(rows, cols)
                partials += plan.TILE_ROWS + plan.TILE_COLS
            d.moments[plan.SLOTS.index(name)] = moment


def _in_lines(size: int) -> int:
    """`size` bytes up to the end of their last cache line of 64."""
    return -(-size // 64) * 64
