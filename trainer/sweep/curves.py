"""curves.png: loss against steps, one line for each group of runs that differ only by the seed.

With several seeds it is their mean, in a band from the lowest to the highest; a failed run has its
own line, with a cross at the step where it failed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from PIL import Image

from trainer.charts import chart, points
from trainer.charts.chart import Line
from trainer.charts.points import Points, Rows
from trainer.charts.strokes import Style, style
from trainer.reporting import metrics
from trainer.reporting.measure import EVAL, HOLDOUT, TRAIN, ended_well
from trainer.sweep.runs import Comparison, Group, RunSummary


def draw(runs: Sequence[RunSummary]) -> Image.Image | None:
    """The chart; None if no run has two points."""
    rows = {id(run): metrics.read(Path(run["folder"]) / "metrics.jsonl") for run in runs}
    groups = Comparison(runs).groups
    begins = [value for found in rows.values() for _, value in points.of(found, EVAL.metric)[:1]]
    last = {key: _last_step(found) for key, found in rows.items()}
    panels = []
    for metric in (HOLDOUT.metric, EVAL.metric, TRAIN):
        known = {key: points.of(found, metric) for key, found in rows.items()}
        title = metric
        if metric == TRAIN:
            over = points.window(max(map(len, known.values())))
            known = {key: points.smoothed(found, over) for key, found in known.items()}
            title = f"{metric}, mean of {over} lines"
        ceiling = points.ceiling(begins)
        panels.append(chart.Panel(title=title, lines=_lines(groups, known, last), ceiling=ceiling))
    shown = [panel for panel in panels if any(len(line.points) > 1 for line in panel.lines)]
    if not shown:
        return None
    entries = [
        chart.LegendEntry(style(place), group.name, _result(group))
        for place, group in enumerate(groups)
    ]
    return chart.drawn(shown, f"{groups[0].measure.metric} at the end, best first", entries)


def _lines(
    groups: Sequence[Group], known: Mapping[int, Points], last: Mapping[int, float]
) -> list[Line]:
    """The lines of each group: one for all runs that ended well, one for each that failed.

    known, last: the points of each run, and the last step with a loss, by the id of its summary.
    """
    lines = []
    for place, group in enumerate(groups):
        good = [known[id(run)] for run in group.good if known[id(run)]]
        mean_of_good = _mean(good, style(place)) if good else None  # no points: no step in common
        lines += [mean_of_good] if mean_of_good and mean_of_good.points else []
        for run in group.runs:
            found = [] if ended_well(run) else known[id(run)]
            is_end = bool(found) and found[-1][0] == last[id(run)]
            if len(found) > 1 or is_end:
                failed_at = max(run.get("steps", 0), last[id(run)])
                cross = (failed_at, found[-1][1]) if is_end else None
                lines.append(Line(style=style(place), points=found, failed=True, cross=cross))
    return lines


def _mean(runs: Sequence[Points], style: Style) -> Line:
    """The mean and range of several runs' losses, at the steps that all of them have."""
    if len(runs) == 1:
        return Line(style=style, points=runs[0])
    known = [dict(found) for found in runs]
    steps = [step for step, _ in runs[0] if all(step in found for found in known)]
    at = [(step, [found[step] for found in known]) for step in steps]
    return Line(
        style=style,
        points=[(step, mean(values)) for step, values in at],
        band=[(step, min(values), max(values)) for step, values in at],
    )


def _last_step(rows: Rows) -> float:
    """The last step with a loss; 0 if there is none."""
    ends = (points.of(rows, metric)[-1:] for metric in (EVAL.metric, TRAIN))
    return max((step for end in ends for step, _ in end), default=0)


def _result(group: Group) -> str:
    """A group's loss, and how many of its runs ended well if not all did."""
    loss = f"{group.loss:.4f}" if group.good else "failed"
    spread = f" ± {group.spread:.4f}" if len(group.good) > 1 else ""
    few = f" ({group.counted})" if 0 < len(group.good) < len(group.runs) else ""
    return f"{loss}{spread}{few}"
