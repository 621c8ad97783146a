"""When the tables of a sweep are made: after each run, and after the last."""

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from trainer import disk
from trainer.errors import UserError
from trainer.metrics import MULTIRUN
from trainer.sweep.runs import rank
from trainer.sweep.table import sweep_table

_TABLE = "sweep.md"


class SweepTable(Callback):
    """Keeps a table of the runs of a sweep that have ended, best first, as sweep.md, and prints it
    after the last.  A run that failed is a row with its reason, and makes the sweep's exit status
    1."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A sweep that is stopped has a table too, and its runs that are resumed by themselves are
        in it."""
        folder = Path(config.hydra.runtime.output_dir).parent
        if (folder / MULTIRUN).is_file():
            _write(folder)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = _write(folder)
        if not runs:
            return
        print(f"\n{sweep_table(runs)}\n\n{folder / _TABLE}")
        if any("error" in run for run in runs):
            raise SystemExit(1)


def _write(folder: Path) -> list[dict[str, Any]]:
    """Write the table of a sweep's folder, where a run of it has ended; -> their summaries."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/summary.json")]
    if runs:
        disk.replace_text(folder / _TABLE, sweep_table(runs) + "\n")
    return runs


def ended(folder: Path, overrides: list[str]) -> float | None:
    """The last eval loss of a run that has ended well in this folder; None where there is none.

    Raises UserError for one without these options.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if "error" in summary:
        return None
    if not {*overrides} <= {*summary["overrides"]}:
        raise UserError(
            f"{folder} holds a run of another sweep ({' '.join(summary['overrides'])}); name "
            "another folder (hydra.sweep.dir)"
        )
    return rank(summary)
