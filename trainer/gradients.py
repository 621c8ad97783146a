"""From a loss to gradients: all of them first, or each consumed as it arrives
(`runtime.fused_backward`).

What needs all gradients before a step (a global norm to clip by, the guard's judgement of it) can
only be had in the first way; `trainer.validate` refuses it in the second.  The norm is reported in
both, and is the same.
"""

import math

import torch
from torch import Tensor

import optim
from trainer.config import Config

_BUCKET_BYTES = 64 << 20  # of gradients alive at once, or this share of them all if that is less:
_BUCKET_SHARE = 16


def make(
    config: Config, parameters: list[Tensor], optimizer: torch.optim.Optimizer
) -> "Gathered | Consumed":
    """The way that the configuration chooses."""
    if config.runtime.fused_backward:
        assert isinstance(optimizer, optim.FusedOptimizer)
        return Consumed(parameters, optimizer)
    return Gathered(parameters, config.method.max_grad_norm)


class Gathered:
    """A backward pass that keeps all gradients for the step that follows."""

    def __init__(self, parameters: list[Tensor], max_norm: float | None) -> None:
        self._parameters, self._max_norm = parameters, max_norm

    def backward(self, loss: Tensor) -> float:
        """Evaluate the gradients, clip their global norm where a maximum is set; returns it as it
        was before."""
        loss.backward()
        max_norm = self._max_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm).item()


class Consumed:
    """A backward pass inside which the optimizer steps and frees the gradients, a bucket at a time.

    A loss that is not finite gets no backward pass, so that it changes nothing.  A gradient that is
    not finite under a finite loss is found too late for that: the optimizer leaves its elements
    alone (`on_nonfinite=skip`), and steps the others.
    """

    def __init__(self, parameters: list[Tensor], optimizer: optim.FusedOptimizer) -> None:
        self._parameters = parameters
        self._norms: dict[Tensor, Tensor] = {}
        for parameter in parameters:  # before the optimizer's hooks, which free the gradient
            parameter.register_post_accumulate_grad_hook(self._measure)
        total_bytes = sum(p.numel() * p.element_size() for p in parameters)
        optim.fuse_backward(optimizer, max(1, min(_BUCKET_BYTES, total_bytes // _BUCKET_SHARE)))

    def backward(self, loss: Tensor) -> float:
        """Evaluate the gradients and step all but the last bucket, which the optimizer's `step`
        takes; returns the global norm, NaN where there was no backward pass."""
        self._norms.clear()
        if not math.isfinite(loss.item()):
            return math.nan
        loss.backward()
        norms = [self._norms[p] for p in self._parameters if p in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms)).item()

    def _measure(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
