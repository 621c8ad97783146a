"""The planned runs of a sweep, so that an interrupted one can say which are missing.

planned.json has their options, from every command that ran in the sweep's folder, and the folder of
each that has begun; two with equal configurations are the same run.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import disk

_NAME = "planned.json"
Run = dict[str, Any]  # overrides, and folder (relative to the sweep's, or None)


def add(sweep: Path, runs: Sequence[Sequence[str]]) -> None:
    """Add runs, each given by its overrides, to the sweep's plan."""
    known = _read(sweep)
    for overrides in runs:
        _entry(known, overrides)
    _write(sweep, known)


def begun(sweep: Path, overrides: Sequence[str], folder: Path) -> None:
    """Record that the run with these overrides is in this folder."""
    known = _read(sweep)
    _entry(known, overrides)["folder"] = os.path.relpath(folder, sweep)
    _write(sweep, known)


def missing(sweep: Path) -> list[str]:
    """The runs that have neither finished nor failed, named by the overrides that not all planned
    runs share."""
    known = _read(sweep)
    common = set.intersection(*(set(run["overrides"]) for run in known)) if len(known) > 1 else ()
    return [
        " ".join(o for o in run["overrides"] if o not in common)
        for run in known
        if run["folder"] is None or not (sweep / run["folder"] / "summary.json").exists()
    ]


def _entry(known: list[Run], overrides: Sequence[str]) -> Run:
    """The run with these overrides, in any order; appended if there is none."""
    for run in known:
        if sorted(run["overrides"]) == sorted(overrides):
            return run
    known.append({"overrides": [*overrides], "folder": None})
    return known[-1]


def _read(sweep: Path) -> list[Run]:
    with suppress(OSError, ValueError):
        return json.loads((sweep / _NAME).read_text(encoding="utf-8"))
    return []


def _write(sweep: Path, runs: list[Run]) -> None:
    with suppress(OSError):  # a full disk, say, which the run itself reports
        disk.replace_text(sweep / _NAME, json.dumps(runs, indent=1) + "\n")
