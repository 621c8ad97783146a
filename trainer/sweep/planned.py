"""The planned runs of a sweep, so that an interrupted one can say which are missing.

planned.json has the overrides of each run, from every command that used the sweep's folder, and the
identity of those that have begun, whose configuration is known.  A run is missing until one with
its identity or its overrides has ended.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from trainer.config import key_of
from trainer.sweep.folders import identity_of
from trainer.sweep.identity import is_setting
from trainer.sweep.runs import SEED, RunSummary
from trainer.system import disk

NAME = "planned.json"


class PlannedRun(TypedDict):
    overrides: list[str]
    identity: str | None  # None until it has begun, as its configuration is not known before


def add(sweep: Path, runs: Sequence[Sequence[str]]) -> None:
    """Add runs, each given by its overrides, to the sweep's plan."""
    plan = _read(sweep)
    for overrides in runs:
        _entry(plan, overrides)
    _write(sweep, plan)


def begun(sweep: Path, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
    """Record that the run with these overrides has this configuration."""
    plan = _read(sweep)
    run: RunSummary = {"overrides": [*overrides], "config": dict(config)}
    _entry(plan, overrides)["identity"] = _digest(run)
    _write(sweep, plan)


def missing(sweep: Path, ended: Collection[RunSummary]) -> list[str]:
    """The runs that have neither finished nor failed, named by the overrides that not all planned
    runs share."""
    plan, identities = _read(sweep), {_digest(run) for run in ended}
    planned = [run["overrides"] for run in plan]
    return [
        " ".join(unshared(run["overrides"], planned))
        for run in plan
        if run["identity"] not in identities and not has_ended(run["overrides"], ended)
    ]


def apart(sweep: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run that not all planned ones share."""
    return unshared(overrides, [run["overrides"] for run in _read(sweep)])


def unshared(overrides: Sequence[str], runs: Sequence[Sequence[str]]) -> list[str]:
    """The overrides of a run that not all of these runs share; all of them for fewer than two."""
    common = set.intersection(*map(set, runs)) if len(runs) > 1 else ()
    return [override for override in overrides if override not in common]


def _digest(run: RunSummary) -> str:
    return hashlib.sha256("\n".join(identity_of(run)).encode()).hexdigest()[:16]


def has_ended(overrides: Sequence[str], ended: Collection[RunSummary]) -> bool:
    """Whether a run with these overrides has ended, as far as overrides tell."""
    return any(_deciding(overrides) == _deciding(run["overrides"]) for run in ended)


def _deciding(overrides: Sequence[str]) -> set[str]:
    """The overrides that set the seed or decide the result, without + and ++."""
    keys = [o for o in overrides if key_of(o) == SEED or is_setting(key_of(o))]
    return {override.lstrip("+") for override in keys}


def _entry(plan: list[PlannedRun], overrides: Sequence[str]) -> PlannedRun:
    """The run with these overrides, in any order; appended if there is none."""
    for run in plan:
        if sorted(run["overrides"]) == sorted(overrides):
            return run
    plan.append({"overrides": [*overrides], "identity": None})
    return plan[-1]


def _read(sweep: Path) -> list[PlannedRun]:
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        plan = json.loads((sweep / NAME).read_text(encoding="utf-8"))
        return [{"overrides": [*run["overrides"]], "identity": run["identity"]} for run in plan]
    return []


def _write(sweep: Path, runs: list[PlannedRun]) -> None:
    with suppress(OSError):  # a full disk, say, which the run itself reports
        disk.replace_text(sweep / NAME, json.dumps(runs, indent=1) + "\n")
