"""One run of a sweep: it may already be finished, begun, or taken by another process, and its
failure is a row of the sweep's table."""

import contextlib
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.errors import UserError
from trainer.reporting.measure import ended_well, objective
from trainer.reporting.report import of_failure, read_summary, write_summary
from trainer.reporting.summary import Summary
from trainer.storage.claim import TakenError, claimed, in_turn
from trainer.sweep import planned
from trainer.sweep.folders import place_of


def run(
    sweep: Path,
    composed: DictConfig,
    resolved: dict[str, Any],
    proposed: Path,
    overrides: list[str],
    train_in: Callable[[Path], float],
) -> float:
    """Train in this run's folder, from its last checkpoint if it has one; returns the final loss,
    NaN if it failed or is taken, so that the sweep continues.

    sweep: its folder.  composed, resolved: the run's configuration, which identifies it with its
    overrides.  proposed: the folder that Hydra made.
    """
    with contextlib.ExitStack() as holding:
        with in_turn(sweep):
            planned.begun(sweep, overrides, resolved)
            folder = place_of(sweep, proposed, overrides, resolved)
            if folder != proposed:
                with contextlib.suppress(OSError):
                    proposed.rmdir()  # unless it is another run's
            if ended_well(summary := read_summary(folder)):
                print(f"{folder} is already finished: {' '.join(overrides)}")
                return objective(summary)
            try:
                holding.enter_context(claimed(folder, resolved))
            except TakenError as error:
                print(f"left to another process: {error}")
                return math.nan
        try:
            return train_in(folder)
        except SystemExit:
            print(f"to resume a sweep, repeat its command with hydra.sweep.dir={sweep}")
            raise
        except Exception as error:
            record_failure(folder, error, overrides, _known_of_failed(composed))
            return math.nan


def record_failure(folder: Path, error: Exception, overrides: list[str], known: Summary) -> None:
    """Make a failed run a row of the sweep's table.  known: the summary of a run that never began;
    other runs have written their own."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"error: {' '.join(overrides)}: {message}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    if read_summary(folder).get("error") != message:
        write_summary(folder, of_failure(folder, {**known, "overrides": overrides}, error))


def _known_of_failed(composed: DictConfig) -> Summary:
    """What a sweep's table shows of a run that failed before it began."""
    rate, seed, name = (
        OmegaConf.select(composed, key, throw_on_resolution_failure=False)
        for key in ("optim.lr", "seed", "optim.name")
    )
    known: Summary = {"seed": seed, "optimizer": name}
    return {**known, "lr": rate} if isinstance(rate, int | float) else known
