"""FusedOptimizer: the only step() in the family, for every rule and storage."""

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from optim import features, groups, options
from optim.backend import grad_of
from optim.base import StatefulOptimizer
from optim.share import Places, Share, Trait

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """`torch.compiler.disable` with the function's own type, but dynamo, which takes a second, is
    imported at the first call.  Without it dynamo would trace every shape and option of a step:
    minutes for nothing."""
    return cast(Function, torch._disable_dynamo(function))  # torch's own optimizers use it


class FusedOptimizer(StatefulOptimizer):
    """A torch optimizer made of a rule and the codecs of its moments.

    A subclass names its `rule` and says in `moments` how each moment of a parameter is stored; it
    has no loop.  Its options are its signature's (`lr` and `weight_decay` among them) and those of
    `Features` that it does not refuse.  A subclass that names no rule extends its base: it may
    change defaults (`own_defaults`), and its constructor may take any arguments.
    Arithmetic is fp32 whatever the parameter's dtype.  Weight decay is decoupled:
    w <- (1 - lr * weight_decay) w, before the update.

    `backend` selects what computes a step: "native" (`csrc/`, on a CPU and on CUDA) or "torch"; see
    `optim/state.py` for the layout of the state.
    """

    def end_step(self) -> None:
        """Called last in `step()`, after every parameter has been stepped."""

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
        places = self._places()
        self._watch.check(self.param_groups)
        share = Share(places)
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
    def _watch(self) -> options.OptionWatch:
        agree = partial(groups.check_agreement, type(self))
        return options.OptionWatch(type(self).__name__, self._options(), agree)

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

    def engine(self) -> str:
        """What steps which parameters, in words: the native engine, on a CPU with its instruction
        set, or plain PyTorch with the reason."""
        return self._dispatch.in_words()

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
        self._places()  # completes new groups
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
