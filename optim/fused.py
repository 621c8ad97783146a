"""FusedOptimizer: the only step() in the family, for every rule and storage."""

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend, features, groups, idle, options
from optim import state as states
from optim.backend import grad_of
from optim.codecs import Codec, Dense, layout
from optim.dispatch import Dispatch, device_types
from optim.interface import InBackward
from optim.share import Places, Share, Trait, same_objects

Rule = Callable[..., tuple[Tensor | None, dict[str, Tensor]]]  # as in optim/reference.py

META = torch.device("meta")
Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """`torch.compiler.disable` with the function's own type.  Without it dynamo would trace every
    shape and option of a step: minutes for nothing."""
    return cast(Function, torch.compiler.disable(function))


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer made of a rule and the codecs of its moments.

    A subclass names its `rule` and says in `moments` how each moment of a parameter is stored; it
    has no loop.  Its options are its signature's (`lr` and `weight_decay` among them) and those of
    `Features` that it does not refuse.  A subclass that names no rule extends its base, and its
    constructor may take any arguments.
    Arithmetic is fp32 whatever the parameter's dtype.  Weight decay is decoupled:
    w <- (1 - lr * weight_decay) w, before the update.

    `backend` selects what computes a step: "native" (`csrc/`, on a CPU and on CUDA) or "torch"; see
    `optim/state.py` for the layout of the state.
    """

    rule: ClassVar[Rule]
    # The class's defaults of these features.
    storage: ClassVar[str] = "fp32"
    growth_limit: ClassVar[float | None] = None
    refuses: ClassVar[dict[str, str]] = {}  # features that make no sense here, and why
    common: ClassVar[tuple[str, ...]] = ()  # options that all groups must agree on
    shared: ClassVar[tuple[str, ...]] = ()  # group keys of tensors that all groups share
    fused_backward: InBackward | None = None  # what steps it inside the backward pass

    def __init__(self, params: Iterable[Any], arguments: dict[str, Any]) -> None:
        """`arguments` is `locals()` in the constructor of the class that names the rule: its
        signature lists the options; other entries are ignored."""
        known = self.default_options()
        given = {k: v for k, v in arguments.items() if k in known} | arguments["features"]
        for name, reason in self.refuses.items():
            if name in given:
                raise TypeError(f"{type(self).__name__} cannot have {name}: {reason}")
        options.check(type(self).__name__, known, given)
        chosen = known | {name: options.plain(value) for name, value in given.items()}
        choice = chosen.pop("backend")
        super().__init__(params, chosen)
        groups.check_apart(type(self).__name__, self.param_groups)
        self.backend = backend.resolve(choice, device_types(self.param_groups))
        self._dispatch.say_what_is_unfused()
        for line in self.idle_options():
            warnings.warn(f"{type(self).__name__}: {line}", idle.IdleOption, stacklevel=3)

    def idle_options(self) -> list[str]:
        """A line for each option that is set but has no effect, or keeps weights from moving, with
        the remedy."""
        return [
            *idle.options(self.default_options(), self.param_groups),
            *idle.stalled(self.param_groups, self.compensates),
        ]

    @classmethod
    def ruled(cls) -> type["FusedOptimizer"]:
        """The class that names the rule: this one, or its nearest base that does."""
        return next(each for each in cls.__mro__ if "rule" in vars(each))

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """Every option of this optimizer with its default: those of the signature, then the
        features."""
        parameters = inspect.signature(cls.ruled()).parameters.values()
        own = {p.name: p.default for p in parameters if p.name not in ("params", "features")}
        defaults = {"storage": cls.storage, "growth_limit": cls.growth_limit}
        shared = features.DEFAULTS | defaults
        return own | {k: v for k, v in shared.items() if k not in cls.refuses}

    @classmethod
    def _options(cls) -> dict[str, Any]:
        """The options that groups have, with their defaults."""
        return {k: v for k, v in cls.default_options().items() if k != "backend"}

    @classmethod
    def contradiction(cls, group: Mapping[str, Any]) -> str | None:
        """Why these options cannot go together, in words that follow the optimizer's name; None if
        they can."""
        if group.get("factor_1d") and group["storage"] != "factored":
            return (
                f"cannot have factor_1d=True with storage={group['storage']!r}, which does not "
                "factor; use storage='factored'"
            )
        if group["grams"] and group["cautious"]:
            return (
                "cannot have grams=True with cautious=True: an update that has the gradient's "
                "signs has none against them; keep one of them"
            )
        return None

    @classmethod
    def bounds_updates(cls, group: Mapping[str, Any]) -> str | None:
        """Why the size of a gradient hardly matters with these options, in words that follow the
        optimizer's name; None if it does matter."""
        if group.get("clip_threshold") is not None:
            return "bounds the RMS of each tensor's update, whatever the size of its gradient"
        if group.get("atan2"):
            return "has atan2, which bounds every update, whatever the size of its gradient"
        return None

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How each moment of this parameter is stored: {moment name: codec}."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its moments are stored")

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """`moments`, and the state that the group's features add."""
        codecs = self.moments(param, group)
        if group.get("growth_limit") is not None:
            codecs["update_norm"] = Dense(())
        return codecs

    def layout(self, param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        """The (R, C) matrix that addresses the draws of a parameter's rounding."""
        return layout(self.codecs(param, group).values(), tuple(param.shape))

    def compensates(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether the error of rounding this parameter is kept and added to its next step."""
        return group["rounding"] == "kahan" and param.dtype != torch.float32

    def rate(self, h: SimpleNamespace) -> float | Tensor:
        """The factor of updates and decay, from a group as its rule sees it: a number, or a 0-d
        tensor."""
        return h.lr

    def end_step(self) -> None:
        """Called last in `step()`, after every parameter has been stepped."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own options if given; foreign keys (a scheduler's) are kept.

        Raises TypeError for a group that is not a dict, an unknown option (misspelt, or another
        optimizer's) or a parameter that is not dense fp32, bf16 or fp16, ValueError for an
        impossible value or parameters that share memory; the group is then not added.
        """
        if not isinstance(param_group, dict):  # torch's words
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        name = type(self).__name__
        known = self._options()
        given = {
            key: value
            for key, value in param_group.items()
            if key != "params" and not options.is_foreign(key, known)
        }
        options.check(name, known, given)
        param_group.update({key: options.plain(value) for key, value in given.items()})
        self._forget()
        super().add_param_group(param_group)
        try:
            groups.check(type(self), self.param_groups)
            if hasattr(self, "backend"):  # __init__ checks the first groups together
                groups.check_apart(name, self.param_groups)
            if self.fused_backward is not None:
                self.fused_backward.attach()
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; it also ends the round of a fused backward."""
        super().zero_grad(set_to_none)
        if self.fused_backward is not None:
            self.fused_backward.end_round()

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; a closure is called first and its loss
        returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused_backward is not None:
            self.fused_backward.check_unchanged()
        self._watch.check(self.param_groups)
        share = Share(self._places())
        if Trait.MISSING in share.traits:
            there = [place for place in share if place[2].grad is not None]
            share = Share(Places(there))
        self._step(share)
        self.end_step()
        return loss

    @uncompiled
    @torch.no_grad()
    def step_param(self, *params: Tensor) -> None:
        """Update these parameters from their gradients, together, exactly as `step()` would.

        For hooks that consume gradients inside the backward pass; an ordinary `step()` ends the
        round, with or without gradients left for it.  Raises ValueError for a tensor that is not in
        any of the groups, or has no gradient, and where any group has a `max_grad_norm` or
        on_nonfinite="raise".
        """
        self.check_steps_alone("step_param")
        places = self._places_of("step_param", params)
        self._watch.check(self.param_groups, places.groups)
        for index, _, param in places:
            if param.grad is None:
                raise ValueError(
                    f"step_param: parameter {index} {tuple(param.shape)} has no gradient"
                )
        self._step(Share(places))

    def _step(self, share: Share) -> None:
        """Update these parameters, which have gradients, in one thread at a time."""
        with self._turn, _without_autocast():
            self._refuse_gradients(share)
            self._raise_on_nonfinite(share)
            if len(share):
                self._step_all(share)

    def _step_all(self, every: Share) -> None:
        shares = self._dispatch.shares(every)
        coefficients: dict[int, float | Tensor] = {}
        limited = [g for g in every.groups if g["max_grad_norm"] is not None]
        if limited:
            norm = features.total([engine.grad_sq(share) for engine, share in shares]) ** 0.5
            for group in limited:
                coefficients[id(group)] = features.shrinking(norm, group["max_grad_norm"])
        for engine, share in shares:
            engine.step(share, coefficients)

    @cached_property
    def _watch(self) -> options.Watch:
        name = type(self).__name__
        return options.Watch(name, self._options(), partial(groups.check_agreement, type(self)))

    @property
    def _turn(self) -> threading.RLock:
        """The lock of `_step`: one for all threads, which `cached_property` does not guarantee."""
        return self.__dict__.setdefault("_lock", threading.RLock())

    def _refuse_gradients(self, share: Share) -> None:
        """Raise TypeError for a sparse gradient or a parameter of a wrong dtype, ValueError for a
        gradient with another shape than its parameter."""
        if Trait.SPARSE in share.traits:
            raise TypeError(
                f"{type(self).__name__} does not take sparse gradients; "
                "use nn.Embedding(sparse=False)"
            )
        if Trait.FOREIGN in share.traits:  # perhaps of a gradient only
            for _, _, param in share:
                groups.check_param(type(self), param)
        if Trait.MISSHAPEN in share.traits:
            index, shape, other = next(
                (index, tuple(param.shape), tuple(param.grad.shape))
                for index, _, param in share
                if param.grad is not None and param.grad.shape != param.shape
            )
            raise ValueError(
                f"parameter {index} has the shape {shape}, and its gradient {other}: the gradient "
                "is older than this shape; call zero_grad() after changing a parameter's shape, "
                "and build a new optimizer"
            )

    @cached_property
    def _dispatch(self) -> Dispatch:
        return Dispatch(weakref.proxy(self))

    def _forget(self) -> None:
        """Drop what was derived from groups and state: they are about to change."""
        for derived in ("_dispatch", "_members"):
            self.__dict__.pop(derived, None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; this family has no such option
        if self.backend == "native":  # it may have been pickled on another machine
            self.backend = backend.resolved("native", device_types(self.param_groups), strict=False)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: `step()` does not unscale.  `torch.amp.GradScaler.step` reads this first, so it
        raises RuntimeError if gradients have been used before they could be unscaled."""
        if self.fused_backward is not None:
            raise RuntimeError(
                f"GradScaler.step: this {type(self).__name__} is stepped inside backward() "
                "(fuse_backward), before GradScaler can unscale: the last backward() may have "
                "stepped with scaled gradients; load the weights again. Train in bf16 or fp32 "
                "without a GradScaler, or call remove() on what fuse_backward() returned"
            )
        return False

    def check_steps_alone(self, caller: str) -> None:
        """Raise ValueError if an option needs all gradients before any parameter is stepped."""
        if any(group["max_grad_norm"] is not None for group in self.param_groups):
            raise ValueError(
                f"{caller}: max_grad_norm needs all gradients at once, and they are stepped one by "
                "one; use grad_clip (the norm of each tensor's gradient) or step()"
            )
        if any(group["on_nonfinite"] == "raise" for group in self.param_groups):
            raise ValueError(
                f"{caller}: on_nonfinite='raise' stops before anything is updated, and parameters "
                "are stepped before all gradients are there; use on_nonfinite='skip' or step()"
            )

    def nonfinite_count(self) -> int:
        """How many gradient elements have been skipped so far as NaN, infinite or too large."""
        return sum(int(state["nonfinite"]) for state in self.state.values())

    @torch.no_grad()
    def init_state(self) -> None:
        """Allocate the state of every trainable parameter now, so that an out-of-memory error
        occurs at once."""
        for _, group, param in self._indexed_params():
            if param.requires_grad:
                self.state_of(param, group)

    def engine(self) -> str:
        """What steps which parameters, in words: the native engine, on a CPU with its instruction
        set, or plain PyTorch with the reason."""
        return self._dispatch.in_words()

    def state_bytes(self) -> int:
        """Bytes of all state allocated so far."""
        return sum(
            x.numel() * x.element_size() for state in self.state.values() for x in state.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with the class's name and the version of this state's layout in each
        group, and without what the groups' options do not need (any more)."""
        name, family = type(self).__name__, self.ruled().__name__
        packed = super().state_dict()
        kept = dict(packed["state"])
        for index, group, param in self._indexed_params():
            unneeded = self.state.get(param, {}).keys() - self._blank(param, group, META).keys()
            if unneeded and index in kept:
                kept[index] = {k: x for k, x in kept[index].items() if k not in unneeded}
        return states.labelled(name, family, packed | {"state": kept})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: copied, moved to each parameter's device, never cast.

        (torch's own loader casts every state tensor to the parameter's dtype: codes and fp32
        factors would not survive a bf16 model.)  Allocated tensors are reused if they fit: the
        device may have no memory for a second state.  If the state is not this optimizer's, raises
        ValueError that says what differs, and changes nothing.  Hooks are called as torch's own
        optimizers do.
        """
        state_dict = state_dict.copy()  # hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._take_over(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        """`load_state_dict` without its hooks."""
        name = type(self).__name__
        states.check_keys(name, state_dict)
        saved_groups = copy.deepcopy(state_dict["param_groups"])  # a rate may be a tensor
        known = {*self._options()}
        family = self.ruled().__name__
        states.check_groups(name, family, self.param_groups, known, {*self.shared}, state_dict)
        saved_groups = [
            {option: group[option] for option in known} | saved_group
            for group, saved_group in zip(self.param_groups, saved_groups, strict=True)
        ]
        for group in saved_groups:
            options.check(name, self._options(), {k: group[k] for k in known})
        groups.check_agreement(type(self), saved_groups)
        saved = [(index, group) for group in saved_groups for index in group["params"]]
        parts_of: dict[Tensor, states.Parts] = {}
        blank_of: dict[Tensor, states.Parts] = {}
        for (index, group), (_, _, param) in zip(saved, self._indexed_params(), strict=True):
            if state_dict["state"].get(index):  # torch's flattened state dicts have empty states
                parts_of[param] = state_dict["state"][index]
                blank_of[param] = self._blank(param, group, META)  # step counts are on the CPU
                states.check_parts(name, index, param, group, parts_of[param], blank_of[param])
        state = self._room_for(parts_of, blank_of)  # all memory, before anything changes
        for owner, parts in parts_of.items():
            for key, x in parts.items():
                state[owner][key].copy_(x)
        self._forget()
        self.state.clear()
        self.state.update(state)
        for key in self.shared:  # one tensor, in every group
            number = self.param_groups[0][key]
            number.copy_(torch.as_tensor(saved_groups[0][key], device=number.device))
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            own = {k: group[k] for k in ("params", "param_names", *self.shared) if k in group}
            group.update(states.unlabelled(saved_group) | own)

    def _room_for(
        self, parts_of: dict[Tensor, states.Parts], blank_of: dict[Tensor, states.Parts]
    ) -> dict[Tensor, states.Parts]:
        """Tensors to copy saved parts to: existing ones if they fit, else new ones.  All are new if
        a saved one shares memory with this state: it must not change before it is read."""
        is_own = states.share_memory(self.state.values(), parts_of.values())
        state: dict[Tensor, states.Parts] = {}
        for param, parts in parts_of.items():
            there = {} if is_own else self.state.get(param, {})
            counts_on = self._dispatch.counts_on(param)
            state[param] = {
                key: states.room_for(
                    x, param.device if blank_of[param][key].is_meta else counts_on, there.get(key)
                )
                for key, x in parts.items()
            }
        return state

    def _indexed_params(self) -> Iterator[tuple[int, dict[str, Any], Parameter]]:
        """Every parameter with its group and its index, which is the same in every process and
        after a resume."""
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        for index, (group, param) in enumerate(pairs):
            yield index, group, param

    def _places_of(self, caller: str, params: Iterable[Tensor]) -> Places:
        """These parameters with their indices and groups.  Raises ValueError for one that is in no
        group, or is given twice."""
        self._places()  # updates `_place_by_id`
        places = Places()
        for param in params:
            if id(param) not in self._place_by_id:
                raise ValueError(f"a tensor of shape {tuple(param.shape)} is in no parameter group")
            places.append((*self._place_by_id[id(param)], param))
        if len({*places.members}) < len(places):
            raise ValueError(f"{caller}: a parameter is passed twice, and would be stepped twice")
        return places

    def _places(self) -> Places:
        """Every parameter with its index and group, in a list that is cached until they change."""
        members: list[list[Any]] = [
            self.param_groups,
            *(group["params"] for group in self.param_groups),
        ]
        known: list[list[Any]] = self.__dict__.get("_members", [])
        if len(members) != len(known) or not all(map(same_objects, members, known)):
            self._forget()
            self._members = [list(each) for each in members]
            self._all_places = Places(self._indexed_params())
            self._place_by_id = {id(p): (index, g) for index, g, p in self._all_places}
        return self._all_places

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """This parameter's state, allocated when there is none yet."""
        state = self.state[param]
        if not state:
            state.update(self._blank(param, group, param.device))
        return state

    def check_state(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """Raise ValueError if a parameter's state lacks what its group's options need.  It may hold
        more, for an option that has been switched off since."""
        wanted = self._blank(param, group, META)
        own = {name: x for name, x in self.state[param].items() if name in wanted}
        states.check_parts(type(self).__name__, index, param, group, own, wanted)

    def _blank(
        self, param: Tensor, group: dict[str, Any], device: torch.device
    ) -> dict[str, Tensor]:
        counts_on = torch.device("cpu") if device == META else self._dispatch.counts_on(param)
        compensated = self.compensates(param, group)
        return states.blank(param, self.codecs(param, group), compensated, device, counts_on)

    def _raise_on_nonfinite(self, share: Share) -> None:
        """Before a step: raise if a group asks for it and a gradient element is not usable."""
        if not any(group["on_nonfinite"] == "raise" for group in share.groups):
            return
        strict = [place for place in share if place[1]["on_nonfinite"] == "raise"]
        if features.all_usable([grad_of(param) for _, _, param in strict]):
            return
        for index, _, param in strict:
            bad = int((~features.usable(grad_of(param))).sum())
            if bad:
                raise FloatingPointError(
                    f"{bad} of {param.numel()} gradient elements of parameter {index} "
                    f"{tuple(param.shape)} are NaN, infinite or above 2^48; nothing was updated"
                )


def _without_autocast() -> ExitStack:
    """A context without autocast, which would compute products of fp32 tensors in bf16."""
    stack = ExitStack()
    for device in ("cpu", "cuda", "mps", "xpu"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
