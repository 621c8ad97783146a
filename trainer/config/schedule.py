"""`schedule=`: the length of a run, and the learning rate along it."""

from dataclasses import dataclass

from trainer.config.fields import TINY, one_of, within


@dataclass(kw_only=True)
class ConstantConfig:
    """Length of the run and the learning rate along it, in optimizer steps: warm up, then keep
    it."""

    name: str = "constant"
    steps: int = within(1)
    # How often the data is gone through; where it is set, steps are as many as that takes.
    epochs: float | None = within(TINY)
    warmup_steps: int | None = within(0)  # null: 20, or a tenth of a run of less than 200


@dataclass(kw_only=True)
class LinearConfig(ConstantConfig):
    """Warm up, hold, then decay in a straight line."""

    name: str = "linear"
    hold: float = within(0, 1)  # share of the run before the decay begins
    final_scale: float = within(0, 1)  # share of the peak that the rate decays to


@dataclass(kw_only=True)
class CosineConfig(LinearConfig):
    """Warm up, hold, then decay along half a cosine."""

    name: str = "cosine"


@dataclass(kw_only=True)
class PolynomialConfig(LinearConfig):
    """Warm up, hold, then decay as a power of the share of the decay that is left."""

    name: str = "polynomial"
    power: float = within(1e-3, 100)  # 1 is linear; above, fast at first


@dataclass(kw_only=True)
class CosineRestartsConfig(LinearConfig):
    """Warm up, hold, then decay along half a cosine again and again, each time from the peak."""

    name: str = "cosine_restarts"
    cycles: int = within(1)


@dataclass(kw_only=True)
class WsdConfig(ConstantConfig):
    """Warm up, stay, decay at the end."""

    name: str = "wsd"
    decay: float = within(0, 1)  # share of the run that the decay takes
    shape: str = one_of("linear", "cosine", "sqrt")
    final_scale: float = within(0, 1)  # share of the peak that the rate decays to
