"""What a sweep came to: the table of its runs."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from trainer import disk
from trainer.errors import UserError
from trainer.report import format_bytes

_COLUMNS = (
    # title, key in summary.json, format
    ("eval before", "eval_loss_before", "{:.4f}"),
    ("eval after", "eval_loss_after", "{:.4f}"),
    ("held out", "holdout_loss_after", "{:.4f}"),
    ("of averaged weights", "ema_loss_after", "{:.4f}"),
    ("s/step", "seconds_per_step", "{:.3f}"),
    ("images/s", "images_per_second", "{:.1f}"),
    ("seconds in all", "wall_seconds", "{:.0f}"),
    ("optimizer state", "optimizer_state_bytes", "bytes"),
    ("peak in training", "peak_training_bytes", "bytes"),
    ("skipped", "skipped_steps", "{}"),
)
_MARK, _TABLE = "multirun.yaml", "sweep.md"  # the first is Hydra's
_NOT_IN_ALL = {"holdout_loss_after", "ema_loss_after"}
_OVER_SEEDS = ("eval after", "held out", "of averaged weights", "s/step", "images/s")
# Losses before the first step that differ by more than rounding are of other points.
_SAME = 0.01


class SweepTable(Callback):
    """Keeps a table of the runs of a sweep that have ended, best first, as sweep.md, and prints it
    after the last.  A run that failed is a row with its reason, and makes the sweep's exit status
    1."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A sweep that is stopped has a table too, and its runs that are resumed by themselves are
        in it."""
        folder = Path(config.hydra.runtime.output_dir).parent
        if (folder / _MARK).is_file():
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
    return _rank(summary)


def sweep_table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table of run summaries, the lowest final eval loss of what is exported first,
    failed runs last.

    A run is called by the overrides that not all of them have; why runs failed, and that losses
    cannot be compared, is said below the table, and below that what several seeds have in common.
    Held-out and averaged losses have a column where some run has them.
    """
    common = set.intersection(*(set(run["overrides"]) for run in runs))
    absent = _NOT_IN_ALL - {key for run in runs for key in run}
    columns = [column for column in _COLUMNS if column[1] not in absent]
    rows, remarks = [["run", *(title for title, _, _ in columns)]], []
    for run in sorted(runs, key=_rank):
        name = _name(o for o in run["overrides"] if o not in common)
        if "error" in run:
            rows.append([name, "failed", *([""] * (len(columns) - 1))])
            remarks.append(f"- {name} failed: {run['error'].splitlines()[0]}")
        else:
            rows.append([name, *(_cell(run.get(key), form) for _, key, form in columns)])
    before = [run["eval_loss_before"] for run in runs if run.get("eval_loss_before") is not None]
    if before and max(before) > (1 + _SAME) * min(before):
        remarks.append(
            "- eval before differs: these losses are of another model, prediction or eval points "
            "(data, log.eval_points), and one that is lower need not be better"
        )
    parts = [_markdown(rows), "\n".join(remarks), _over_seeds(runs, common, columns)]
    return "\n\n".join(part for part in parts if part)


def _over_seeds(
    runs: list[dict[str, Any]], common: set[str], columns: list[tuple[str, str, str]]
) -> str:
    """A table of what differs by more than the seed, where something was run with several: mean and
    standard deviation over the runs that ended well."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        told = (o for o in run["overrides"] if o not in common and not o.startswith("seed="))
        if math.isfinite(_rank(run)):
            groups.setdefault(_name(told), []).append(run)
    if max((len({run.get("seed") for run in group}) for group in groups.values()), default=0) < 2:
        return ""
    columns = [column for column in columns if column[0] in _OVER_SEEDS]
    rows = [["over seeds", "runs", *(title for title, _, _ in columns)]]
    for name, group in sorted(groups.items(), key=lambda item: mean(map(_rank, item[1]))):
        cells = [_spread([run.get(key) for run in group], form) for _, key, form in columns]
        rows.append([name, str(len(group)), *cells])
    return _markdown(rows)


def _spread(values: list[float | None], form: str) -> str:
    """Mean ± standard deviation; nothing where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    spread = f" ± {form.format(stdev(known))}" if len(known) > 1 else ""
    return form.format(mean(known)) + spread


def _name(overrides: Iterable[str]) -> str:
    return " ".join(overrides) or "default"


def _markdown(rows: list[list[str]]) -> str:
    """A table of these cells, the first row its titles."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _rank(run: dict[str, Any]) -> float:
    """The final eval loss of what is exported; a run that failed or diverged comes last."""
    value = run.get("eval_loss_result", run.get("eval_loss_after"))
    return value if value is not None and math.isfinite(value) else math.inf


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format_bytes(value) if form == "bytes" else form.format(value)
