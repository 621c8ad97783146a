"""The training loss: how far the UNet's prediction is from its target, and how much that counts.

The loss of a batch is the mean over all of its elements of `factor * distance`, in fp32.  The
factor of an element is the product of

- its sample's `loss_weights` (for regularisation pictures, the weight of prior preservation of
  Ruiz et al. 2022, arXiv 2208.12242),
- the weight of its sample's timestep (`timestep_weights`),
- its mask, raised to unmasked_weight + (1 - unmasked_weight) * mask.

Nothing is divided by the sum of factors.  So a mask of ones has no effect, the part of a picture
inside its mask has the same gradient as without a mask, and the mean over equal micro-batches is
the loss of all their samples together.  A shorter batch has the mean over its own elements.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.config import HuberConfig, LossConfig
from trainer.formats.schedulers import EPSILON
from trainer.models.execution import on_device
from trainer.objective.batches import Batch, predict
from trainer.objective.noise_schedule import NoiseSchedule

_PARTS = 4  # of the timestep range, reported separately by evaluation


def loss(
    config: LossConfig, noise_schedule: NoiseSchedule, prediction: Tensor, batch: Batch
) -> Tensor:
    """The mean over all elements of the configured distance times its factor: prediction fp32
    (B, 4, h, w) -> 0-d."""
    target = on_device(batch.target, prediction.device)
    if isinstance(config, HuberConfig):
        distance = _huber(config, noise_schedule, prediction, target, batch.timesteps)
    else:
        distance = F.mse_loss(prediction, target, reduction="none")
    weights = factor(config, noise_schedule, batch)
    if weights is not None:
        distance = distance * on_device(weights, prediction.device)
    return distance.mean()


@torch.no_grad()
def squared_error(prediction: Tensor, batch: Batch) -> Tensor:
    """What `evaluate` measures, of a training batch: prediction fp32 (B, 4, h, w) -> 0-d.  (Noise
    that is not white, which `evaluate` has none of, may add `noise.unforeseen`.)"""
    return F.mse_loss(prediction, on_device(batch.target, prediction.device))


def factor(config: LossConfig, noise_schedule: NoiseSchedule, batch: Batch) -> Tensor | None:
    """The factor of each element: -> fp32, broadcastable to (B, 4, h, w); None for 1."""
    factors = []
    if batch.loss_weights is not None:
        factors.append(batch.loss_weights.float().view(-1, 1, 1, 1))
    if config.weighting != "none":
        factors.append(timestep_weights(config, noise_schedule, batch.timesteps).view(-1, 1, 1, 1))
    if batch.mask is not None:
        inside = batch.mask.float()
        factors.append(config.unmasked_weight + (1 - config.unmasked_weight) * inside)
    if not factors:
        return None
    return math.prod(factors[1:], start=factors[0])


def timestep_weights(
    config: LossConfig, noise_schedule: NoiseSchedule, timesteps: Tensor
) -> Tensor:
    """The weight of each sample's squared error by its timestep's SNR: int64 (B,) -> fp32 (B,).

    The papers weight the squared error of the noise e.  With x_t = a x + s e, that of v or of a
    flow is 1 / a^2 times as large (for v: Salimans & Ho 2022, arXiv 2202.00512, app. D), so its
    weight is the same times a^2 = s^2 SNR.

        min_snr   e: min(SNR, gamma) / SNR    v, flow: s^2 min(SNR, gamma)
        debiased  e: 1 / sqrt(SNR)            v, flow: s^2 sqrt(SNR)

    Hang et al. 2023 (arXiv 2303.09556); Yu et al. 2023 (arXiv 2310.08442).  At zero
    terminal SNR, which epsilon prediction cannot have, both are 0.
    """
    ratio = noise_schedule.snr(timesteps)
    if noise_schedule.prediction == EPSILON:
        is_min = config.weighting == "min_snr"
        return (config.gamma / ratio).clamp(max=1) if is_min else ratio.rsqrt()
    wanted = ratio.clamp(max=config.gamma) if config.weighting == "min_snr" else ratio.sqrt()
    return noise_schedule.sigma[timesteps].square() * wanted


def huber_deltas(config: HuberConfig, noise_schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """The error above which each sample's loss is linear: int64 (B,) -> fp32 (B,).

    Khrapov et al. 2024 (arXiv 2403.16728): from 1 without noise to `delta` at pure noise,
    exponentially in the timestep (delta^(t / T)), or with sigma^2 = 1 / SNR as
    (1 - delta) / (1 + sigma)^2 + delta.  They schedule the pseudo-Huber loss; here it is Huber's.
    """
    if config.schedule == "exponential":
        return config.delta ** (timesteps.float() / noise_schedule.count)
    root = noise_schedule.snr(timesteps).sqrt()  # 1 / sigma
    return (1 - config.delta) * (root / (root + 1)).square() + config.delta


@torch.no_grad()
def evaluate(
    unet: UNet2DConditionModel, noise_schedule: NoiseSchedule, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean squared error over fixed eval batches: {"loss": ..., "loss_t000_250": ..., ...}, over
    all elements and over those in each quarter of the timesteps that has any.

    Always the plain MSE, without weights and masks, so that runs with any loss can be compared.
    """
    count = noise_schedule.count
    total, elements = 0.0, 0
    sums, sizes = [0.0] * _PARTS, [0] * _PARTS
    for batch in batches:
        error = predict(unet, batch) - batch.target.to(unet.device)
        squares = error.double().square()
        total += squares.sum().item()
        elements += squares.numel()
        per_sample = zip(batch.timesteps.tolist(), squares.flatten(1).sum(1).tolist(), strict=True)
        for timestep, value in per_sample:
            sums[timestep * _PARTS // count] += value
            sizes[timestep * _PARTS // count] += squares[0].numel()
    named = zip(_parts(count), sums, sizes, strict=True)
    return {"loss": total / elements} | {name: x / size for name, x, size in named if size}


def at_timesteps(found: Mapping[str, float], timesteps: Tensor, count: int) -> float:
    """The mean loss of samples with these timesteps, of `count`, as `evaluate` found it in their
    quarters."""
    of_part = [found[name] for name in _parts(count)]
    return fmean(of_part[timestep * _PARTS // count] for timestep in timesteps.tolist())


def cover_all_timesteps(found: Mapping[str, float]) -> bool:
    """Whether `evaluate` had points in all quarters of the timesteps."""
    return sum(name.startswith("loss_t") for name in found) == _PARTS


def _parts(count: int) -> list[str]:
    """The names of the losses in each quarter of the timesteps."""
    edges = [part * count // _PARTS for part in range(_PARTS + 1)]
    return [f"loss_t{low:03d}_{high:03d}" for low, high in pairwise(edges)]


def _huber(
    config: HuberConfig,
    noise_schedule: NoiseSchedule,
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Huber's distance of each element: (B, 4, h, w)."""
    if config.schedule == "constant":
        return F.huber_loss(prediction, target, reduction="none", delta=config.delta)
    delta = on_device(
        huber_deltas(config, noise_schedule, timesteps).view(-1, 1, 1, 1), prediction.device
    )
    error = (prediction - target).abs()
    return torch.where(error <= delta, error.square() / 2, delta * (error - delta / 2))
