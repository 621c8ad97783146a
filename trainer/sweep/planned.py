"""Which runs a sweep is to have, so that one that was interrupted says what is missing.

planned.json has them by their options, of every command that ran in the sweep's folder, and where
each of them lies as soon as it has begun: with equal configurations two of them are one run.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer import disk

_NAME = "planned.json"
Run = dict[str, Any]  # its overrides, and its folder from the sweep's, or None


def add(sweep: Path, runs: Sequence[Sequence[str]]) -> None:
    """The sweep is to have these runs, too; each by its overrides."""
    known = _read(sweep)
    for overrides in runs:
        _entry(known, overrides)
    _write(sweep, known)


def begun(sweep: Path, overrides: Sequence[str], folder: Path) -> None:
    """The run with these overrides is the one in this folder."""
    known = _read(sweep)
    _entry(known, overrides)["folder"] = os.path.relpath(folder, sweep)
    _write(sweep, known)


def missing(sweep: Path) -> list[str]:
    """The runs that have not ended, neither well nor in a failure, by what tells them apart from
    other planned ones."""
    known = _read(sweep)
    common = set.intersection(*(set(run["overrides"]) for run in known)) if len(known) > 1 else ()
    return [
        " ".join(o for o in run["overrides"] if o not in common)
        for run in known
        if run["folder"] is None or not (sweep / run["folder"] / "summary.json").exists()
    ]


def _entry(known: list[Run], overrides: Sequence[str]) -> Run:
    """The run with these overrides, in any order; a new one at the end where there is none."""
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
    with suppress(OSError):  # of a full disk, of which the run itself tells
        disk.replace_text(sweep / _NAME, json.dumps(runs, indent=1) + "\n")
