"""Paired ratios of the losses of runs with the same seed.

Runs with the same seed see the same batches, noise and timesteps, so part of the randomness cancels
in the ratio of their losses.  Its logarithm is what is analysed: a loss of 0.1 varies more than one
of 0.03, but by about the same share.

A spread over two or three seeds says little, and intervals by it alone would be too wide to show
anything.  So each row's variance is shrunk towards the variance that is typical of all rows, as far
as the rows' variances are alike (Smyth 2004, "Linear models and empirical Bayes methods for
assessing differential expression in microarray experiments").

Which group is best is known only after the runs, so a ratio to it may be that of any pair: the
intervals are widened for the number of pairs (Bonferroni).  If all groups are equal, about 5 % of
sweeps have an interval that excludes 1; with 25 groups whose standard deviations differ by a factor
of e (one sd of the logarithm), about 15 %.
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
_WILD = 4.75  # normal quantile of 1 - 1e-6: of a variance that is too large to be one of them
_FEW = 0.25  # the largest share of rows that are such
_HIGHEST = 9.0  # the logarithm of a ratio that is printed as inf
_LEAST_LOSS = 1e-12  # a loss of 0 has no logarithm


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The geometric mean of a ratio, and its interval, by Student's t, at 95 % for all rows
    together."""

    log: float  # of the mean
    margin: float  # of the logarithm: half the width of its interval
    count: int  # of seeds

    @property
    def shows_one(self) -> bool:
        """Whether the losses are shown to differ: 1 lies outside the interval."""
        return abs(self.log) > self.margin

    @property
    def mean(self) -> float:
        return _exp(self.log)

    @property
    def interval(self) -> tuple[float, float]:
        return _exp(self.log - self.margin), _exp(self.log + self.margin)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.3f} [{low:.3f}, {high:.3f}] n={self.count}"


def ratios(groups: Sequence[Group]) -> list[Ratio | None]:
    """Each group's ratio to the first, the best; None for the first itself, and for groups with
    fewer than two seeds in common with it."""
    logs = [_in_common(group, groups[0]) for group in groups[1:]]
    intervals = iter(together([values for values in logs if len(values) > 1]))
    return [None, *(next(intervals) if len(values) > 1 else None for values in logs)]


def together(rows: Sequence[Sequence[float]]) -> list[Ratio]:
    """The intervals of rows of logarithms that are compared with one other row, each of two or more
    values."""
    pairs = len(rows) * (len(rows) + 1) // 2
    own = [(variance(values), len(values) - 1) for values in rows]
    ratios = []
    for values, (moderated, freedom) in zip(rows, moderate(own), strict=True):
        margin = quantile(freedom, pairs) * math.sqrt(moderated / len(values))
        ratios.append(Ratio(log=mean(values), margin=margin, count=len(values)))
    return ratios


def moderate(variances: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Variances with their degrees of freedom, each shrunk towards what is typical of all (Smyth
    2004, section 6.2), and with the degrees of freedom that this adds.

    What is typical is estimated without rows that would hide that the others are alike: those that
    are almost the same as the best, as `adamw8bit` beside `adamw`; and wild ones, whose runs differ
    far more than others', as those of which some diverged.  These keep their own variance.
    """
    usual, wild = _usual(variances), _wild(variances)
    known = [one for place, one in enumerate(variances) if place not in wild]
    known = [(value, d) for value, d in known if value > _least(d) * usual]
    if len(known) < 2:
        return [*variances]
    logs = [math.log(value) - _digamma(d / 2) + math.log(d / 2) for value, d in known]
    unexplained = variance(logs) - mean(_trigamma(d / 2) for _, d in known)
    total = sum(d for _, d in known)
    if unexplained <= 0:  # no more apart than equal ones would be
        shrunk = [(math.exp(mean(logs)), total)] * len(variances)
    else:
        half = _inverse_trigamma(unexplained)
        prior, typical = 2 * half, math.exp(mean(logs) + _digamma(half) - math.log(half))
        shrunk = [
            ((prior * typical + d * value) / (prior + d), max(1, min(int(prior + d), total)))
            for value, d in variances
        ]
    return [variances[at] if at in wild else one for at, one in enumerate(shrunk)]


def _wild(variances: Sequence[tuple[float, int]]) -> set[int]:
    """The places of variances that are too large to be one of the others; none if these are so many
    that the others are not typical either."""
    usual = _usual(variances)
    found = {at for at, (value, d) in enumerate(variances) if value > _most(d) * usual > 0}
    return found if len(found) <= _FEW * len(variances) else set()


def _usual(variances: Sequence[tuple[float, int]]) -> float:
    """The variance of which the median is typical (Wilson & Hilferty's approximation, as below)."""
    return median([value / (1 - 2 / (9 * d)) ** 3 for value, d in variances] or [0.0])


def _least(d: int) -> float:
    """One in a thousand variances, of d degrees of freedom, is a smaller multiple of the usual (by
    the first term of the chi-square's series)."""
    return 2 / d * (_TWIN * math.gamma(d / 2 + 1)) ** (2 / d)


def _most(d: int) -> float:
    """One in a million is a larger multiple."""
    return (1 - 2 / (9 * d) + _WILD * math.sqrt(2 / (9 * d))) ** 3


def _exp(log: float) -> float:
    return math.exp(log) if log < _HIGHEST else math.inf


def _in_common(group: Group, best: Group) -> list[float]:
    """The logarithm of a group's loss over the best group's, for each seed with which both ended
    well."""
    ours, theirs = (
        {seed_of(run): math.log(max(each.measure(run), _LEAST_LOSS)) for run in each.good}
        for each in (group, best)
    )
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
