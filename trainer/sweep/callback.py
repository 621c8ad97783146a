"""What a sweep says between its runs, and when its tables are made: after each run."""

from pathlib import Path
from statistics import mean
from typing import Any, cast

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from trainer import claim, cli, console
from trainer.errors import UserError
from trainer.run_folder import sweep_of
from trainer.sweep import page, planned
from trainer.sweep.folders import ended_runs
from trainer.sweep.head import left
from trainer.sweep.runs import Summary
from trainer.sweep.table import sweep_table


class SweepTable(Callback):
    """Says which run of a sweep begins, and of how many.  Keeps a table of those that have ended,
    best first, as sweep.md, with pictures of what they drew and of their losses, and prints it
    after the last.  A run that failed is a row with its reason, and makes the sweep's exit status
    1."""

    def __init__(self) -> None:
        self._runs = list[list[str]]()  # in their order; none where only the sweeper knows them
        self._summaries = list[Summary]()  # of those that have ended

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self._runs = cli.runs_of(_overrides(config))
        except UserError:  # which the sweep itself tells, or a sweeper that has others
            self._runs = []

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = sweep_of(Path(config.hydra.runtime.output_dir))
        if folder is None:
            return
        number = config.hydra.job.num
        if number == 0:
            with claim.in_turn(folder):
                planned.add(folder, [cli.lasting(run) for run in self._runs])
        common = set.intersection(*map(set, self._runs)) if len(self._runs) > 1 else set[str]()
        apart = " ".join(o for o in _overrides(config) if o not in common)
        print(f"\nrun {number + 1}{self._of_all(number)}: {apart or 'the defaults'}")

    def _of_all(self, number: int) -> str:
        """How many runs there are, and how long those that are left take, as far as is known."""
        if not self._runs:
            return ""
        seconds = [run["wall_seconds"] for run in self._summaries if run.get("wall_seconds")]
        eta = mean(seconds) * (len(self._runs) - number) if seconds else None
        return f" of {len(self._runs)}" + (f", ETA {console.minutes(eta)}" if eta else "")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A sweep that is stopped has a table too, and its runs that are resumed by themselves are
        in it."""
        if folder := sweep_of(Path(config.hydra.runtime.output_dir)):
            self._summaries = _write(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = _write(folder)
        if not runs:
            return
        parts = [sweep_table(runs), left(planned.missing(folder)), str(folder / page.TABLE)]
        print("\n" + "\n\n".join(filter(None, parts)))
        if any("error" in run for run in runs):
            raise SystemExit(1)


def _overrides(config: DictConfig) -> list[str]:
    given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return cast(list[str], given)


def _write(folder: Path) -> list[Summary]:
    """Write the table and the pictures of a sweep's folder, where a run of it has ended; -> their
    summaries.  Of several processes the last one writes what all of them left."""
    with claim.in_turn(folder):
        found = ended_runs(folder)
        if found:
            page.write(folder, found, planned.missing(folder))
    return [summary for _, summary in found]
