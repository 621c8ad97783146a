"""Reporting a finished run: its summary.json and its closing lines."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from trainer.reporting.metrics import as_json
from trainer.reporting.summary import Summary
from trainer.system import disk
from trainer.wording import plural

# What a run that is resumed at its end, and makes no step, cannot measure again.
_COSTS = (
    "wall_seconds",
    "peak_memory_bytes",
    "optimizer_seconds_per_step",
    "runs_before_in_process",
    "ended",
)


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json; a number that is not finite becomes null."""
    text = json.dumps(as_json(summary), indent=2) + "\n"
    disk.replace_text(folder / "summary.json", text)


def of_failure(
    folder: Path, summary: Summary, error: Exception, has_result: bool = False
) -> Summary:
    """The summary of a failed run: with the `error`, and with the step of the result in its folder,
    if there is one; it may be from an earlier session."""
    failed: Summary = {**summary, "error": str(error) or type(error).__name__}
    step = summary["steps"] if has_result else result_step(read_summary(folder))
    return failed if step is None else {**failed, "result_of_step": step}


def result_step(summary: Summary) -> int | None:
    """The step of the result in a summary's folder; None if unknown."""
    return summary.get("result_of_step") if "error" in summary else summary.get("steps")


def read_summary(folder: Path) -> Summary:
    """The summary.json of a run; {} if there is none that can be read."""
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return cast(Summary, summary) if isinstance(summary, dict) else {}
    return {}


def costs_of(folder: Path, step: int) -> Summary:
    """Time and peak memory from an existing summary.json of this step: the checkpoint's counters
    predate the final evaluation and export.  {} without one."""
    summary = read_summary(folder)
    is_of_step = summary.get("steps") == step
    costs = {key: value for key, value in summary.items() if key in _COSTS and is_of_step}
    return cast(Summary, costs)


def closing_lines(summary: Summary, places: dict[str, Any]) -> str:
    """Where everything is and what it cost."""
    in_training = summary["peak_training_bytes"]
    planned = summary.get("planned_training_bytes")
    aside = f" ({format_bytes(planned)} planned)" if planned else ""
    memory = f"{format_bytes(in_training)} in training{aside}, " if in_training else ""
    cost = (
        f"{plural(summary['steps'], 'step')} in {summary['seconds']:.0f} s "
        f"({summary['images_per_second']:.1f} images/s, median), {summary['wall_seconds']:.0f} s "
        f"in total; optimizer state {format_bytes(summary['optimizer_state_bytes'])}, peak memory "
        f"{memory}{format_bytes(summary['peak_memory_bytes'])} in total"
    )
    skipped, back = summary["skipped_steps"], summary["rollbacks"]
    lines = {
        "eval/loss": _learned(summary),
        "held out": _loss(summary.get("holdout_loss_after")),
        "averaged": _loss(summary.get("ema_loss_after")),
        "cost": cost,
        "skipped": f"{skipped} of {summary['steps']} steps, without a finite loss and gradient"
        if skipped
        else None,
        "rollbacks": f"{back}, to a checkpoint (train.log says why)" if back else None,
        **places,
    }
    return "\n".join(f"{title:<12}{said}" for title, said in lines.items() if said)


def _learned(summary: Summary) -> str:
    """The loss before and after, and the share of it that is left if the two are comparable."""
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if math.isnan(before):
        return f"{after:.4f}"
    was, now = summary["prediction_before"], summary["prediction"]
    if was != now:
        why = f"not comparable: the model predicted {was}, not {now}"
        return f"{before:.4f} -> {after:.4f} ({why})"
    share = f" ({after / before:.0%} of what it was)" if math.isfinite(after / before) else ""
    return f"{before:.4f} -> {after:.4f}{share}"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def format_bytes(count: int) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
