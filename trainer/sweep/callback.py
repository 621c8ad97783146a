"""A sweep's messages between its runs, and its tables, rewritten after each run."""

import sys
import traceback
from pathlib import Path
from statistics import mean
from typing import Any, cast

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from trainer.cli import arguments, compose
from trainer.errors import UserError
from trainer.reporting.measure import ended_well
from trainer.storage import claim
from trainer.storage.run_folder import sweep_of
from trainer.sweep import page, planned
from trainer.sweep.folders import ended_runs
from trainer.sweep.runs import RunSummary
from trainer.sweep.upload import upload
from trainer.system import console


class SweepTable(Callback):
    """Prints which run of how many begins.  After each run, rewrites sweep.md, a table of the ended
    runs, best first, with pictures of their samples and losses; prints the table at the end.  A
    failed run is listed with its reason and makes the sweep's exit status 1."""

    def __init__(self) -> None:
        self._runs = list[list[str]]()  # overrides, in order; [] if only the sweeper knows them
        self._ended = list[RunSummary]()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self._runs = compose.runs_of(_overrides(config))
        except UserError:  # the sweep reports it itself, or its sweeper chooses other runs
            self._runs = []

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = sweep_of(Path(config.hydra.runtime.output_dir))
        if folder is None or OmegaConf.is_missing(config.hydra.job, "num"):
            return  # no run of a sweep, or one that is resumed on its own
        number = config.hydra.job.num
        if number == 0:
            with claim.in_turn(folder):
                planned.add(folder, [arguments.lasting(run) for run in self._runs])
                self._ended = ended_runs(folder)
        apart = planned.unshared(_overrides(config), self._runs)
        print(f"\nrun {number + 1}{self._of_all(number)}: {' '.join(apart) or 'the defaults'}")

    def _of_all(self, number: int) -> str:
        """The number of runs and the estimated time left, as far as they are known."""
        if not self._runs:
            return ""
        seconds = [run["wall_seconds"] for run in self._ended if run.get("wall_seconds")]
        good = list(filter(ended_well, self._ended))
        to_come = sum(not planned.has_ended(run, good) for run in self._runs[number:])
        eta = mean(seconds) * to_come if seconds else None
        return f" of {len(self._runs)}" + (f", ETA {console.duration(eta)}" if eta else "")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Rewrites the table, so that a stopped sweep has one, also with runs resumed on their
        own."""
        if folder := sweep_of(Path(config.hydra.runtime.output_dir)):
            self._ended = _write(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            runs = _write(folder)
            if not runs:
                return
            missing = planned.missing(folder, runs)
            print(f"\n{page.printed(runs, missing)}\n\n{folder / page.TABLE}", flush=True)
            upload(folder, runs, missing)
        except Exception as error:  # Hydra would make it a warning, and the exit status 0
            if not isinstance(error, OSError):
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if any("error" in run for run in runs):
            raise SystemExit(1)


def _overrides(config: DictConfig) -> list[str]:
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return cast(list[str], given)


def _write(folder: Path) -> list[RunSummary]:
    """Write a sweep's table and pictures if any of its runs has ended; -> those.  Processes take
    turns, so the last one writes the runs of all."""
    with claim.in_turn(folder):
        if runs := ended_runs(folder):
            page.write(folder, runs, planned.missing(folder, runs))
    return runs
