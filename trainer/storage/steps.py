"""What a run writes after a step and names after it: checkpoints, results and pictures, each in a
folder step-000200 or a file step-000200.png."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def completed(folder: Path) -> list[Path]:
    """The folders named after a step in this one, oldest first.  One that is being written or
    deleted has another name."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=step_of)


def delete(folders: Iterable[Path]) -> None:
    """Delete folders, each of which is renamed first, so that nothing half-deleted has its name."""
    for old in folders:
        try:
            aside = old.rename(old.with_name(f".{old.name}.tmp"))
        except OSError as error:
            log.warning("%s is not deleted: %s", old, error)
        else:
            shutil.rmtree(aside, ignore_errors=True)
