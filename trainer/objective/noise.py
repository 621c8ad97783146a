"""The noise of training: at which timesteps, and how it is drawn.

Every draw depends only on (seed, batch number, place in the batch) and is made on the CPU, so a
sample's noise depends neither on its neighbours nor on the device.
"""

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from optim import rng
from trainer.config import NoiseConfig
from trainer.streams import Stream


def timesteps(config: NoiseConfig, count: int, seed: int, number: int, size: int) -> Tensor:
    """The timesteps of a batch of `size`, out of `count` that the model has: -> int64 (size,).

    Stratified, which lowers the loss's variance: place i draws from the i-th of `size` equally
    likely parts of the distribution.  logit_normal: the share of the range is the logistic function
    of a normal variable; timestep_shift = f: a share u becomes f u / (1 + (f - 1) u) (Esser et al.
    2024, arXiv 2403.03206, sections 3.1 and 5.3.2).
    """
    high = count if config.timestep_high is None else config.timestep_high
    width = high - config.timestep_low
    drawn = []
    for place in range(size):
        share = (place + rng.uniform(seed, Stream.TIMESTEP, number, place)) / size
        if config.timesteps == "logit_normal":
            # Not 0 or 1 exactly, where the normal distribution has no quantile.
            inner = min(max(share, 2.0**-54), 1 - 2.0**-53)
            logit = NormalDist(config.logit_mean, config.logit_std).inv_cdf(inner)
            share = 1 / (1 + math.exp(-logit))
        share = _shifted(share, config.timestep_shift)
        drawn.append(config.timestep_low + min(int(share * width), width - 1))
    return torch.tensor(drawn)


def _shifted(share: float, factor: float) -> float:
    """A share of the range, from 0 to 1, moved towards the noisy end by factors above 1."""
    return factor * share / (1 + (factor - 1) * share)


def draw(config: NoiseConfig, like: Tensor, seed: int, number: int, place: int) -> Tensor:
    """The noise of one sample, for its target: like (C, h, w) -> fp32 (C, h, w)."""
    noise = normal(like.shape, Stream.NOISE, seed, number, place)
    if config.pyramid:
        noise = _pyramid(noise, config.pyramid, seed, number, place)
    if config.offset:
        # Guttenberg 2023, "Diffusion with Offset Noise" (crosslabs.org).
        shift = normal((like.shape[0], 1, 1), Stream.OFFSET, seed, number, place)
        noise = noise + config.offset * shift
    return noise


def perturbed(config: NoiseConfig, noise: Tensor, seed: int, number: int, place: int) -> Tensor:
    """The noise of one sample's input: (C, h, w) -> (C, h, w), the target's plus, for input
    perturbation, some more (Ning et al. 2023, arXiv 2301.11706)."""
    if not config.input_perturbation:
        return noise
    more = normal(noise.shape, Stream.PERTURBATION, seed, number, place)
    return noise + config.input_perturbation * more


def unforeseen(config: NoiseConfig) -> float:
    """The variance of what white noise does not have: of coarse noise (at most), offset and input
    perturbation.  A model trained without them takes it for part of the picture, so its squared
    error is larger by at most about this."""
    coarse = config.pyramid or 0.0  # of all, its levels are 1 - coarse^2, coarse^2 - coarse^4, ...
    return coarse**2 + config.offset**2 + config.input_perturbation**2


def normal(shape: tuple[int, ...], stream: Stream, seed: int, *counters: int) -> Tensor:
    """Standard normal draws for these counters: -> fp32 of this shape, on the CPU."""
    return torch.randn(shape, generator=rng.generator(seed, stream, *counters))


def _pyramid(noise: Tensor, discount: float, seed: int, number: int, place: int) -> Tensor:
    """Noise with coarser noise added: (C, h, w) -> (C, h, w), of standard deviation 1.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training": level k is smaller by the
    k-th power of a factor drawn from [2, 4), is enlarged (bilinear), and counts discount^k, until a
    side is one element.
    """
    height, width = noise.shape[-2:]
    level, total = 0, noise
    while min(height, width) > 1:
        level += 1
        generator = rng.generator(seed, Stream.PYRAMID, number, place, level)
        factor = (2 + 2 * torch.rand((), generator=generator).item()) ** level
        height, width = (max(1, int(side / factor)) for side in noise.shape[-2:])
        coarse = torch.randn(1, noise.shape[0], height, width, generator=generator)
        enlarged = F.interpolate(coarse, size=noise.shape[-2:], mode="bilinear")[0]
        total = total + discount**level * enlarged
    return total / total.std()
