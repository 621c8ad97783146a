"""The noise: the prediction type, the timesteps of training, and how noise is drawn.

Every draw depends only on (seed, batch number, place in the batch) and is made on the CPU, so a
sample's noise depends neither on its neighbours nor on the device.
"""

import inspect
import logging
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from optim import rng
from trainer.config import NoiseConfig
from trainer.errors import UserError
from trainer.formats import metadata
from trainer.streams import Stream

log = logging.getLogger(__name__)

# diffusers' list of options that were not given; another class would use its own defaults for them.
_MARKS = "_use_default_values"
# These have betas, too, but can only be inspected if scipy or torchsde is installed.
_WITH_EXTRAS = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")


def scheduler_config(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration after training: `model` (its scheduler_config.json), with the
    changes of `noise=`, if any.

    Raises UserError for a scheduler without betas, a prediction type that training does not know,
    or zero terminal SNR with epsilon prediction, which has nothing to predict from at the last
    timestep.
    """
    _must_have_betas(model)
    changes: dict[str, Any] = {}
    if config.prediction != "model":
        changes["prediction_type"] = config.prediction
    if config.zero_terminal_snr:
        changes |= metadata.zero_snr(model)
    elif config.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = False
    model = {k: v for k, v in model.items() if k != _MARKS}
    result = {**model, **changes}
    prediction = result.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the model's scheduler predicts {prediction!r}; epsilon and v_prediction can be "
            "trained: set noise.prediction=v_prediction"
        )
    if prediction == "epsilon" and result.get("rescale_betas_zero_snr"):
        raise UserError(
            "epsilon prediction has nothing to predict from at zero terminal SNR; set "
            "noise.prediction=v_prediction, or noise.zero_terminal_snr=false"
        )
    for key, value in changes.items():
        if model.get(key) != value:
            log.info("noise: the scheduler's %s: %s -> %s", key, model.get(key), value)
    return result


def _must_have_betas(model: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another family (EDM, flow matching): its configuration lacks what
    DDPMScheduler reads, which would use its own defaults."""
    name = model["_class_name"]
    scheduler = getattr(diffusers, name, None)
    options = inspect.signature(scheduler).parameters if scheduler else {}
    has_betas = name in _WITH_EXTRAS or {"beta_start", "prediction_type"} <= set(options)
    if not has_betas or model.get("use_flow_sigmas"):
        raise UserError(
            f"the model's scheduler is {name}{' with use_flow_sigmas' if has_betas else ''}, and "
            "only beta schedules, as of DDPMScheduler or EulerDiscreteScheduler, can be trained; "
            "use a model with such a scheduler/scheduler_config.json"
        )


def training_schedule(scheduler: Mapping[str, Any], config: NoiseConfig) -> DDPMScheduler:
    """The noise schedule of training: betas, prediction type and terminal SNR of this scheduler's
    configuration (`scheduler_config`).

    Raises UserError for timesteps that it does not have.
    """
    noise_schedule = DDPMScheduler.from_config(dict(scheduler))
    count = noise_schedule.config.num_train_timesteps
    for key, highest in (("timestep_low", count - 1), ("timestep_high", count)):
        value = getattr(config, key)
        if value is not None and value > highest:
            raise UserError(f"noise.{key}={value}: the model has timesteps in [0, {count})")
    return noise_schedule


def snr(noise_schedule: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """The signal-to-noise ratio a^2 / s^2 of x_t = a x + s e: (B,) -> fp32 (B,), from 0."""
    signal = noise_schedule.alphas_cumprod[timesteps]
    return signal / (1 - signal)


def timesteps(config: NoiseConfig, count: int, seed: int, number: int, size: int) -> Tensor:
    """The timesteps of a batch of `size`, out of `count` that the model has: -> int64 (size,).

    Stratified, which lowers the loss's variance: place i draws from the i-th of `size` equally
    likely parts of the distribution.  logit_normal: the share of the range is the logistic function
    of a normal variable (Esser et al. 2024, arXiv 2403.03206).
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
        drawn.append(config.timestep_low + min(int(share * width), width - 1))
    return torch.tensor(drawn)


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
