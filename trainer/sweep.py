"""What a sweep came to: the table of its runs."""

import json
import math
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from trainer import disk
from trainer.report import format_bytes

_COLUMNS = (
    # title, key in summary.json, format
    ("eval before", "eval_loss_before", "{:.4f}"),
    ("eval after", "eval_loss_after", "{:.4f}"),
    ("held out", "holdout_loss_after", "{:.4f}"),
    ("of averaged weights", "ema_loss_after", "{:.4f}"),
    ("s/step", "seconds_per_step", "{:.3f}"),
    ("optimizer state", "optimizer_state_bytes", "bytes"),
    ("peak in training", "peak_training_bytes", "bytes"),
    ("skipped", "skipped_steps", "{}"),
)
_NOT_IN_ALL = {"holdout_loss_after", "ema_loss_after"}


class SweepTable(Callback):
    """Prints the runs of a sweep as a table when the last has ended, best first, and keeps it as
    sweep.md.  A run that failed is a row with its reason, and makes the sweep's exit status 1."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        runs = [
            json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/summary.json")
        ]
        if not runs:
            return
        table = sweep_table(runs)
        disk.replace_text(folder / "sweep.md", table + "\n")
        print(f"\n{table}\n\n{folder / 'sweep.md'}")
        if any("error" in run for run in runs):
            raise SystemExit(1)


def sweep_table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table of run summaries, lowest final eval loss first, failed runs last.

    A run is called by the overrides that not all of them have; why runs failed is said below the
    table.  Held-out and averaged losses have a column where some run has them.
    """
    common = set.intersection(*(set(run["overrides"]) for run in runs))
    absent = _NOT_IN_ALL - {key for run in runs for key in run}
    columns = [column for column in _COLUMNS if column[1] not in absent]
    rows, reasons = [["run", *(title for title, _, _ in columns)]], []
    for run in sorted(runs, key=_rank):
        name = " ".join(o for o in run["overrides"] if o not in common) or "default"
        if "error" in run:
            rows.append([name, "failed", *([""] * (len(columns) - 1))])
            reasons.append(f"- {name} failed: {run['error'].splitlines()[0]}")
        else:
            rows.append([name, *(_cell(run.get(key), form) for _, key, form in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:], *([""] if reasons else []), *reasons])


def _rank(run: dict[str, Any]) -> float:
    """The final eval loss; a run that failed or diverged comes last."""
    value = run.get("eval_loss_after")
    return value if value is not None and math.isfinite(value) else math.inf


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format_bytes(value) if form == "bytes" else form.format(value)
