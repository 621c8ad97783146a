"""What computes a step: a fused engine if there is one, plain PyTorch otherwise."""

import os
import warnings
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from optim import cuda, features, gpu, native, plan, reference
from optim.codecs import Codec, FactoredSign, join, salts, split
from optim.indirect import Make
from optim.interface import Engine, Owner, RuledOwner
from optim.options import learning_rate
from optim.orthogonal import OrthogonalEngine
from optim.projected import NativeProjectedEngine
from optim.projected_cuda import CudaProjectedEngine
from optim.rng import mix, round_stochastic_bf16
from optim.share import Share

BACKENDS = get_args(get_type_hints(features.Features)["backend"])
_ESTIMATE = 1 << 32  # makes an estimate's rounding draws differ from a step's; csrc/rules/sophia.h
_said: set[str] = set()  # reasons of warnings


def grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that is known to have one."""
    assert param.grad is not None
    return param.grad


class TorchEngine:
    """backend="torch": `optim/reference.py`, one parameter after another, on any device."""

    def __init__(self, optimizer: RuledOwner, rule: str | None) -> None:
        """`rule`: plan.ESTIMATE, or None for the optimizer's own."""
        self._optimizer, self._rule = optimizer, rule

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        self._check(share)
        update = self._estimate if self._rule == plan.ESTIMATE else self._step
        for index, group, param in share:
            update(index, group, param, float(coefficients.get(id(group), 1.0)))

    def _check(self, share: Share) -> None:
        """Raise ValueError, before anything changes, if a state does not fit its group's options:
        they may have been set after it was allocated.  A state is allocated if there is none."""
        for index, group, param in share:
            self._optimizer.state_of(param, group)
            self._optimizer.check_state(index, group, param)

    def grad_sq(self, share: Share) -> float:
        return sum(features.grad_sq(grad_of(param)) for _, _, param in share)

    def _step(self, index: int, group: dict[str, Any], param: Tensor, coefficient: float) -> None:
        """One step of one parameter: decode, apply the rule, encode, write the weights."""
        optimizer = self._optimizer
        codecs = optimizer.codecs(param, group)
        state = optimizer.state_of(param, group)
        moments = {name: codec.decode(split(state, name)) for name, codec in codecs.items()}
        lost = state["compensation"] if optimizer.compensates(param, group) else None
        t, lr = int(state["step"]) + 1, learning_rate(group["lr"])
        shared = {k: group[k].to(param.device, torch.float32) for k in optimizer.shared}
        chosen = {**features.DEFAULTS, **group}  # a class may refuse some
        h = SimpleNamespace(**chosen | shared | {"lr": lr, "t": t, "index": index, "codec": codecs})
        h.rate = reference.rate(h)
        key = mix(group["seed"], index, t)

        w, raw = param.float(), grad_of(param).float()
        if lost is not None:
            w = w + lost.float()
        h.usable = features.usable(raw)
        g = features.clipped(h, torch.where(h.usable, raw, 0.0) * coefficient)
        if h.orthograd:
            g = torch.where(h.usable, features.orthogonal(w, g), 0.0)

        u, moments = optimizer.rule(h, w, g, moments)
        state["step"] += 1
        state["nonfinite"] += (~h.usable).sum()
        _store(moments, codecs, state, key)
        if u is not None:
            own = [codec for codec in codecs.values() if codec.shape == tuple(param.shape)]
            if any(isinstance(codec, FactoredSign) for codec in own):
                u = torch.where(raw == 0, 0.0, u)  # else its neighbours' momentum would move it
            u = features.aligned(h, u, g)
            moved = w - h.rate * (features.decayed(h, w, u) + u)
            w = torch.where(h.usable, moved, w)
            view = optimizer.layout(param, group)
            if h.rounding == "stochastic" and param.dtype == torch.bfloat16:
                param.copy_(round_stochastic_bf16(w, key, view))
            else:
                param.copy_(w)
            if lost is not None:
                rest = w - param.float()
                if param.dtype == torch.bfloat16:  # rounded to nearest, a small step would be lost
                    rest = round_stochastic_bf16(rest, key, view)
                lost.copy_(rest)

    def _estimate(
        self, index: int, group: dict[str, Any], param: Tensor, coefficient: float
    ) -> None:
        """An estimate of one parameter's curvature: decode, average, encode."""
        codecs = self._optimizer.codecs(param, group)
        state = self._optimizer.state_of(param, group)
        raw = grad_of(param).float()
        h = SimpleNamespace(**group | {"usable": features.usable(raw)})
        g = torch.where(h.usable, raw, 0.0)
        state["nonfinite"] += (~h.usable).sum()
        moments = {name: codecs[name].decode(split(state, name)) for name in plan.ESTIMATED}
        moments = reference.curved(h, g, moments, coefficient**2)
        key = mix(mix(group["seed"], index, int(state["step"])), _ESTIMATE)
        _store(moments, codecs, state, key)


def _store(
    moments: dict[str, Tensor], codecs: dict[str, Codec], state: dict[str, Tensor], key: int
) -> None:
    """Encode moments into a parameter's state.  key: of its rounding draws."""
    for name, salt in salts(codecs).items():
        if name in moments:
            parts = codecs[name].encode(moments[name], key, salt)
            for part, value in join({name: parts}).items():
                state[part].copy_(value)


def unavailable(device: str) -> str | None:
    """Why devices of this type have no fused engine, or None if they have one."""
    if device == "cpu":
        return native.unavailable()
    if device == "cuda":
        return gpu.unavailable()
    return f"there is no fused engine for {device}"


def fused_engine(optimizer: RuledOwner, device: torch.device, rule: str | None = None) -> Engine:
    """The fused engine of a device that has one; `rule` overrides the optimizer's own rule."""
    own = optimizer.rule.__name__
    if rule is None and own in plan.PROJECTED:
        return projected_engine(optimizer, device, plan.PROJECTED[own])
    if rule is None and own in plan.ORTHOGONALIZED:
        make = engines_on(device)
        return OrthogonalEngine(optimizer, plan.ORTHOGONALIZED[own], make, device)
    return descriptor_engine(optimizer, device, rule or own)


def projected_engine(optimizer: RuledOwner, device: torch.device, dense: str) -> Engine:
    """The engine of an APOLLO that steps projections and unprojected tensors by rule `dense`."""
    make = engines_on(device)
    if device.type == "cuda":
        return CudaProjectedEngine(optimizer, dense, make, cuda.indexed(device))
    return NativeProjectedEngine(optimizer, dense, make, device)


def engines_on(device: torch.device) -> Make:
    """What makes the engines of a device that step an engine's stand-ins."""
    return lambda owner, rule: descriptor_engine(owner, device, rule)


def descriptor_engine(owner: Owner, device: torch.device, rule: str) -> Engine:
    """The engine that runs one rule on an owner's tensors."""
    if device.type == "cuda":
        return cuda.CudaEngine(owner, rule, cuda.indexed(device))
    return native.NativeEngine(owner, rule)


def resolve(choice: str, devices: set[str]) -> str:
    """Resolve a `backend` argument for parameters on these device types: -> native (if any of them
    has a fused engine) or torch.  "auto" reads OPTIM_BACKEND, then takes what is available.

    Raises ValueError for an unknown name, RuntimeError if "native" is requested but unavailable.
    Warns once when falling back.
    """
    if choice == "auto":
        choice = os.environ.get("OPTIM_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"OPTIM_BACKEND={choice} is not one of {', '.join(BACKENDS)}")
    return resolved(choice, devices, strict=choice == "native")


def resolved(choice: str, devices: set[str], strict: bool) -> str:
    """As `resolve`, but without OPTIM_BACKEND; `strict` raises instead of falling back."""
    if choice == "torch":
        return "torch"
    missing = {device: unavailable(device) for device in sorted(devices or {"cpu"})}
    for reason in filter(None, missing.values()):
        if strict:
            raise RuntimeError(f"backend='native' is not available: {reason}")
        fall_back(reason)
    return "torch" if all(missing.values()) else "native"


class SlowBackend(RuntimeWarning):
    """Plain PyTorch replaces a fused engine."""


def fall_back(reason: str) -> None:
    """Warn once that plain PyTorch replaces a fused engine."""
    message = f"the optimizers run on plain PyTorch, which is slower; {reason}"
    if message not in _said:
        _said.add(message)
        warnings.warn(message, SlowBackend, stacklevel=3)
