"""What a run came to: its summary and its closing lines."""

import json
from pathlib import Path
from typing import Any

from trainer import disk
from trainer.metrics import as_json


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json; a number that is not finite becomes null."""
    text = json.dumps(as_json(summary), indent=2) + "\n"
    disk.replace_text(folder / "summary.json", text)


def closing_lines(summary: dict[str, Any], places: dict[str, Any]) -> str:
    """Where everything is and what it cost."""
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    cost = (
        f"{summary['steps']} steps in {summary['seconds']:.0f} s "
        f"({summary['images_per_second']:.1f} images/s), "
        f"optimizer state {format_bytes(summary['optimizer_state_bytes'])}, "
        f"peak memory {format_bytes(summary['peak_training_bytes'])} in training, "
        f"{format_bytes(summary['peak_memory_bytes'])} in all"
    )
    lines = [
        f"{'eval/loss':<12}{before:.4f} -> {after:.4f} ({after / before:.0%} of what it was)",
        f"{'cost':<12}{cost}",
    ]
    if "ema_loss_after" in summary:
        lines.insert(1, f"{'of average':<12}{summary['ema_loss_after']:.4f}")
    if "holdout_loss_after" in summary:
        lines.insert(1, f"{'held out':<12}{summary['holdout_loss_after']:.4f}")
    return "\n".join(lines + [f"{title:<12}{path}" for title, path in places.items()])


def format_bytes(count: int) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
