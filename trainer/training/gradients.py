"""From losses to clipped gradients: all of them gathered first, or each consumed as it arrives
(`runtime.fused_backward`).

A step's gradient is that of the mean over the samples of all its micro-batches
(`runtime.accumulation`), also of those that other processes have.  Both ways report the same norm,
before any clip (`trainer.training.clipping`).
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import optim
from trainer.config import Config
from trainer.system import processes
from trainer.training.clipping import Clip

# Gradients alive at once, by device type (a GPU needs more work per launch), or this share of all
# gradients if that is less:
_BUCKET_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
_BUCKET_SHARE = 16


@dataclass
class Pass:
    """The forward pass of a micro-batch, which may run twice."""

    forward: Callable[[], Tensor]  # its loss
    share: float = 1.0  # of the step's samples

    def loss(self) -> Tensor:
        """Its share of the step's loss."""
        loss = self.forward()
        return loss * self.share if self.share != 1 else loss


@dataclass(kw_only=True)
class Outcome:
    """The result of a step's backward passes."""

    loss: float  # the mean over the step's samples
    grad_norm: float  # of all gradients, before clipping; NaN if a loss is not finite
    partially_applied: bool  # whether the optimizer has stepped some tensors already


class Backward(Protocol):
    """The backward passes of a step."""

    clip: Clip

    def run(self, passes: Sequence[Pass]) -> Outcome:
        """Evaluate the clipped gradient of the sum of this process's losses and the others'."""
        ...

    def handing_to(self, consume: Callable[..., None]) -> AbstractContextManager[None]:
        """A block for a backward pass that is not a training step (Sophia's estimate): `consume`
        gets its gradients instead of the optimizer."""
        ...


def make(
    config: Config, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> Backward:
    """The configured kind."""
    clip = Clip(config.method.clip, config.method.max_grad_norm, parameters)
    if not config.runtime.fused_backward:
        return GatheredBackward(parameters, clip)
    assert isinstance(optimizer, optim.FusedOptimizer)
    return FusedBackward(parameters, optimizer, clip)


def bucket_bytes(parameters: Sequence[Tensor], device_type: str | None = None) -> int:
    """How many bytes of gradients are gathered before they are consumed, on the parameters' devices
    or on one of this type."""
    total = sum(p.numel() * p.element_size() for p in parameters)
    largest = max(_BUCKET_BYTES[device_type or p.device.type] for p in parameters)
    return max(1, min(largest, total // _BUCKET_SHARE))


class GatheredBackward:
    """Backward passes that keep all gradients for the step that follows."""

    def __init__(self, parameters: Sequence[Tensor], clip: Clip) -> None:
        self._parameters, self.clip = parameters, clip

    def run(self, passes: Sequence[Pass]) -> Outcome:
        """Evaluate the gradient, and clip it.  The shares of all processes' passes sum to 1."""
        losses = []
        for one in passes:
            loss = one.loss()
            loss.backward()
            losses.append(loss.detach())
        # First, since this notices at once if another process has failed; NCCL's sums would hang.
        total = processes.total(sum(loss.item() for loss in losses))
        clip, reached = self.clip, [p for p in self._parameters if p.grad is not None]
        processes.sum_gradients(*reached)
        clip.forget()
        clip.measure(*reached)
        norm = clip.norm()
        bounding = norm if clip.needs_this_norm() else clip.last_norm
        for parameter in self._parameters:
            if clip.measured(parameter):
                clip.scale(parameter, bounding)
        clip.end_step(norm)
        return Outcome(loss=total, grad_norm=norm, partially_applied=False)

    @contextmanager
    def handing_to(self, consume: Callable[..., None]) -> Iterator[None]:
        """Calls `consume()` after the pass, for all gradients."""
        yield
        consume()


class FusedBackward:
    """Backward passes, the last of which steps and frees the gradients one bucket at a time.

    A loss that is not finite gets no backward pass, so it changes nothing.  If only a gradient is
    not finite, that is found too late, unless an earlier pass has measured the norm: the optimizer
    skips its non-finite elements (`on_nonfinite=skip`), and steps the others.

    All micro-batches but the last only accumulate gradients, which all stay alive until then.
    """

    def __init__(
        self, parameters: Sequence[Tensor], optimizer: optim.FusedOptimizer, clip: Clip
    ) -> None:
        self._parameters, self.clip = parameters, clip
        self._gathered = GatheredBackward(parameters, clip)
        self._bounding = math.nan  # the norm that this step is clipped by
        self._is_last_pass = False  # in which gradients are complete, and are consumed
        this = weakref.ref(self)  # a hook that kept it would keep the parameters, its own, alive

        def arrived(parameter: Tensor) -> None:
            if (backward := this()) is not None and backward._is_last_pass:
                backward._complete(parameter)

        for parameter in parameters:  # before the optimizer's hooks, which free the gradient
            parameter.register_post_accumulate_grad_hook(arrived)
        self._hooks = optim.fuse_backward(optimizer, bucket_bytes(parameters), summed=True)

    def run(self, passes: Sequence[Pass]) -> Outcome:
        """Evaluate the gradient, and step all but the last bucket, which is left to the optimizer's
        `step`."""
        self._bounding = self.clip.last_norm
        if self.clip.needs_this_norm():
            if len(passes) > 1:  # all gradients are alive anyway: nothing to gain by a second pass
                with self._hooks.holding():
                    return self._gathered.run(passes)
            first = self._measure(passes[0])
            if not math.isfinite(first.grad_norm):
                return first
            self._bounding = first.grad_norm
        return self._step(passes)

    def handing_to(self, consume: Callable[..., None]) -> AbstractContextManager[None]:
        """Calls `consume(*params)` with one bucket at a time."""
        return self._hooks.handing_to(consume)

    def _measure(self, one: Pass) -> Outcome:
        """A backward pass that only measures the gradients, one bucket at a time."""

        def consume(*parameters: Tensor) -> None:
            processes.sum_gradients(*parameters)
            self.clip.measure(*parameters)

        loss = one.loss()
        value, norm = processes.total(loss.item()), math.nan
        if math.isfinite(value):
            self.clip.forget()
            with self._hooks.handing_to(consume):
                loss.backward()
            norm = self.clip.norm()
        return Outcome(loss=value, grad_norm=norm, partially_applied=False)

    def _step(self, passes: Sequence[Pass]) -> Outcome:
        """The backward passes, the last of which consumes the gradients."""
        clip, total = self.clip, 0.0
        clip.forget()
        for one in passes:
            loss = one.loss()
            total += processes.total(loss.item())
            if not math.isfinite(total):
                return Outcome(loss=total, grad_norm=math.nan, partially_applied=False)
            self._is_last_pass = one is passes[-1]
            with nullcontext() if self._is_last_pass else self._hooks.holding():
                loss.backward()
        self._is_last_pass = False
        for parameter in self._parameters:  # those that only earlier micro-batches reached
            if parameter.grad is not None and not clip.measured(parameter):
                self._complete(parameter)
        norm = clip.norm()
        clip.end_step(norm)
        return Outcome(loss=total, grad_norm=norm, partially_applied=True)

    def _complete(self, parameter: Tensor) -> None:
        """Sum this process's gradient with the others', and clip it."""
        processes.sum_gradients(parameter)
        self.clip.measure(parameter)
        self.clip.scale(parameter, self._bounding)
