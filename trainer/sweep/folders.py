"""The folders of a sweep's runs, which are identified by their configurations.

A folder's name has its job's number, which changes when the command line gets more values.  So runs
with the same configuration and seed are the same run, wherever in the sweep's folder they are.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.reporting import report
from trainer.reporting.measure import ended_well
from trainer.reporting.summary import Summary
from trainer.storage import resuming
from trainer.storage.claim import claims_below, config_in
from trainer.storage.steps import completed
from trainer.sweep.identity import canonical, settings_of
from trainer.sweep.runs import RunSummary, seed_of


def place_of(
    sweep: Path, proposed: Path, overrides: Sequence[str], config: Mapping[str, Any]
) -> Path:
    """The folder for the run with this configuration: that of a finished or begun run with the
    same, else the proposed one, with a number appended if it has another run.  Equal overrides make
    it the same run, too: a newer version may have more options."""
    ours: RunSummary = {"overrides": [*overrides], "config": dict(config)}
    same = [folder for folder in {*_begun(sweep), proposed} if _are_same(_run_in(folder), ours)]
    if same:
        return max(same, key=lambda folder: (*_worth(report.read_summary(folder)), str(folder)))
    number, free = 1, proposed
    while _run_in(free):
        number += 1
        free = proposed.with_name(f"{proposed.name}-{number}")
    return free


def ended_runs(*folders: Path) -> list[RunSummary]:
    """The summaries of the runs that have ended in these folders, at any depth, with each run's
    `folder` and `config`.  Of runs with the same configuration and seed, the newest finished one is
    kept; `times_run` says how many there are."""
    alike: dict[tuple[str, str], list[RunSummary]] = {}
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("summary.json")}
    for path in sorted(paths.values()):
        summary, folder = report.read_summary(path.parent), str(path.parent)
        if "overrides" in summary:
            run: RunSummary = {**summary, "folder": folder, "config": config_in(path.parent)}
            alike.setdefault(identity_of(run), []).append(run)
    return [{**max(runs, key=_worth), "times_run": len(runs)} for runs in alike.values()]


def _begun(sweep: Path) -> set[Path]:
    """The folders of runs that have begun, saved a checkpoint or ended."""
    names = ("summary.json", "checkpoints")
    return {*claims_below(sweep), *(path.parent for name in names for path in sweep.rglob(name))}


def _run_in(folder: Path) -> RunSummary | None:
    """The overrides and configuration of the run in this folder; None if none has begun there."""
    summary, config = report.read_summary(folder), config_in(folder)
    overrides = summary.get("overrides")
    if overrides is None and completed(folder / "checkpoints"):
        overrides = resuming.overrides_of(str(folder))
    return {"overrides": overrides or [], "config": config} if config or overrides else None


def _are_same(run: RunSummary | None, other: RunSummary) -> bool:
    if run is None:
        return False
    return {*run["overrides"]} == {*other["overrides"]} or identity_of(run) == identity_of(other)


def identity_of(run: RunSummary) -> tuple[str, str]:
    """By which runs are the same: what decides the result, and the seed."""
    return canonical(settings_of(run["config"], run["overrides"])), seed_of(run)


def _worth(summary: Summary) -> tuple[bool, float]:
    """Sort key to choose among equal runs: whether it ended well, and when."""
    ended = datetime.fromisoformat(summary["ended"]).timestamp() if "ended" in summary else 0.0
    return ended_well(summary), ended
