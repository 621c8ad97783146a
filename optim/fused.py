"""FusedOptimizer: the only step() in the family, whatever the rule and however the state is
stored."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from optim import features, options
from optim.codecs import Codec, Dense, FactoredSign, Parts, join, split
from optim.rng import mix, round_stochastic_bf16

Rule = Callable[..., tuple[Tensor | None, dict[str, Tensor]]]  # as in optim/reference.py

STATE_VERSION = 1
# Group keys of torch's own: the optimizer's, and those that LR schedulers begin with.
_NOT_OPTIONS = {"params", "param_names", "initial_lr"}


class FusedOptimizer(torch.optim.Optimizer):
    """A rule and the codecs of its moments, made into a torch optimizer.

    A subclass names its `rule` and says in `moments` how each moment of a parameter is stored; it
    has no loop.  Its options are its signature's and those of `Features` that it does not refuse.
    Arithmetic is fp32 whatever the parameter's dtype.  Weight decay is decoupled:
    w <- (1 - lr * weight_decay) w, before the update.

    The state of a parameter is a flat dict of plain tensors with dtypes of their own (`step`, then
    `moment` or `moment.part`), so that it passes through torch.save(weights_only), safetensors and
    torch.distributed.checkpoint as it is.
    """

    rule: ClassVar[Rule]
    storage: ClassVar[str] = "fp32"  # of its moments: fp32, 8bit or factored
    refuses: ClassVar[dict[str, str]] = {}  # features that make no sense here, and why

    def __init__(self, params: Iterable[Any], arguments: dict[str, Any]) -> None:
        """`arguments` are the subclass's own, as its `locals()`: its signature is the list of its
        options, and what else is in there is left out."""
        known = self.default_options()
        given = {k: v for k, v in arguments.items() if k in known} | arguments["features"]
        for name, reason in self.refuses.items():
            if name in given:
                raise TypeError(f"{type(self).__name__} cannot have {name}: {reason}")
        options.check(type(self).__name__, known, given)
        super().__init__(params, known | given)

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """Every option of this optimizer with its default: its signature's, then the features."""
        parameters = inspect.signature(cls).parameters.values()
        own = {p.name: p.default for p in parameters if p.name not in ("params", "features")}
        shared = {k: v for k, v in features.DEFAULTS.items() if k not in cls._refused()}
        return own | shared

    @classmethod
    def _refused(cls) -> set[str]:
        return set(cls.refuses) | (set() if cls.storage == "factored" else {"factor_1d"})

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How each moment of this parameter is stored: {moment name: codec}."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its moments are stored")

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """`moments`, and what the group's features keep besides."""
        codecs = self.moments(param, group)
        if group.get("growth_limit") is not None:
            codecs["update_norm"] = Dense(())
        return codecs

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own options where given.

        Raises TypeError for an unknown option or a parameter that is sparse or complex, ValueError
        for an impossible value.
        """
        given = {k: v for k, v in param_group.items() if k not in _NOT_OPTIONS}
        options.check(type(self).__name__, self.default_options(), given)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.dtype.is_floating_point or param.layout is not torch.strided:
                raise TypeError(
                    f"{type(self).__name__} updates dense floating-point parameters; "
                    f"this one is {param.layout}, {param.dtype}, shape {tuple(param.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; a closure is called first and its loss
        returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._raise_on_nonfinite(self._indexed_params())
        for index, group, param in self._indexed_params():
            if param.grad is not None:
                self._update(index, group, param)
        return loss

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Update one parameter from its gradient, exactly as `step()` would.

        For hooks that consume gradients inside the backward pass.  Raises ValueError for a tensor
        that is not in any of the groups, or has no gradient.
        """
        index, group = self._place_of(param)
        if param.grad is None:
            raise ValueError(f"step_param: parameter {index} {tuple(param.shape)} has no gradient")
        self._raise_on_nonfinite([(index, group, param)])
        self._update(index, group, param)

    def nonfinite_count(self) -> int:
        """How many gradient elements have been skipped so far as NaN, infinite or too large."""
        return sum(int(state["nonfinite"]) for state in self.state.values())

    @torch.no_grad()
    def init_state(self) -> None:
        """Allocate the state of every trainable parameter now, so that running out of memory
        happens at once."""
        for _, group, param in self._indexed_params():
            if param.requires_grad:
                self._state_of(param, group)

    def state_bytes(self) -> int:
        """Bytes of all state allocated so far."""
        return sum(
            x.numel() * x.element_size() for state in self.state.values() for x in state.values()
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and under `state_version` the version of this state's layout."""
        return super().state_dict() | {"state_version": STATE_VERSION}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it was saved: copied, moved to each parameter's device, never cast.

        (torch's own loader casts every state tensor to the parameter's dtype: codes and fp32
        factors would not survive a bf16 model.)  Raises ValueError that says what differs when the
        state is not this optimizer's; then nothing changes.
        """
        groups = self._matching_groups(state_dict)
        saved = [(index, group) for group in groups for index in group["params"]]
        state: dict[Tensor, dict[str, Tensor]] = {}
        for (index, group), (_, _, param) in zip(saved, self._indexed_params(), strict=True):
            if index in state_dict["state"]:
                parts = state_dict["state"][index]
                self._check_saved(index, parts, param, group)
                blank = self._blank(param, group, param.device)
                state[param] = {k: x.detach().clone().to(blank[k].device) for k, x in parts.items()}
        self.state.clear()
        self.state.update(state)
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            own = {key: group[key] for key in ("params", "param_names") if key in group}
            group.update(saved_group | own)

    def _indexed_params(self) -> Iterator[tuple[int, dict[str, Any], Parameter]]:
        """Every parameter with its group and its index, which is the same in every process and
        after a resume."""
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        for index, (group, param) in enumerate(pairs):
            yield index, group, param

    def _place_of(self, param: Tensor) -> tuple[int, dict[str, Any]]:
        """This parameter's index and group."""
        places = self.__dict__.get("_places", {})
        if len(places) != sum(len(group["params"]) for group in self.param_groups):
            places = {id(p): (index, group) for index, group, p in self._indexed_params()}
            self._places = places
        if id(param) not in places:
            raise ValueError(f"a tensor of shape {tuple(param.shape)} is in no parameter group")
        return places[id(param)]

    def _update(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """One step of one parameter: decode, apply the rule, encode, write the weights."""
        if param.grad.is_sparse:  # type: ignore[union-attr]
            raise TypeError(
                f"{type(self).__name__} does not take sparse gradients; "
                "use nn.Embedding(sparse=False)"
            )
        codecs = self.codecs(param, group)
        state = self._state_of(param, group)
        state["step"] += 1
        t, lr = int(state["step"]), float(group["lr"])
        h = SimpleNamespace(**group | {"lr": lr, "t": t, "codec": codecs})
        key = mix(group["seed"], index, t)

        w, raw = param.float(), param.grad.float()  # type: ignore[union-attr]
        if "compensation" in state:
            w = w + state["compensation"].float()
        h.usable = features.usable(raw)
        state["nonfinite"] += (~h.usable).sum()
        g = features.clipped(h, torch.where(h.usable, raw, 0.0))
        if h.orthograd:
            g = features.orthogonal(w, g)

        moments = {name: codec.decode(split(state, name)) for name, codec in codecs.items()}
        u, moments = type(self).rule(h, w, g, moments)
        for salt, name in enumerate(codecs, start=1):
            parts = codecs[name].encode(moments[name], mix(key, salt))
            for part, value in join({name: parts}).items():
                state[part].copy_(value)
        if u is not None:
            if any(isinstance(codec, FactoredSign) for codec in codecs.values()):
                u = torch.where(raw == 0, 0.0, u)  # its momentum is its neighbours'
            u = features.aligned(h, u, g)
            moved = w - lr * (features.decayed(h, w, u) + u)
            self._write(param, state, torch.where(h.usable, moved, w), key, h.rounding)

    def _write(
        self, param: Tensor, state: dict[str, Tensor], w: Tensor, key: int, rounding: str
    ) -> None:
        """Round the new fp32 weights to the parameter's dtype."""
        if rounding == "stochastic" and param.dtype == torch.bfloat16:
            param.copy_(round_stochastic_bf16(w, key))
            return
        param.copy_(w)
        if "compensation" in state:
            state["compensation"].copy_(w - param.float())

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """This parameter's state, allocated when there is none yet."""
        state = self.state[param]
        if not state:
            state.update(self._blank(param, group, param.device))
        return state

    def _blank(
        self, param: Tensor, group: dict[str, Any], device: torch.device
    ) -> dict[str, Tensor]:
        """The state of a parameter that has made no step: everything zero."""
        state = {
            "step": torch.zeros((), dtype=torch.int64),  # on the host, where it is read
            "nonfinite": torch.zeros((), dtype=torch.int64, device=device),
        }
        if group["rounding"] == "kahan" and param.dtype != torch.float32:
            state["compensation"] = torch.zeros_like(param, device=device, requires_grad=False)
        codecs = self.codecs(param, group)
        return state | join({name: codec.zeros(device) for name, codec in codecs.items()})

    def _raise_on_nonfinite(self, places: Iterable[tuple[int, dict[str, Any], Tensor]]) -> None:
        """Before a step: raise where a group asks for it and a gradient element is not usable."""
        for index, group, param in places:
            if group["on_nonfinite"] == "raise" and param.grad is not None:
                bad = int((~features.usable(param.grad)).sum())
                if bad:
                    raise FloatingPointError(
                        f"{bad} of {param.numel()} gradient elements of parameter {index} "
                        f"{tuple(param.shape)} are NaN, infinite or above 2^48; nothing was updated"
                    )

    def _matching_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The saved groups, once they are known to fit this optimizer's."""
        name = type(self).__name__
        version = state_dict.get("state_version")
        if version != STATE_VERSION:
            raise ValueError(
                f"{name} reads state version {STATE_VERSION}, and this state has {version}; "
                "it was saved by another optimizer or release"
            )
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(
                f"{name} has parameter groups of {own_sizes} tensors, "
                f"and the saved state has {sizes}"
            )
        for group in state_dict["param_groups"]:  # LR schedulers may have added keys of their own
            missing = sorted(set(self.defaults) - set(group))
            if missing:
                raise ValueError(
                    f"the saved state is not of {name}: its groups lack {', '.join(missing)}"
                )
        return state_dict["param_groups"]

    def _check_saved(
        self, index: int, saved: Parts, param: Parameter, group: dict[str, Any]
    ) -> None:
        """Compare a saved parameter state with the one this optimizer would allocate, by name,
        shape and dtype."""
        blank = self._blank(param, group, torch.device("meta"))
        wanted = {key: (tuple(x.shape), x.dtype) for key, x in blank.items()}
        found = {key: (tuple(x.shape), x.dtype) for key, x in saved.items()}
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                raise ValueError(
                    f"the saved state of parameter {index} {tuple(param.shape)} does not fit "
                    f"{type(self).__name__}: {key!r} is {found.get(key, 'missing')} "
                    f"and should be {wanted.get(key, 'absent')}"
                )
