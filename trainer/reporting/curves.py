"""curves.png of a run: the values in its metrics.jsonl against steps.

Panels: the losses; the gradient norm, largest since the previous line; the update relative to the
weights; the learning rate; what an optimizer that finds its rate multiplies it by.
"""

from PIL import Image

from trainer.charts import chart, points
from trainer.charts.chart import LegendEntry, Line, Panel
from trainer.charts.points import Rows
from trainer.charts.strokes import Style, style
from trainer.reporting.measure import EVAL, HOLDOUT, TRAIN

_NOISY = (TRAIN, "train/grad_norm_max")  # drawn smoothed
_PALE = Style(colour="#d1d5db")  # of their unsmoothed values
# The title of each panel, and its metrics.
_PANELS = {
    "loss": (TRAIN, EVAL.metric, HOLDOUT.metric, "eval/ema_loss", "eval/ema_holdout_loss"),
    "gradient norm": ("train/grad_norm_max",),
    "update / weights": ("train/update_ratio",),
    "learning rate": ("train/lr",),
    "found rate": ("optim/d",),
}


def draw(rows: Rows) -> Image.Image | None:
    """The chart of a metrics.jsonl; None if no metric has two points."""
    panels, entries, is_smoothed = [], list[LegendEntry](), False
    begins = [value for _, value in points.of(rows, EVAL.metric)[:1]]
    for title, metrics in _PANELS.items():
        lines, pale = list[Line](), list[Line]()
        for metric in metrics:
            known = points.of(rows, metric)
            if len(known) < 2:
                continue
            stroke, over = style(len(entries)), points.window(len(known))
            entries.append(LegendEntry(stroke, metric, f"{known[-1][1]:.4g}"))
            if metric in _NOISY and len(known) > over:
                pale.append(Line(style=_PALE, points=known))
                known = points.smoothed(known, over)
            lines.append(Line(style=stroke, points=known))
        is_smoothed = is_smoothed or bool(pale)
        if lines:
            top = points.ceiling(begins) if title == "loss" else None
            panels.append(Panel(title=title, lines=[*lines, *pale], ceiling=top))
    if is_smoothed:
        entries.append(LegendEntry(_PALE, "each line of metrics.jsonl", ""))
    return chart.drawn(panels, "at the end", entries) if panels else None
