"""When the tables of a sweep are made: after each run, and after the last."""

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from trainer import claim
from trainer.run_folder import sweep_of
from trainer.sweep import page
from trainer.sweep.folders import ended_runs
from trainer.sweep.runs import Summary
from trainer.sweep.table import sweep_table


class SweepTable(Callback):
    """Keeps a table of the runs of a sweep that have ended, best first, as sweep.md, with pictures
    of what they drew and of their losses, and prints it after the last.  A run that failed is a row
    with its reason, and makes the sweep's exit status 1."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A sweep that is stopped has a table too, and its runs that are resumed by themselves are
        in it."""
        if folder := sweep_of(Path(config.hydra.runtime.output_dir)):
            _write(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = _write(folder)
        if not runs:
            return
        print(f"\n{sweep_table(runs)}\n\n{folder / page.TABLE}")
        if any("error" in run for run in runs):
            raise SystemExit(1)


def _write(folder: Path) -> list[Summary]:
    """Write the table and the pictures of a sweep's folder, where a run of it has ended; -> their
    summaries.  Of several processes the last one writes what all of them left."""
    with claim.in_turn(folder):
        found = ended_runs(folder)
        if found:
            page.write(folder, found)
    return [summary for _, summary in found]
