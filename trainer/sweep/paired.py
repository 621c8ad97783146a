"""Paired differences between losses of runs with the same seed.

Runs with the same seed see the same batches, noise and timesteps, so part of the randomness cancels
in their difference, whose spread is smaller than that of the losses.

A spread over two or three seeds says little, and intervals by it alone would be too wide to show
anything.  So each row's variance is shrunk towards the variance that is typical of all rows, as far
as the rows' variances are alike (Smyth 2004, "Linear models and empirical Bayes methods for
assessing differential expression in microarray experiments").

Which group is best is known only after the runs, so a difference from it may be that of any pair:
the intervals are widened for the number of pairs (Bonferroni).  If all groups are equal, about 5 %
of sweeps have an interval that excludes 0; with 25 groups whose standard deviations differ by a
factor of e (one sd of the logarithm), about 15 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, variance

import torch

from trainer.sweep.runs import Group, seed_of

_LEVEL = 0.95
_HALVINGS = 60  # bisections: exact to a float's precision
_TWIN = 0.001  # the probability of a variance that is too small to be one of the others


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
    intervals = iter(together([values for values in found if len(values) > 1]))
    return [None, *(next(intervals) if len(values) > 1 else None for values in found)]


def together(rows: Sequence[Sequence[float]]) -> list[Difference]:
    """The intervals of rows that are compared with one other, each of two or more values."""
    pairs = len(rows) * (len(rows) + 1) // 2
    own = [(variance(values), len(values) - 1) for values in rows]
    found = []
    for values, (moderated, freedom) in zip(rows, moderate(own), strict=True):
        margin = quantile(freedom, pairs) * math.sqrt(moderated / len(values))
        found.append(Difference(mean=mean(values), margin=margin, count=len(values)))
    return found


def moderate(variances: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Variances with their degrees of freedom, each shrunk towards what is typical of all (Smyth
    2004, section 6.2), and with the degrees of freedom that this adds.

    What is typical is estimated without rows that are almost the same as the best, as `adamw8bit`
    beside `adamw`: they would hide that the others are alike.
    """
    known = _without_twins(variances)
    if len(known) < 2:
        return [*variances]
    logs = [math.log(value) - _digamma(d / 2) + math.log(d / 2) for value, d in known]
    unexplained = variance(logs) - mean(_trigamma(d / 2) for _, d in known)
    total = sum(d for _, d in known)
    if unexplained <= 0:  # no more apart than equal ones would be
        return [(math.exp(mean(logs)), total)] * len(variances)
    half = _inverse_trigamma(unexplained)
    prior, typical = 2 * half, math.exp(mean(logs) + _digamma(half) - math.log(half))
    return [
        ((prior * typical + d * value) / (prior + d), max(1, min(int(prior + d), total)))
        for value, d in variances
    ]


def _without_twins(variances: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The variances, without those that are too small by far: if the median is typical, one in a
    thousand is as small (by the first term of the chi-square's series)."""
    usual = median([value / (1 - 2 / (9 * d)) ** 3 for value, d in variances] or [0.0])
    least = [2 / d * (_TWIN * math.gamma(d / 2 + 1)) ** (2 / d) for _, d in variances]
    return [one for one, low in zip(variances, least, strict=True) if one[0] > low * usual]


def _in_common(group: Group, best: Group) -> list[float]:
    """How much higher a group's losses are than the best group's, for each seed with which both
    ended well."""
    ours, theirs = ({seed_of(run): one.measure(run) for run in one.good} for one in (group, best))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


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


def _digamma(x: float) -> float:
    return float(torch.digamma(torch.tensor(x, dtype=torch.float64)))


def _trigamma(x: float) -> float:
    return float(torch.polygamma(1, torch.tensor(x, dtype=torch.float64)))


def _inverse_trigamma(value: float) -> float:
    """The x > 0 with trigamma(x) = value; trigamma falls from infinity to 0."""
    low, high = 1e-6, 1e9
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _trigamma(middle) > value else (low, middle)
    return low
