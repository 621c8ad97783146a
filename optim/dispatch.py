"""Which engine steps which parameters of an optimizer, depending on its rule, their groups'
options, and their devices."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optim import backend, native, plan, reference
from optim.interface import Engine, RuledOwner
from optim.share import Places, Share, Trait

CPU = torch.device("cpu")


def has_rule(rule: Callable[..., Any]) -> bool:
    """Whether the fused engines compute this rule: a function of `optim/reference.py` that has a
    kernel, not another one of its name."""
    name = getattr(rule, "__name__", "")
    known = {*plan.RULES, *plan.PROJECTED, *plan.ORTHOGONALIZED}
    return name in known and rule is getattr(reference, name, None)


class Dispatch:
    """The engines of one optimizer, created when first needed.  The optimizer owns them, so they
    refer to it by a weak reference: its state is freed as soon as it is deleted."""

    def __init__(self, optimizer: RuledOwner) -> None:
        self._optimizer = optimizer
        self.engines: dict[tuple[torch.device, str | None], Engine | None] = {}

    def shares(self, every: Share, rule: str | None = None) -> list[tuple[Engine, Share]]:
        """The engines with the parameters that each steps; `rule` overrides the optimizer's own."""
        torch_engine = backend.TorchEngine(self._optimizer, rule)
        if not self._is_fused():
            return [(torch_engine, every)]
        if Trait.HIDDEN in every.traits:
            backend.fall_back("a tensor without its own memory has no fused kernel")
            return [(torch_engine, every)]
        if Trait.ELSEWHERE not in every.traits and not any(map(_unfused, every.groups)):
            return [(self.engine(CPU, rule) or torch_engine, every)]
        self.say_what_is_unfused()
        places: dict[torch.device | None, Places] = {}  # by device; None: without a fused engine
        for place in every:
            device = None if _unfused(place[1]) else place[2].device
            places.setdefault(device, Places()).append(place)
        shares = []
        for device, some in places.items():
            engine = self.engine(device, rule) if device else None
            share = Share(some) if len(places) > 1 else every
            shares.append((engine or torch_engine, share))
        return shares

    def engine(self, device: torch.device, rule: str | None = None) -> Engine | None:
        """The fused engine of a device, if it has one."""
        key = (device, rule)
        if key not in self.engines:
            reason = backend.unavailable(device.type)
            if reason:
                backend.fall_back(reason)
            self.engines[key] = (
                None if reason else backend.fused_engine(self._optimizer, device, rule)
            )
        return self.engines[key]

    def counts_on(self, param: Tensor) -> torch.device:
        """The device of a parameter's step count: where its engine reads it."""
        on_device = self._is_fused() and param.is_cuda and backend.unavailable("cuda") is None
        return param.device if on_device else CPU

    def say_what_is_unfused(self) -> None:
        """Warn once about what prevents a fused engine: the rule, or options."""
        optimizer = self._optimizer
        if optimizer.backend != "native":
            return
        name = optimizer.__class__.__name__
        if not has_rule(optimizer.rule):
            backend.fall_back(f"{name} has no fused kernel")
            return
        for option in filter(None, map(_unfused, optimizer.param_groups)):
            backend.fall_back(f"{name} with {option} has no fused kernel")

    def in_words(self) -> str:
        """`FusedOptimizer.engine`."""
        optimizer = self._optimizer
        if not has_rule(optimizer.rule):
            name = optimizer.__class__.__name__
            return f"plain PyTorch, which is slower; {name} has no fused kernel"
        engines = []
        for device in sorted(device_types(optimizer.param_groups) or {"cpu"}):
            numbers: dict[str, list[str]] = {}  # group numbers, by what steps them
            for number, group in enumerate(optimizer.param_groups):
                if device in (device_types([group]) or {device}):
                    numbers.setdefault(self._stepper(device, group), []).append(str(number))
            engines += [
                who if len(numbers) == 1 else f"{who} (group{'s'[: len(its) - 1]} {', '.join(its)})"
                for who, its in numbers.items()
            ]
        return ", ".join(engines)

    def _stepper(self, device: str, group: dict[str, Any]) -> str:
        """What steps a group's parameters on this type of device, in words."""
        on = f"on {device.upper()}" if device != "cpu" else "on a CPU"
        reason, option = backend.unavailable(device), _unfused(group)
        if reason is None and self._optimizer.backend == "torch":
            return f"plain PyTorch {on}; backend=torch was chosen"
        if reason is None and option:
            reason = f"{option} has no fused kernel"
        if reason:
            return f"plain PyTorch {on}, which is slower; {reason}"
        isa = f" ({native.isa()})" if device == "cpu" else ""
        return f"the native engine{isa} {on}"

    def _is_fused(self) -> bool:
        """Whether fused engines are chosen and have the optimizer's rule."""
        optimizer = self._optimizer
        return optimizer.backend == "native" and has_rule(optimizer.rule)


def device_types(groups: Iterable[dict[str, Any]]) -> set[str]:
    """The device types of the groups' parameters."""
    devices = {param.device.type for group in groups for param in group["params"]}
    return devices - {"meta"}  # only used to count bytes


def _unfused(group: dict[str, Any]) -> str | None:
    """The option of a group that only plain PyTorch supports, if any: batches of small matrices,
    and updates that are mapped back from a projection."""
    if group.get("conv_view") == "last2":
        return "conv_view=last2"
    return "residual=True" if group.get("residual") else None
