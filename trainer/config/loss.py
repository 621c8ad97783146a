"""`loss=`: how far a prediction is from its target, and how much each sample and timestep counts.
`trainer/objective/losses.py` has the definitions and their sources."""

from dataclasses import dataclass

from trainer.config.fields import TINY, one_of, within


@dataclass(kw_only=True)
class LossConfig:
    """What every loss has."""

    name: str
    #: How much a sample counts, by the signal-to-noise ratio of its timestep.
    weighting: str = one_of("none", "min_snr", "debiased")
    gamma: float = within(TINY)  #: for min_snr: the ratio above which a timestep counts less
    #: Weight of the error outside a picture's mask; pictures without a mask count fully.
    unmasked_weight: float = within(0, 1)


@dataclass(kw_only=True)
class MseConfig(LossConfig):
    """The squared error."""

    name: str = "mse"


@dataclass(kw_only=True)
class HuberConfig(LossConfig):
    """Half the squared error below delta, linear above."""

    name: str = "huber"
    #: The error above which it is linear; with a schedule, its value at pure noise.
    delta: float = within(TINY)
    #: How delta rises to 1 with less noise: by the timestep, or by the signal-to-noise ratio.
    schedule: str = one_of("constant", "exponential", "snr")
