"""Sophia's estimate of the curvature: an extra backward pass every few steps.

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
from trainer.models.execution import on_device
from trainer.objective import noise
from trainer.streams import Stream
from trainer.training import gradients


def is_due(optimizer: Any) -> bool:
    """Whether an estimate is wanted before this step."""
    return isinstance(optimizer, optim.Sophia) and optimizer.wants_hessian()


def estimate(
    optimizer: Any,
    backward: gradients.Backward,
    predict: Callable[[], tuple[Tensor, Tensor | None]],
    seed: int,
    step: int,
) -> None:
    """Make an estimate if `optimizer` wants one before this step; else `predict` is not called.

    `backward` passes the gradients on.  `predict` returns the model's prediction for a batch and
    the factor of each element's squared error in the loss (`losses.factor`); None: 1.

    The noise is a function of (seed, step, place in the batch).  The loss is the mean over the n
    elements of the prediction, so the scale is n / 2: `Sophia.update_hessian`.  With a factor f, an
    element's target has the variance 1 / f.  The gradient is the same as the plain squared error's
    with unit noise times sqrt(f), which is also defined for f = 0.
    """
    if not is_due(optimizer):
        return
    prediction, factor = predict()
    drawn = bartlett_noise(prediction[0], len(prediction), seed, step)
    if factor is not None:
        drawn = drawn * factor.sqrt()
    target = prediction.detach() + on_device(drawn, prediction.device)
    scale = prediction.numel() / 2
    with backward.handing_to(lambda *params: optimizer.update_hessian(scale, params or None)):
        F.mse_loss(prediction, target).backward()


def bartlett_noise(like: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Unit noise added to the prediction to sample the targets: like (4, h, w) -> (count, 4, h, w),
    on the CPU."""
    draws = [noise.normal(like.shape, Stream.CURVATURE, seed, step, i) for i in range(count)]
    return torch.stack(draws)
