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


def contradiction(noise: NoiseConfig, prediction: str) -> str | None:
    """The error for options that a model with this prediction (`noise.prediction`, or the model's
    own) cannot be trained with, if there are any."""
    zero_snr, is_flow = noise.zero_terminal_snr, prediction == "flow_prediction"
    if is_flow and zero_snr is not None:
        return (
            f"noise.zero_terminal_snr={str(zero_snr).lower()} is for betas, and flow matching has "
            "pure noise at its last timestep anyway; leave it null"
        )
    if prediction == "epsilon" and zero_snr:
        return (
            "noise.zero_terminal_snr=true leaves epsilon prediction nothing to predict from at the "
            "last timestep; set noise.prediction=v_prediction, or noise.zero_terminal_snr=false"
        )
    if not is_flow and noise.flow_shift is not None:
        return (
            f"noise.flow_shift={noise.flow_shift:g} is for flow matching; set "
            "noise.prediction=flow_prediction, or leave it null"
        )
    return None
