"""The noise schedule: how much noise a latent has at each timestep, and what the UNet is to predict
of it; and which scheduler the trained model is drawn with."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from trainer.config import NoiseConfig
from trainer.errors import UserError
from trainer.formats import schedulers
from trainer.formats.schedulers import EPSILON, FLOW, V

log = logging.getLogger(__name__)

# diffusers' list of options that were not given; another class would use its own defaults for them.
_MARKS = "_use_default_values"
# These have betas, too, but can only be inspected if scipy or torchsde is installed.
_WITH_EXTRAS = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = a x + s e at T timesteps, numbered from 0, the one with the least noise e.

    - epsilon predicts e; v_prediction a e - s x (Salimans & Ho 2022, arXiv 2202.00512); both have
      a^2 + s^2 = 1.
    - flow_prediction predicts e - x, the velocity of the straight line from x to e, of which x_t is
      the point at s = 1 - a (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
      2209.03003).
    """

    prediction: str
    signal: Tensor  # a: fp32 (T,)
    sigma: Tensor  # s: fp32 (T,)

    @property
    def count(self) -> int:
        """The number of timesteps, T."""
        return len(self.sigma)

    def time(self, timesteps: Tensor) -> Tensor:
        """What the UNet is given for these timesteps: int64 (B,) -> int64 (B,).  For a flow it is
        T s, as samplers compute it, from 1 to T."""
        return timesteps + 1 if self.prediction == FLOW else timesteps

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t: fp32 (B, C, h, w), twice, and int64 (B,) -> fp32 (B, C, h, w)."""
        a, s = self._at(timesteps)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict, in the shapes of `noisy`."""
        if self.prediction == EPSILON:
            return noise
        if self.prediction == FLOW:
            return noise - latents
        a, s = self._at(timesteps)
        return a * noise - s * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """The signal-to-noise ratio a^2 / s^2: int64 (B,) -> fp32 (B,), from 0."""
        return (self.signal[timesteps] / self.sigma[timesteps]).square()

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.signal[timesteps], self.sigma[timesteps]
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)


def training_schedule(scheduler: Mapping[str, Any], config: NoiseConfig) -> NoiseSchedule:
    """The noise schedule of training with this scheduler's configuration (`scheduler_config`).

    Raises UserError for timesteps that it does not have.
    """
    schedule = noise_schedule(scheduler)
    for key, highest in (("timestep_low", schedule.count - 1), ("timestep_high", schedule.count)):
        value = getattr(config, key)
        if value is not None and value > highest:
            raise UserError(
                f"noise.{key}={value}: the model has timesteps in [0, {schedule.count})"
            )
    return schedule


def noise_schedule(scheduler: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a scheduler's configuration."""
    prediction = schedulers.noise(scheduler)["prediction_type"]
    if prediction == FLOW:
        count = schedulers.noise(scheduler)["num_train_timesteps"]
        sigma = torch.arange(1, count + 1) / count
        return NoiseSchedule(prediction, 1 - sigma, sigma)
    products = DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod
    return NoiseSchedule(prediction, products.sqrt(), (1 - products).sqrt())


def scheduler_config(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration after training: `model` (its scheduler_config.json), with the
    changes of `noise=`, if any.

    Raises UserError for a scheduler without betas that is not of flow matching, a prediction type
    that training does not know, and options that the prediction type excludes.
    """
    model = {k: v for k, v in model.items() if k != _MARKS}
    _must_be_known(model)
    wanted = config.prediction
    if wanted == "model":
        wanted = schedulers.noise(model)["prediction_type"]
    result = (_of_flow if wanted == FLOW else _of_betas)(config, model)
    for key, value in result.items():
        if model.get(key) != value:
            log.info("noise: the scheduler's %s: %s -> %s", key, model.get(key), value)
    return result


def _of_flow(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    if config.zero_terminal_snr is not None:
        raise UserError(
            f"noise.zero_terminal_snr={str(config.zero_terminal_snr).lower()} is for betas, and "
            "flow matching has pure noise at its last timestep anyway; leave it null"
        )
    result = schedulers.flow(model)
    if config.flow_shift is not None:
        result["flow_shift"] = config.flow_shift
    return result


def _of_betas(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    if schedulers.is_flow(model):
        raise UserError(
            f"the model is one of flow matching, and noise.prediction={config.prediction} needs "
            "betas, which its scheduler lacks; use noise.prediction=model"
        )
    if config.flow_shift is not None:
        raise UserError(
            f"noise.flow_shift={config.flow_shift:g} is for flow matching; set "
            "noise.prediction=flow_prediction, or leave it null"
        )
    changes: dict[str, Any] = {}
    if config.prediction != "model":
        changes["prediction_type"] = config.prediction
    if config.zero_terminal_snr:
        changes |= schedulers.zero_snr(model)
    elif config.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = False
    result = {**model, **changes}
    prediction = result.get("prediction_type", EPSILON)
    if prediction not in (EPSILON, V):
        raise UserError(
            f"the model's scheduler predicts {prediction!r}; epsilon, v_prediction and "
            "flow_prediction can be trained: set noise.prediction=v_prediction"
        )
    if prediction == EPSILON and result.get("rescale_betas_zero_snr"):
        raise UserError(
            "epsilon prediction has nothing to predict from at zero terminal SNR; set "
            "noise.prediction=v_prediction, or noise.zero_terminal_snr=false"
        )
    return result


def _must_be_known(model: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another family (EDM, flow matching with other timesteps): its
    configuration lacks what training reads, and defaults would be used instead."""
    name = model["_class_name"]
    if name == schedulers.EULER:
        return
    scheduler = getattr(diffusers, name, None)
    options = inspect.signature(scheduler).parameters if scheduler else {}
    has_betas = name in _WITH_EXTRAS or {"beta_start", "prediction_type"} <= set(options)
    is_flow = "use_flow_sigmas" in options and bool(model.get("use_flow_sigmas"))
    if not has_betas or is_flow != schedulers.is_flow(model):
        predicts, sigmas = model.get("prediction_type"), model.get("use_flow_sigmas", False)
        told = f" with use_flow_sigmas={sigmas} and prediction_type={predicts}"
        raise UserError(
            f"the model's scheduler is {name}{told if has_betas else ''}, and only beta schedules, "
            "as of DDPMScheduler or EulerDiscreteScheduler, and flow matching "
            f"({schedulers.EULER}, or DPMSolverMultistepScheduler and the like with "
            "use_flow_sigmas=True and flow_prediction) can be trained; use a model with such a "
            "scheduler/scheduler_config.json"
        )
