"""The runs of a sweep, as their summaries tell them, and the groups that differ by the seed alone.

A run that failed, or whose last loss is not finite, did not end well.  Groups where all did come
first: a mean over those that are left flatters an optimizer that often fails.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

Summary = dict[str, Any]
SEED = "seed"
RATE = "optim.lr"


def rank(run: Summary) -> float:
    """The final eval loss of what is exported; infinite where there is none."""
    value = run.get("eval_loss_result", run.get("eval_loss_after"))
    return value if value is not None and math.isfinite(value) else math.inf


def finished(run: Summary) -> bool:
    """Whether it came to its end; one that was killed has no summary."""
    return bool(run) and "error" not in run


def ended_well(run: Summary) -> bool:
    return finished(run) and math.isfinite(rank(run))


def common_overrides(runs: Iterable[Summary]) -> set[str]:
    """The options that were given for all of them."""
    return set.intersection(*(set(run["overrides"]) for run in runs))


def name_of(run: Summary, common: Collection[str], *without: str) -> str:
    """What tells a run from the others: its overrides, but for what all have and these options."""
    shown = (o for o in run["overrides"] if o not in common and o.partition("=")[0] not in without)
    return " ".join(shown) or "default"


def lr_of(run: Summary) -> float | None:
    """The peak of its learning rate; of a summary without it, as it was overridden."""
    value = run.get("lr", _overridden(run, RATE))
    return None if value is None else float(value)


def seed_of(run: Summary) -> str:
    return str(run.get("seed", _overridden(run, SEED)))


def optimizer_of(run: Summary) -> str:
    return str(run.get("optimizer", _overridden(run, "optim")))


def _overridden(run: Summary, option: str) -> str | None:
    found = [o.partition("=")[2] for o in run["overrides"] if o.partition("=")[0] == option]
    return found[-1] if found else None


@dataclass(kw_only=True)
class Group:
    """Runs that differ by the seed alone."""

    name: str
    runs: list[Summary]

    @cached_property
    def good(self) -> list[Summary]:
        """Those that ended well."""
        return [run for run in self.runs if ended_well(run)]

    @property
    def lr(self) -> float | None:
        return next((lr for run in self.runs if (lr := lr_of(run)) is not None), None)

    @property
    def loss(self) -> float:
        """The mean final loss of those that ended well."""
        return mean(map(rank, self.good)) if self.good else math.inf

    @property
    def spread(self) -> float:
        """The standard deviation of that; 0 of a single run."""
        return stdev(map(rank, self.good)) if len(self.good) > 1 else 0.0

    @property
    def place(self) -> tuple[bool, float]:
        """What groups are sorted by: those with failures after those without."""
        return len(self.good) < len(self.runs), self.loss

    @property
    def counted(self) -> str:
        """How many ended well: `1 of 3`."""
        return f"{len(self.good)} of {len(self.runs)}"


def grouped(runs: Sequence[Summary], common: Collection[str]) -> list[Group]:
    """Groups of all runs, the best first."""
    found: dict[str, list[Summary]] = {}
    for run in runs:
        found.setdefault(name_of(run, common, SEED), []).append(run)
    groups = [Group(name=name, runs=members) for name, members in found.items()]
    return sorted(groups, key=lambda group: group.place)


def by_optimizer(groups: Sequence[Group], common: Collection[str]) -> dict[str, list[Group]]:
    """Groups that differ by their rate alone, by the name of what they share; each in the order of
    `groups`."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(name_of(group.runs[0], common, SEED, RATE), []).append(group)
    return found
