"""The runs of a sweep, read from their summaries, and groups of runs that differ only by the seed.

A run that failed, or whose last loss is not finite, did not end well.  Groups where all ended well
come first: a mean over the rest makes an optimizer that often fails look better than it is.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from trainer.config import key_of
from trainer.reporting.measure import Measure, ended_well, measure_of
from trainer.reporting.summary import Summary
from trainer.sweep.identity import below, canonical, is_setting, settings_of

SEED = "seed"
RATE = "optim.lr"
_EXTERNAL = "optim=external"


class RunSummary(Summary, total=False):
    """A run's summary, and what its folder says besides."""

    folder: str
    config: dict[str, Any]  # {} if it left none
    times_run: int  # how many folders have a run with this configuration and seed


def lr_of(run: RunSummary) -> float | None:
    """Its peak learning rate; from the overrides if the summary lacks it."""
    value = run.get("lr", _overridden(run, RATE))
    with suppress(ValueError):  # ${...} of a run that failed
        return None if value is None else float(value)
    return None


def seed_of(run: RunSummary) -> str:
    return str(run.get("seed", run.get("config", {}).get("seed", _overridden(run, SEED))))


def optimizer_of(run: RunSummary) -> str:
    """The optimizer's name; for an external one, the dotted path of its class."""
    return _class_of(run) or str(run.get("optimizer", _overridden(run, "optim")))


def _class_of(run: RunSummary) -> str | None:
    """The class of a run with optim=external."""
    path = _overridden(run, "optim.class_path") if _EXTERNAL in run["overrides"] else None
    return path and path.strip("'\"")


def _overridden(run: RunSummary, option: str) -> str | None:
    values = {key_of(override): override.partition("=")[2] for override in run["overrides"]}
    return values.get(option)


@dataclass(kw_only=True)
class Group:
    """Runs of one configuration, which differ only by the seed."""

    name: str
    runs: list[RunSummary]
    measure: Measure

    @cached_property
    def good(self) -> list[RunSummary]:
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
        """The standard deviation of that; 0 for a single run."""
        return stdev(map(self.measure, self.good)) if len(self.good) > 1 else 0.0

    @property
    def counted(self) -> str:
        """How many ended well: `1 of 3`."""
        return f"{len(self.good)} of {len(self.runs)}"

    def loss_by(self, measure: Measure) -> float:
        """The mean by any measure."""
        return mean(map(measure, self.good)) if self.good else math.inf

    def place(self, measure: Measure) -> tuple[bool, float]:
        """Sort key of groups: those with failures after those without."""
        return len(self.good) < len(self.runs), self.loss_by(measure)


def _options(run: RunSummary, runs: Sequence[RunSummary]) -> list[str]:
    """A run's overrides, with an external optimizer named by its class: by the last part of its
    path, unless another run's class ends alike."""
    path = _class_of(run)
    if path is None:
        return run["overrides"]
    last = path.rpartition(".")[2]
    others = {other for run in runs if (other := _class_of(run)) and other != path}
    name = path if any(other.rpartition(".")[2] == last for other in others) else last
    kept = [o for o in run["overrides"] if not o.startswith("optim.class_path=")]
    return [f"optim={name}" if o == _EXTERNAL else o for o in kept]


class Comparison:
    """Names, groups and ranks runs."""

    def __init__(self, runs: Sequence[RunSummary]) -> None:
        self.measure = measure_of(runs)
        self.runs = sorted(runs, key=self.loss)  # the best first, those that failed last
        self._settings = {
            id(run): settings_of(run.get("config", {}), run["overrides"]) for run in runs
        }
        self._options = {id(run): _options(run, runs) for run in runs}
        self._common = set.intersection(*map(set, self._options.values()))
        self._has_seeds = len(set(map(seed_of, runs))) > 1

    def loss(self, run: RunSummary) -> float:
        """The loss that ranks a run; infinite if it did not end well."""
        return self.measure(run) if ended_well(run) else math.inf

    def name_of(self, run: RunSummary) -> str:
        """Its group's name, and its seed if there are several."""
        name = self._group_names[id(run)]
        return f"{name} {SEED}={seed_of(run)}" if self._has_seeds else name

    @cached_property
    def groups(self) -> list[Group]:
        """Groups of all runs, the best first."""
        alike = self._alike(self.runs)
        groups = [Group(name=k, runs=v, measure=self.measure) for k, v in alike.items()]
        return sorted(groups, key=lambda group: group.place(self.measure))

    @cached_property
    def rivals(self) -> dict[str, list[Group]]:
        """Lists of groups that differ only by the learning rate, best first, by their name without
        it."""
        groups = {id(group.runs[0]): group for group in self.groups}
        alike = self._alike([group.runs[0] for group in self.groups], RATE)
        return {name: [groups[id(run)] for run in tried] for name, tried in alike.items()}

    @property
    def alike_but_for_optimizer(self) -> list[list[RunSummary]]:
        """Lists of runs on one device whose settings are equal except for those of optim."""
        alike: dict[tuple[Any, str], list[RunSummary]] = {}
        for run in self.runs:
            settings = self._settings[id(run)]
            rest = {k: v for k, v in settings.items() if k not in below(settings, "optim")}
            alike.setdefault((run.get("device"), canonical(rest)), []).append(run)
        return [*alike.values()]

    @cached_property
    def _group_names(self) -> dict[int, str]:
        return {id(run): group.name for group in self.groups for run in group.runs}

    def _alike(self, runs: Sequence[RunSummary], *without: str) -> dict[str, list[RunSummary]]:
        """Runs whose settings are equal except for these options, by the shortest of their names;
        if several have the same name, the options that differ are appended."""
        alike: dict[str, list[RunSummary]] = {}
        for run in runs:
            alike.setdefault(canonical(self._settings[id(run)], *without), []).append(run)
        named: dict[str, list[list[RunSummary]]] = {}
        for same in alike.values():
            name = min((self._name(run, without) for run in same), key=len)
            named.setdefault(name, []).append(same)
        found: dict[str, list[RunSummary]] = {}
        for name, several in named.items():
            for same in several:
                told = f"{name} {self._apart(same[0], several, without)}".strip()
                numbered = (f"{told} ({number})" for number in itertools.count(2))
                unused = (n for n in itertools.chain([told], numbered) if n not in found)
                found[next(unused)] = same
        return found

    def _name(self, run: RunSummary, without: Sequence[str]) -> str:
        """A run's overrides, without those that all runs share, that change nothing, or that are in
        `without`."""
        known = (o for o in self._options[id(run)] if o not in self._common and self._tells(o))
        kept = " ".join(o for o in known if key_of(o) not in without)
        return kept or f"optim={optimizer_of(run)}"

    def _tells(self, override: str) -> bool:
        """Whether runs may differ by what an override sets: an option, a group, or a preset (which
        has no options of its own)."""
        key = key_of(override)
        found = {canonical(below(settings, key)) for settings in self._settings.values()}
        return is_setting(key) and (len(found) > 1 or found == {canonical({})})

    def _apart(
        self, run: RunSummary, several: Sequence[Sequence[RunSummary]], without: Sequence[str]
    ) -> str:
        """How a run differs from others with the same name and overrides: in options whose defaults
        differed."""
        if len(several) == 1:
            return ""
        if not run.get("config"):
            return "(whose configuration is not known)"
        ours = self._settings[id(run)]
        others = [self._settings[id(same[0])] for same in several if same[0].get("config")]
        keys = sorted({key for other in others for key in other.keys() - {*without}})
        told = (f"{k}={ours.get(k)}" for k in keys if any(o.get(k) != ours.get(k) for o in others))
        return " ".join(told)
