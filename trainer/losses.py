"""The training loss: how far the UNet's prediction is from its target."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.batches import Batch, predict
from trainer.config import HuberConfig


def loss(config: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over all elements of the configured distance: (B, 4, h, w) twice -> 0-d."""
    target = target.to(prediction.device)
    if isinstance(config, HuberConfig):
        return F.huber_loss(prediction, target, delta=config.delta)
    return squared_error(prediction, target)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over all elements of the squared distance: (B, 4, h, w) twice -> 0-d."""
    return F.mse_loss(prediction, target)


@torch.no_grad()
def evaluate(unet: nn.Module, batches: list[Batch]) -> float:
    """Mean squared error over fixed eval batches.  Always the plain MSE, so that runs with any loss
    can be compared."""
    total, count = 0.0, 0
    for batch in batches:
        error = predict(unet, batch) - batch.target.to(unet.device)
        total += error.double().square().sum().item()
        count += error.numel()
    return total / count
