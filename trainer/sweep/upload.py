"""A sweep's comparison in Weights & Biases: a run of its own, which has the sweep's tag as its runs
have, with sweep.md as its notes, its tables and its pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import WandbConfig, of_saved, values_of
from trainer.reporting import trackers
from trainer.sweep import files, page
from trainer.sweep.runs import Comparison, RunSummary, optimizer_of
from trainer.sweep.table import tables

FOLDER = "comparison"  # in the sweep's, beside those of its runs


def upload(sweep: Path, runs: Sequence[RunSummary], missing: Sequence[str]) -> None:
    """Write or continue this run if the sweep's own are in W&B.  Whatever W&B raises is printed,
    and does not stop the sweep."""
    try:
        if options := _options(runs):
            _upload(sweep, runs, missing, options)
    except Exception as error:
        print(f"W&B has no comparison of these runs ({type(error).__name__}: {error})")


def _options(runs: Sequence[RunSummary]) -> WandbConfig | None:
    """Those of the first run that has any."""
    logs: list[Mapping[str, Any]] = [run["config"].get("log", {}) for run in runs]
    usual = values_of("log", "wandb")["wandb"]
    given = (log["wandb"] for log in logs if log.get("wandb"))
    return next((of_saved("log.wandb", WandbConfig, one, usual) for one in given), None)


def _upload(
    sweep: Path, runs: Sequence[RunSummary], missing: Sequence[str], options: WandbConfig
) -> None:
    import wandb

    name, folder = sweep.resolve().name, sweep / FOLDER
    folder.mkdir(exist_ok=True)
    run = trackers.wandb_run(
        folder,
        options,
        name=f"{name} compared",
        job_type="comparison",
        tags=["comparison", name],
        notes=page.text(sweep, runs, missing),
    )
    try:
        comparison = Comparison(runs)
        _, *over_several = tables(comparison)  # over seeds, and at the best rates, if there are any
        grids = {"runs": files.grid(runs)} | {
            table.rows[0][0]: table.rows for table in over_several
        }
        logged = {
            key: wandb.Table(columns=[*grid[0]], data=[*grid[1:]], allow_mixed_types=True)
            for key, grid in grids.items()
        }
        pictures = [sweep / picture for picture in page.PICTURES if (sweep / picture).exists()]
        run.log(logged | {path.stem: wandb.Image(str(path)) for path in pictures})
        best = comparison.runs[0]
        run.summary.update(
            {
                "best/run": comparison.name_of(best),
                "best/optimizer": optimizer_of(best),
                f"best/{comparison.measure.title}": comparison.loss(best),
            }
        )
    finally:
        run.finish()
