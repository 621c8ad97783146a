"""The runs of a sweep, read from their summaries, and groups of runs that differ only by the seed.

A run that failed, or whose last loss is not finite, did not end well.  Groups where all ended well
come first: a mean over the rest makes an optimizer that often fails look better than it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from trainer.measure import Measure, ended_well, measure_of

Summary = dict[str, Any]
SEED = "seed"
RATE = "optim.lr"
_EXTERNAL = "optim=external"


def lr_of(run: Summary) -> float | None:
    """The peak of its learning rate; of a summary without it, as it was overridden."""
    value = run.get("lr", _overridden(run, RATE))
    return None if value is None else float(value)


def seed_of(run: Summary) -> str:
    return str(run.get("seed", _overridden(run, SEED)))


def optimizer_of(run: Summary) -> str:
    """Its name; of one from elsewhere the dotted path of its class."""
    return _class_of(run) or str(run.get("optimizer", _overridden(run, "optim")))


def _class_of(run: Summary) -> str | None:
    """The class of a run with optim=external."""
    path = _overridden(run, "optim.class_path") if _EXTERNAL in run["overrides"] else None
    return path and path.strip("'\"")


def _overridden(run: Summary, option: str) -> str | None:
    found = [o.partition("=")[2] for o in run["overrides"] if o.partition("=")[0] == option]
    return found[-1] if found else None


@dataclass(kw_only=True)
class Group:
    """Runs that differ by the seed alone."""

    name: str
    runs: list[Summary]
    measure: Measure

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
        return self.loss_by(self.measure)

    @property
    def spread(self) -> float:
        """The standard deviation of that; 0 of a single run."""
        return stdev(map(self.measure, self.good)) if len(self.good) > 1 else 0.0

    @property
    def counted(self) -> str:
        """How many ended well: `1 of 3`."""
        return f"{len(self.good)} of {len(self.runs)}"

    def loss_by(self, measure: Measure) -> float:
        """The mean by another measure, too."""
        return mean(map(measure, self.good)) if self.good else math.inf

    def place(self, measure: Measure) -> tuple[bool, float]:
        """What groups are sorted by: those with failures after those without."""
        return len(self.good) < len(self.runs), self.loss_by(measure)


def _options(run: Summary, runs: Sequence[Summary]) -> list[str]:
    """A run's overrides, with the class of an external optimizer in the optimizer's place: by the
    last part of its path, unless another run has one that ends alike."""
    path = _class_of(run)
    if path is None:
        return run["overrides"]
    last = path.rpartition(".")[2]
    others = {other for run in runs if (other := _class_of(run)) and other != path}
    name = path if any(other.rpartition(".")[2] == last for other in others) else last
    kept = [o for o in run["overrides"] if not o.startswith("optim.class_path=")]
    return [f"optim={name}" if o == _EXTERNAL else o for o in kept]


class Comparison:
    """Runs beside each other: what they are called, and which is better."""

    def __init__(self, runs: Sequence[Summary]) -> None:
        self.measure = measure_of(runs)
        self.runs = sorted(runs, key=self.loss)  # the best first, those that failed last
        self._options = {id(run): _options(run, runs) for run in runs}
        self._common = set.intersection(*map(set, self._options.values()))

    def loss(self, run: Summary) -> float:
        """What a run is ranked by; infinite where it failed."""
        return self.measure(run) if ended_well(run) else math.inf

    def name_of(self, run: Summary, *without: str) -> str:
        """What tells a run from the others: its overrides, but for what all have and these
        options."""
        known = (o for o in self._options[id(run)] if o not in self._common)
        return " ".join(o for o in known if o.partition("=")[0] not in without) or "default"

    @cached_property
    def groups(self) -> list[Group]:
        """Groups of all runs, the best first."""
        found: dict[str, list[Summary]] = {}
        for run in self.runs:
            found.setdefault(self.name_of(run, SEED), []).append(run)
        groups = [Group(name=k, runs=v, measure=self.measure) for k, v in found.items()]
        return sorted(groups, key=lambda group: group.place(self.measure))

    @cached_property
    def rivals(self) -> dict[str, list[Group]]:
        """Groups that differ by their rate alone, by the name of what they share; the best
        first."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            found.setdefault(self.name_of(group.runs[0], SEED, RATE), []).append(group)
        return found
