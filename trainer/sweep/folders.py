"""The folders of a sweep's runs, which are known by their options.

A folder's name has the number of its job, and with more values on the command line the job has
another.  So one set of options is one run, wherever in the sweep's folder it lies.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from trainer import checkpoint, report
from trainer.measure import ended_well
from trainer.sweep.runs import Summary

Found = list[tuple[Path, Summary]]


def place_of(sweep: Path, proposed: Path, overrides: Sequence[str]) -> Path:
    """Where the run with these options is, or will be: the folder of one that has them, finished or
    begun, else the proposed one, with a number where a run with other options lies there."""
    options = {*overrides}
    same = [folder for folder in {*_begun(sweep), proposed} if _options_in(folder) == options]
    if same:
        return max(same, key=lambda folder: (*_worth(report.read_summary(folder)), str(folder)))
    number, free = 1, proposed
    while _options_in(free) is not None:
        number += 1
        free = proposed.with_name(f"{proposed.name}-{number}")
    return free


def ended_runs(*folders: Path) -> Found:
    """The runs that have ended in these folders, at any depth, and their summaries.  Of those with
    the same options the newest that is finished counts; `times_run` says how many there are."""
    found: dict[frozenset[str], Found] = {}
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("summary.json")}
    for path in sorted(paths.values()):
        summary = report.read_summary(path.parent)
        if "overrides" in summary:
            alike = found.setdefault(frozenset(summary["overrides"]), [])
            alike.append((path.parent, summary))
    kept = [(max(runs, key=lambda run: _worth(run[1])), len(runs)) for runs in found.values()]
    return [(run, summary | {"times_run": count}) for (run, summary), count in kept]


def _begun(sweep: Path) -> set[Path]:
    """The folders of runs that have ended or saved a checkpoint."""
    return {path.parent for name in ("summary.json", "checkpoints") for path in sweep.rglob(name)}


def _options_in(folder: Path) -> set[str] | None:
    """The options of the run in this folder; None where no run has ended or saved there."""
    summary = report.read_summary(folder)
    if "overrides" in summary:
        return {*summary["overrides"]}
    if checkpoint.completed(folder / "checkpoints"):
        return {*checkpoint.overrides_of(str(folder))}
    return None


def _worth(summary: Summary) -> tuple[bool, float]:
    """By which the run that counts is chosen: whether it is finished, and when it ended."""
    ended = datetime.fromisoformat(summary["ended"]).timestamp() if "ended" in summary else 0.0
    return ended_well(summary), ended
