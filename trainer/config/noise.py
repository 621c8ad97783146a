"""`noise=`: how latents are made noisy, at which timesteps, and what the model predicts of it.
`trainer/objective/noise.py` and `noise_schedule.py` have the definitions and their sources."""

from dataclasses import dataclass

from trainer.config.fields import one_of, within


@dataclass(kw_only=True)
class NoiseConfig:
    #: What the UNet predicts.  Anything but `model` is written to the exported scheduler.
    prediction: str = one_of("model", "epsilon", "v_prediction", "flow_prediction")
    #: Rescale the betas so that the last timestep is pure noise; null: as the model's scheduler.
    zero_terminal_snr: bool | None
    #: For flow matching: how far the exported scheduler's timesteps lean towards the noisy ones, 1
    #: = evenly spaced; null: as the model's scheduler, 1 if it is not one of flow matching.
    flow_shift: float | None = within(0.01, 100)
    timesteps: str = one_of("uniform", "logit_normal")  #: the distribution of those trained on
    logit_mean: float = within(-10, 10)  #: for logit_normal; above 0 favours noisy ones
    logit_std: float = within(1e-3, 10)  #: for logit_normal
    #: Moves the timesteps that are trained on towards the noisy ones; 1 = off, 3 as SD3.
    timestep_shift: float = within(0.01, 100)
    timestep_low: int = within(0)  #: the lowest timestep that is trained on
    #: The lowest one that is not; null: the model's number of them.
    timestep_high: int | None = within(1)
    #: Standard deviation of a constant offset of each channel's noise; 0 = off.
    offset: float = within(0, 1)
    pyramid: float | None = within(0, 1)  #: weight of each coarser level of noise; null or 0 = off
    #: Extra noise on the input but not the target, as a share of the noise; 0 = off.
    input_perturbation: float = within(0, 1)
