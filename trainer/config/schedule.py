"""`schedule=`: the length of a run, and the learning rate along it."""

from dataclasses import dataclass

from trainer.config.fields import HUGE, TINY, one_of, within


@dataclass(kw_only=True)
class ConstantConfig:
    """Length of the run and the learning rate along it, in optimizer steps: warm up, then keep
    it."""

    name: str = "constant"
    steps: int = within(1)  #: length of the run in optimizer steps
    #: Length in epochs; overrides steps.
    epochs: float | None = within(TINY, HUGE)
    #: In which the rate rises to its peak; null: 20, or a tenth of a run of less than 200.
    warmup_steps: int | None = within(0)


@dataclass(kw_only=True)
class LinearConfig(ConstantConfig):
    """Warm up, hold, then decay in a straight line."""

    name: str = "linear"
    hold: float = within(0, 1)  #: share of the run before the decay begins
    final_scale: float = within(0, 1)  #: share of the peak that the rate decays to


@dataclass(kw_only=True)
class CosineConfig(LinearConfig):
    """Warm up, hold, then decay along half a cosine."""

    name: str = "cosine"


@dataclass(kw_only=True)
class PolynomialConfig(LinearConfig):
    """Warm up, hold, then decay as a power of the remaining share of the decay."""

    name: str = "polynomial"
    power: float = within(1e-3, 100)  #: 1: linear; above 1: fast at first


@dataclass(kw_only=True)
class CosineRestartsConfig(LinearConfig):
    """Warm up, hold, then decay along half a cosine several times, each time from the peak."""

    name: str = "cosine_restarts"
    cycles: int = within(1)  #: falls of the rate


@dataclass(kw_only=True)
class WsdConfig(ConstantConfig):
    """Warm up, stay, then decay at the end (warmup-stable-decay)."""

    name: str = "wsd"
    decay: float = within(0, 1)  #: share of the run used for the decay
    shape: str = one_of("linear", "cosine", "sqrt")  #: of the decay
    final_scale: float = within(0, 1)  #: share of the peak that the rate decays to
