"""`schedule=`: the length of a run, and the learning rate along it, in optimizer steps."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from trainer.config.fields import HUGE, TINY, one_of, within


@dataclass(kw_only=True)
class ScheduleConfig:
    """What every schedule has."""

    name: str
    steps: int = within(1)  #: length of the run in optimizer steps
    #: Length in epochs; overrides steps.
    epochs: float | None = within(TINY, HUGE)
    #: In which the rate rises to its peak; null: 20, or a tenth of a run of less than 200.
    warmup_steps: int | None = within(0)


@dataclass(kw_only=True)
class ConstantConfig(ScheduleConfig):
    """Warm up, then keep the rate."""

    name: str = "constant"


@dataclass(kw_only=True)
class DecayConfig(ScheduleConfig, ABC):
    """Warm up, stay at the peak, then decay until the end."""

    begins: ClassVar[str]  # the option that says when the decay begins
    final_scale: float = within(0, 1)  #: share of the peak that the rate decays to

    @abstractmethod
    def start(self) -> float:
        """The share of the run before the decay."""

    @abstractmethod
    def remaining(self, done: float) -> float:
        """The share of the decay's height that is left, from 1 to 0, after a share `done` of its
        steps."""


@dataclass(kw_only=True)
class HoldConfig(DecayConfig):
    """Warm up, hold, then decay in one of several shapes."""

    begins: ClassVar[str] = "hold"
    hold: float = within(0, 1)  #: share of the run before the decay begins

    def start(self) -> float:
        return self.hold


@dataclass(kw_only=True)
class LinearConfig(HoldConfig):
    """Warm up, hold, then decay in a straight line."""

    name: str = "linear"

    def remaining(self, done: float) -> float:
        return 1 - done


@dataclass(kw_only=True)
class CosineConfig(HoldConfig):
    """Warm up, hold, then decay along half a cosine."""

    name: str = "cosine"

    def remaining(self, done: float) -> float:
        return _half_cosine(done)


@dataclass(kw_only=True)
class PolynomialConfig(HoldConfig):
    """Warm up, hold, then decay as a power of the remaining share of the decay."""

    name: str = "polynomial"
    power: float = within(1e-3, 100)  #: 1: linear; above 1: fast at first

    def remaining(self, done: float) -> float:
        return (1 - done) ** self.power


@dataclass(kw_only=True)
class CosineRestartsConfig(HoldConfig):
    """Warm up, hold, then decay along half a cosine several times, each time from the peak
    (Loshchilov & Hutter 2017, arXiv 1608.03983, with cycles of one length)."""

    name: str = "cosine_restarts"
    cycles: int = within(1)  #: falls of the rate

    def remaining(self, done: float) -> float:
        return _half_cosine(round(done * self.cycles, 9) % 1)  # a third of the way, times 3, is 1


@dataclass(kw_only=True)
class WsdConfig(DecayConfig):
    """Warm up, stay, then decay at the end (warmup-stable-decay: Hu et al. 2024, arXiv
    2404.06395)."""

    name: str = "wsd"
    begins: ClassVar[str] = "decay"
    decay: float = within(0, 1)  #: share of the run used for the decay
    #: Of the decay; sqrt is 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392).
    shape: str = one_of("linear", "cosine", "sqrt")

    def start(self) -> float:
        return 1 - self.decay

    def remaining(self, done: float) -> float:
        if self.shape == "cosine":
            return _half_cosine(done)
        return 1 - (math.sqrt(done) if self.shape == "sqrt" else done)


def _half_cosine(done: float) -> float:
    """From 1 to 0, after a share `done` of the way."""
    return (1 + math.cos(math.pi * done)) / 2
