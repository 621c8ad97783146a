"""The noise schedule: how much noise a latent has at each timestep, and what the UNet is to predict
of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from trainer.config import NoiseConfig
from trainer.errors import UserError
from trainer.formats import schedulers
from trainer.formats.schedulers import EPSILON, FLOW


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
    """The noise schedule of training with this configuration of a scheduler (`trained_scheduler`).

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
