"""Differences of losses that have a seed in common.

Runs with one seed see the same batches, noise and timesteps, so part of what is chance is the same
in both and leaves their difference, whose spread is smaller than that of the losses.

The best is known only once the runs are done, so a difference from it is one of all pairs: the
intervals are widened by their number (Bonferroni), and of sweeps whose rows are all equal at most
5 % have any that does not hold 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from trainer.sweep.runs import Group, seed_of

_LEVEL = 0.95
_HALVINGS = 60  # of an angle: as exact as a float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of differences and half of its interval's width, by Student's t, at 95 % for all
    rows together."""

    mean: float
    margin: float
    count: int  # of seeds

    @property
    def shows_one(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.margin

    def __str__(self) -> str:
        low, high = self.mean - self.margin, self.mean + self.margin
        return f"{self.mean:+.4f} [{low:+.4f}, {high:+.4f}] n={self.count}"


def differences(groups: Sequence[Group]) -> list[Difference | None]:
    """Of each from the first, the best; None of the first itself."""
    found = [_in_common(group, groups[0]) for group in groups[1:]]
    rows = 1 + sum(len(values) > 1 for values in found)
    pairs = rows * (rows - 1) // 2
    return [None, *(interval(values, pairs) if len(values) > 1 else None for values in found)]


def _in_common(group: Group, best: Group) -> list[float]:
    """How much higher a group's losses are than the best group's, by seeds with which both ended
    well."""
    ours, theirs = ({seed_of(run): one.measure(run) for run in one.good} for one in (group, best))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def interval(values: Sequence[float], pairs: int = 1) -> Difference:
    """Of two values or more.  pairs: of rows, that are compared together."""
    count = len(values)
    margin = quantile(count - 1, pairs) * stdev(values) / math.sqrt(count)
    return Difference(mean=mean(values), margin=margin, count=count)


def quantile(freedom: int, pairs: int = 1) -> float:
    """What |t| stays below with 95 %, with so many degrees of freedom; with several pairs what all
    of theirs do."""
    low, high, level = 0.0, math.pi / 2, 1 - (1 - _LEVEL) / pairs
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)), a finite sum: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
