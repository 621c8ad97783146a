"""curves.png: losses against steps, a line for what differs by more than the seed.

Of several seeds it is the mean, in a band from the lowest to the highest; a seed that failed has a
line of its own, with a cross at its end.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from trainer import metrics
from trainer.measure import EVAL, HOLDOUT, ended_well
from trainer.sweep import chart
from trainer.sweep.chart import Line, Points, Style
from trainer.sweep.runs import Comparison, Group, Summary

_TRAIN = "train/loss"
_SMOOTH = 5  # lines of metrics.jsonl, of whose losses a point is the mean
_ROOM = 1.5  # above the largest loss before the first step
# Those of Okabe and Ito, and three more; after the last they come again, in other strokes.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#111827",
    "#8c564b",
    "#7f7f7f",
    "#6a3d9a",
)
_DASHES = ((), (9, 5), (2, 4), (11, 4, 2, 4))  # pixels, drawn and left out by turns

Rows = list[dict[str, Any]]


def draw(runs: Sequence[tuple[Path, Summary]]) -> Image.Image | None:
    """The chart; None where no run has two points.  runs: folders and summaries."""
    rows = {id(summary): metrics.read(folder / "metrics.jsonl") for folder, summary in runs}
    groups = Comparison([summary for _, summary in runs]).groups
    begins = [value for found in rows.values() for _, value in _points(found, EVAL.metric)[:1]]
    panels = []
    for metric in (HOLDOUT.metric, EVAL.metric, _TRAIN):
        lines = [
            line
            for place, group in enumerate(groups)
            for line in _lines(group, metric, lambda run: rows[id(run)], style(place))
        ]
        title = metric if metric != _TRAIN else f"{metric}, mean of {_SMOOTH} lines"
        panels.append(chart.Panel(title=title, lines=lines, ceiling=_ceiling(begins)))
    shown = [panel for panel in panels if any(len(line.points) > 1 for line in panel.lines)]
    if not shown:
        return None
    entries = [chart.Entry(style(n), group.name, _result(group)) for n, group in enumerate(groups)]
    return chart.drawn(shown, f"{groups[0].measure.metric} in the end, best first", entries)


def style(place: int) -> Style:
    """The colour and the strokes of a group; forty are different."""
    return Style(
        colour=_COLOURS[place % len(_COLOURS)],
        dashes=_DASHES[place // len(_COLOURS) % len(_DASHES)],
    )


def _lines(
    group: Group, metric: str, rows_of: Callable[[Summary], Rows], style: Style
) -> list[Line]:
    """A group's line: the runs that ended well as one, each that failed as another."""
    good = [found for run in group.good if (found := _drawn(rows_of(run), metric))]
    mean_of_good = _mean(good, style) if good else None  # no points: no step in common
    lines = [mean_of_good] if mean_of_good and mean_of_good.points else []
    for run in group.runs:
        found = [] if ended_well(run) else _drawn(rows_of(run), metric)
        is_end = bool(found) and found[-1][0] == _last_step(rows_of(run))
        if len(found) > 1 or is_end:
            lines.append(Line(style=style, points=found, failed=True, has_cross=is_end))
    return lines


def _mean(runs: Sequence[Points], style: Style) -> Line:
    """The mean of several runs' losses at the steps that all of them have, and what they lie
    between."""
    if len(runs) == 1:
        return Line(style=style, points=runs[0])
    known = [dict(points) for points in runs]
    steps = [step for step, _ in runs[0] if all(step in points for points in known)]
    at = [(step, [points[step] for points in known]) for step in steps]
    return Line(
        style=style,
        points=[(step, mean(values)) for step, values in at],
        band=[(step, min(values), max(values)) for step, values in at],
    )


def _drawn(rows: Rows, metric: str) -> Points:
    points = _points(rows, metric)
    return smoothed(points) if metric == _TRAIN else points


def _points(rows: Rows, metric: str) -> Points:
    """Steps and losses; what is not finite, or cannot be drawn, is left out."""
    known = ((row["step"], row.get(metric)) for row in rows)
    return [(step, value) for step, value in known if value is not None and value > 0]


def smoothed(points: Points) -> Points:
    """The mean of each loss and as many on both of its sides; the first and the last are as they
    are."""
    found = []
    for place, (step, _) in enumerate(points):
        side = min(_SMOOTH // 2, place, len(points) - 1 - place)
        window = points[place - side : place + side + 1]
        found.append((step, mean(value for _, value in window)))
    return found


def _last_step(rows: Rows) -> int:
    """The last step with a loss."""
    return max(step for metric in (EVAL.metric, _TRAIN) for step, _ in _points(rows, metric)[-1:])


def _ceiling(begins: Sequence[float]) -> float | None:
    return _ROOM * max(begins) if begins else None


def _result(group: Group) -> str:
    """A group's loss, and how many of its runs ended well, where not all did."""
    loss = f"{group.loss:.4f}" if group.good else "failed"
    spread = f" ± {group.spread:.4f}" if len(group.good) > 1 else ""
    few = f" ({group.counted})" if 0 < len(group.good) < len(group.runs) else ""
    return f"{loss}{spread}{few}"
