"""Paired differences between losses of runs with the same seed.

Runs with the same seed see the same batches, noise and timesteps, so part of the randomness cancels
in their difference, whose spread is smaller than that of the losses.

Which group is best is known only after the runs, so a difference from it may be that of any pair:
the intervals are widened for the number of pairs (Bonferroni).  If all groups are equal, at most
5 % of sweeps have an interval that excludes 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from trainer.sweep.runs import Group, seed_of

_LEVEL = 0.95
_HALVINGS = 60  # bisections of an angle: exact to a float's precision


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean difference and half the width of its interval, by Student's t, at 95 % for all rows
    together."""

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
    """Each group's difference from the first, the best; None for the first itself, and for groups
    with fewer than two seeds in common with it."""
    found = [_in_common(group, groups[0]) for group in groups[1:]]
    rows = 1 + sum(len(values) > 1 for values in found)
    pairs = rows * (rows - 1) // 2
    return [None, *(interval(values, pairs) if len(values) > 1 else None for values in found)]


def _in_common(group: Group, best: Group) -> list[float]:
    """How much higher a group's losses are than the best group's, for each seed with which both
    ended well."""
    ours, theirs = ({seed_of(run): one.measure(run) for run in one.good} for one in (group, best))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def interval(values: Sequence[float], pairs: int = 1) -> Difference:
    """The interval of two or more values.  pairs: how many pairs of rows are compared together."""
    count = len(values)
    margin = quantile(count - 1, pairs) * stdev(values) / math.sqrt(count)
    return Difference(mean=mean(values), margin=margin, count=count)


def quantile(freedom: int, pairs: int = 1) -> float:
    """The bound that |t| stays below with probability 95 %, for these degrees of freedom; with
    several pairs, the bound for all of them together."""
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
