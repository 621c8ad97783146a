"""From losses to clipped gradients: all of them gathered first, or each consumed as it arrives
(`runtime.fused_backward`).

A step's gradient is that of the mean over the samples of all its micro-batches
(`runtime.accumulation`), also of those that other processes have.  Both ways report the same norm,
before any clip (`trainer.training.clipping`).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import optim
from trainer.config import Config
from trainer.system import processes
from trainer.training.clipping import Clip

log = logging.getLogger(__name__)

# Gradients alive at once, by device type (a GPU needs more work per launch), or this share of all
# gradients if that is less:
_BUCKET_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
_BUCKET_SHARE = 16

# The forward pass of a micro-batch, by its place in the step; it may be called twice.
LossOf = Callable[[int], Tensor]


@dataclass(kw_only=True)
class Outcome:
    """The result of a step's backward passes."""

    loss: float  # the mean over the step's samples
    grad_norm: float  # of all gradients, before clipping; NaN if a loss is not finite
    begun: bool  # whether the optimizer has stepped some tensors already


def make(
    config: Config,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    last_norm: float = math.nan,
) -> "GatheredBackward | FusedBackward":
    """The configured kind; `last_norm` is the gradient norm of the previous step, if there was
    one."""
    clip = Clip(config.method.clip, config.method.max_grad_norm, parameters, last_norm)
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

    def of_step(self, loss_of: LossOf, shares: Sequence[float] = (1.0,)) -> Outcome:
        """Evaluate the gradient of the sum of share * loss over micro-batches, and clip it.

        `shares`: each micro-batch's share of the step's samples; those of all processes sum to 1.
        """
        total = 0.0
        for place, share in enumerate(shares):
            loss = _weighted(loss_of, place, share)
            loss.backward()
            total += loss.item()
        # First, since this notices at once if another process has failed; NCCL's sums would hang.
        total = processes.total(total)
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
        return Outcome(loss=total, grad_norm=norm, begun=False)

    @contextmanager
    def handing_to(self, consume: Callable[..., None]) -> Iterator[None]:
        """For a pass that is not a training step (Sophia's estimate): calls `consume()` after
        it."""
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
        for parameter in parameters:  # before the optimizer's hooks, which free the gradient
            parameter.register_post_accumulate_grad_hook(self._arrived)
        self._hooks = optim.fuse_backward(optimizer, bucket_bytes(parameters), summed=True)

    def of_step(self, loss_of: LossOf, shares: Sequence[float] = (1.0,)) -> Outcome:
        """Evaluate the gradient of the sum of share * loss over micro-batches, and step all but the
        last bucket, which is left to the optimizer's `step`.

        `shares` as in `GatheredBackward.of_step`.
        """
        self._bounding = self.clip.last_norm
        if self.clip.needs_this_norm():
            if len(shares) > 1:  # all gradients are alive anyway: nothing to gain by a second pass
                with self._hooks.holding():
                    return self._gathered.of_step(loss_of, shares)
            first = self._measure(loss_of, shares[0])
            if not math.isfinite(first.grad_norm):
                return first
            self._bounding = first.grad_norm
        return self._step(loss_of, shares)

    def handing_to(self, consume: Callable[..., None]) -> AbstractContextManager[None]:
        """For a pass that is not a training step (Sophia's estimate): its gradients go to
        `consume(*params)`, one bucket at a time."""
        return self._hooks.handing_to(consume)

    def _measure(self, loss_of: LossOf, share: float) -> Outcome:
        """A backward pass that only measures the gradients, one bucket at a time."""

        def consume(*parameters: Tensor) -> None:
            processes.sum_gradients(*parameters)
            self.clip.measure(*parameters)

        loss = _weighted(loss_of, 0, share)
        value, norm = processes.total(loss.item()), math.nan
        if math.isfinite(value):
            self.clip.forget()
            with self._hooks.handing_to(consume):
                loss.backward()
            norm = self.clip.norm()
        return Outcome(loss=value, grad_norm=norm, begun=False)

    def _step(self, loss_of: LossOf, shares: Sequence[float]) -> Outcome:
        """The backward passes, the last of which consumes the gradients."""
        clip, total = self.clip, 0.0
        clip.forget()
        for place, share in enumerate(shares):
            loss = _weighted(loss_of, place, share)
            total += processes.total(loss.item())
            if not math.isfinite(total):
                return Outcome(loss=total, grad_norm=math.nan, begun=False)
            self._is_last_pass = place == len(shares) - 1
            with nullcontext() if self._is_last_pass else self._hooks.holding():
                loss.backward()
        self._is_last_pass = False
        for parameter in self._parameters:  # those that only earlier micro-batches reached
            if parameter.grad is not None and not clip.measured(parameter):
                self._complete(parameter)
        norm = clip.norm()
        clip.end_step(norm)
        return Outcome(loss=total, grad_norm=norm, begun=True)

    def _arrived(self, parameter: Tensor) -> None:
        if self._is_last_pass:
            self._complete(parameter)

    def _complete(self, parameter: Tensor) -> None:
        """Sum this process's gradient with the others', and clip it."""
        processes.sum_gradients(parameter)
        self.clip.measure(parameter)
        self.clip.scale(parameter, self._bounding)


def _weighted(loss_of: LossOf, place: int, share: float) -> Tensor:
    loss = loss_of(place)
    return loss * share if share != 1 else loss
