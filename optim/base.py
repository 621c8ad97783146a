"""What an optimizer of the family is between steps: options, groups, and state."""

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import backend, described, features, groups, idle, options
from optim import state as states
from optim.codecs import Codec, Dense, layout
from optim.dispatch import Dispatch, device_types
from optim.interface import InBackward
from optim.share import Places, same_objects

Rule = Callable[..., tuple[Tensor | None, dict[str, Tensor]]]  # as in optim/reference.py

META = torch.device("meta")


class StatefulOptimizer(torch.optim.Optimizer):
    """A `FusedOptimizer` without its steps."""

    __signature__: ClassVar[inspect.Signature]
    rule: ClassVar[Rule]
    own_defaults: ClassVar[dict[str, Any]] = {}  # of options, where they are not the base's
    refuses: ClassVar[dict[str, str]] = {}  # features that make no sense here, and why
    common: ClassVar[tuple[str, ...]] = ()  # options that all groups must agree on
    shared: ClassVar[tuple[str, ...]] = ()  # group keys of tensors that all groups share
    fused_backward: InBackward | None = None  # what steps it inside the backward pass

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Give the class its own defaults, and a signature and documentation that have them."""
        super().__init_subclass__(**arguments)
        if not hasattr(cls, "rule"):
            return
        if "__init__" in vars(cls) and not cls.__init__.__doc__:
            cls.__init__.__doc__ = "The arguments are explained in the class's documentation."
        known = cls.default_options()
        options.check(cls.__name__, known, cls.own_defaults)
        if cls.own_defaults.keys() & inspect.signature(cls.__init__).parameters.keys():
            cls.__init__ = described.with_defaults(cls.__init__, known)  # type: ignore[method-assign]
        if cls.__init__.__code__ is cls.ruled().__init__.__code__:
            cls.__signature__ = described.signature(cls.__init__, known)
            cls.__doc__ = described.documentation(cls)
        else:  # its constructor takes other arguments
            _, *taken = inspect.signature(cls.__init__).parameters.values()
            cls.__signature__ = inspect.Signature(taken)

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
    def ruled(cls) -> type["StatefulOptimizer"]:
        """The class that names the rule: this one, or its nearest base that does."""
        return next(each for each in cls.__mro__ if "rule" in vars(each))

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """Every option of this optimizer with its default: those of the signature, then the
        features."""
        parameters = inspect.signature(cls.ruled().__init__).parameters.values()
        others = ("self", "params", "features")
        known = {p.name: p.default for p in parameters if p.name not in others}
        known |= {k: v for k, v in features.DEFAULTS.items() if k not in cls.refuses}
        changed: dict[str, Any] = {}
        for each in reversed(cls.__mro__):
            changed |= vars(each).get("own_defaults", {})
        return {name: changed.get(name, default) for name, default in known.items()}

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
        if group.get("grams") and group.get("cautious"):
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

    def nonfinite_count(self) -> int:
        """How many gradient elements have been skipped so far as NaN, infinite or too large."""
        return sum(int(state["nonfinite"]) for _, _, state in self._allocated())

    @torch.no_grad()
    def init_state(self) -> None:
        """Allocate the state of every trainable parameter now, so that an out-of-memory error
        occurs at once."""
        for _, group, param in self._indexed_params():
            if param.requires_grad:
                self.state_of(param, group)

    def state_bytes(self) -> int:
        """Bytes of all state allocated so far."""
        return sum(
            x.numel() * x.element_size() for state in self.state.values() for x in state.values()
        )

    def scratch_bytes(self, device_type: str) -> int:
        """About how many bytes a fused step on devices of this type takes besides gradients and
        state, where these are many: 0, unless a class says otherwise."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with the class's name and the version of this state's layout in each
        group, with plain options (a schedule may have set numpy's), and without what these do not
        need (any more)."""
        name, family, known = type(self).__name__, self.ruled().__name__, self._options()
        packed = super().state_dict()
        saved_groups = [
            {k: options.plain(x) if k in known else x for k, x in group.items()}
            for group in packed["param_groups"]
        ]
        kept = dict(packed["state"])
        for index, group, param in self._indexed_params():
            unneeded = self.state.get(param, {}).keys() - self._blank(param, group, META).keys()
            if unneeded and index in kept:
                kept[index] = {k: x for k, x in kept[index].items() if k not in unneeded}
        saved = packed | {"state": kept, "param_groups": saved_groups}
        return states.labelled(name, family, saved)

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
            kind = {"dtype": number.dtype, "device": number.device}
            number.copy_(torch.as_tensor(saved_groups[0][key], **kind))
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

    def _allocated(self) -> Iterator[tuple[dict[str, Any], Tensor, states.Parts]]:
        """Every parameter that has a state, in order, with its group and state.  (torch's `state`
        is a defaultdict: reading it for another leaves an empty one.)"""
        for _, group, param in self._places():
            if state := self.state.get(param):
                yield group, param, state

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

    def _places(self) -> Places:
        """Every parameter with its index and group, in a list that is cached until they change."""
        members: list[list[Any]] = [
            self.param_groups,
            *(group["params"] for group in self.param_groups),
        ]
        known: list[list[Any]] = self.__dict__.get("_members", [])
        if len(members) != len(known) or not all(map(same_objects, members, known)):
            self._forget()
            self._complete()
            self._members = [list(each) for each in members]
            self._all_places = Places(self._indexed_params())
            self._place_by_id = {id(p): (index, g) for index, g, p in self._all_places}
        return self._all_places

    def _complete(self) -> None:
        """Give groups without some options, which were put there by hand or pickled before an
        option existed, the defaults of the optimizer."""
        for group in self.param_groups:
            for name, default in (self._options() | self.defaults).items():
                group.setdefault(name, default)

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
        self._complete()
        if self.backend == "native":  # it may have been pickled on another machine
            self.backend = backend.resolved("native", device_types(self.param_groups), strict=False)
