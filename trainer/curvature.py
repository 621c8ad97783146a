"""The extra backward pass that Sophia asks for every few steps: its estimate of the curvature.

Liu et al. 2023 (arXiv 2305.14342), Alg. 2 (Gauss-Newton-Bartlett), for a squared error: the target
is sampled from the normal distribution of unit variance around the model's own prediction, and the
squared gradient of that loss, scaled, is the diagonal of the Gauss-Newton matrix on average.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import optim
from trainer import batches, gradients, noise
from trainer.streams import Stream


def is_due(optimizer: Any) -> bool:
    """Whether an estimate is wanted before this step."""
    return isinstance(optimizer, optim.Sophia) and optimizer.wants_hessian()


def estimate(
    optimizer: Any,
    backward: gradients.GatheredBackward | gradients.FusedBackward,
    predict: Callable[[], tuple[Tensor, Tensor | None]],
    seed: int,
    step: int,
) -> None:
    """Where `optimizer` wants an estimate before this step, make it; else `predict` is not called.

    `backward` is how a backward pass's gradients are used.  `predict` gives the model's prediction
    for a batch and how often the squared error of each element counts in the loss
    (`losses.factor`); None: once.

    The noise is a function of (seed, step, place in the batch).  The loss is the mean over the n
    elements of the prediction, so the scale is n / 2: `Sophia.update_hessian`.  Where an element's
    squared error counts f times, its target has the variance 1 / f; the gradient of that is the
    plain squared error's with noise of sqrt(f) times the unit, which a factor of 0 has as well.
    """
    if not is_due(optimizer):
        return
    prediction, factor = predict()
    drawn = bartlett_noise(prediction[0], len(prediction), seed, step)
    if factor is not None:
        drawn = drawn * factor.sqrt()
    target = prediction.detach() + batches.on_device(drawn, prediction.device)
    scale = prediction.numel() / 2
    with backward.handing_to(lambda *params: optimizer.update_hessian(scale, params or None)):
        F.mse_loss(prediction, target).backward()


def bartlett_noise(like: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Unit noise added to the prediction to sample the targets: like (4, h, w) -> (count, 4, h, w),
    on the CPU."""
    draws = [noise.normal(like.shape, Stream.CURVATURE, seed, step, i) for i in range(count)]
    return torch.stack(draws)
