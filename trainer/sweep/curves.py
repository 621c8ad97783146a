"""curves.png: losses against steps, one line a run, in one colour those that differ by the seed.

Both axes of loss are logarithmic: a loss falls fast, then slowly, and what decides is at the end.
A run that diverges leaves at the top: it must not squeeze the others together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from trainer import metrics
from trainer.axis import Axis
from trainer.sweep.runs import Comparison, Group, Summary

Points = list[tuple[int, float]]
Pen = ImageDraw.ImageDraw

_SCALE = 2  # drawn larger and made smaller, for smooth lines
# Pixels:
_PANEL = 480  # width of the axes
_HEIGHT = 400  # of the axes
_GAP = 64  # between panels
_LEFT = 60  # left of the first panel, for its ticks' numbers
_TOP = 52  # above the axes, for titles
_BOTTOM = 44  # below the axes, for steps
_LEGEND = 24  # left of the legend
_ENTRY = 22  # height of a line of the legend
_NAMES = 36  # from the legend's left to its names, past the strokes
# Colours:
_INK = "#1f2937"  # text
_MUTED = "#6b7280"  # ticks and axes
_GRID = "#e5e7eb"
# Those of Okabe and Ito, and three more; after the last they come again, in broken lines.
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
_SMOOTH = 5  # lines of metrics.jsonl, of whose losses a point is the mean
_FEW = 12  # points, each of which is a dot
_ROOM = 3.0  # above the largest loss that a run begins with


@dataclass(kw_only=True)
class _Line:
    """A run's losses, and how they are drawn."""

    colour: str
    is_broken: bool
    points: Points


def draw(runs: Sequence[tuple[Path, Summary]]) -> Image.Image | None:
    """The chart; None where no run has two points.  runs: folders and summaries."""
    folders = {id(summary): folder for folder, summary in runs}
    groups = Comparison([summary for _, summary in runs]).groups
    panels: list[list[_Line]] = [[], []]
    for place, group in enumerate(groups):
        colour, is_broken = _style(place)
        for run in group.runs:
            rows = metrics.read(folders[id(run)] / "metrics.jsonl")
            kinds = (_points(rows, "eval/loss"), _smoothed(_points(rows, "train/loss")))
            for lines, points in zip(panels, kinds, strict=True):
                lines.append(_Line(colour=colour, is_broken=is_broken, points=points))
    if max(len(line.points) for lines in panels for line in lines) < 2:
        return None
    return _drawn(panels, groups)


def _drawn(panels: Sequence[list[_Line]], groups: Sequence[Group]) -> Image.Image:
    names, results = ([g.name for g in groups], [_result(g) for g in groups])
    legend = _NAMES + sum(max(map(_text_width, texts)) for texts in (names, results)) + 24
    width = _LEFT + len(panels) * (_PANEL + _GAP) + legend
    height = max(_TOP + _HEIGHT + _BOTTOM, _TOP + _ENTRY * (len(groups) + 1))
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), "white")
    pen = ImageDraw.Draw(picture)
    titles = ("eval/loss", f"train/loss, mean of {_SMOOTH} lines")
    for place, (title, lines) in enumerate(zip(titles, panels, strict=True)):
        _panel(pen, _LEFT + place * (_PANEL + _GAP), title, lines)
    _write_legend(pen, _LEFT + len(panels) * (_PANEL + _GAP) - _GAP + _LEGEND, groups)
    return picture.reduce(_SCALE)


def _panel(pen: Pen, left: int, title: str, lines: Sequence[_Line]) -> None:
    """Axes, ticks and lines, with the title above them."""
    right, floor = left + _PANEL, _TOP + _HEIGHT
    _text(pen, left, _TOP - 20, title, "ls", size=15)
    values = [value for line in lines for _, value in line.points]
    if not values:
        return
    firsts = max(line.points[0][1] for line in lines if line.points)
    low, high = min(values) * 0.92, min(max(values), _ROOM * firsts) * 1.08
    last = max(step for line in lines for step, _ in line.points)
    x = Axis(left=left, right=right, low=0, high=max(last, 1), log=False)
    y = Axis(left=floor, right=_TOP, low=low, high=high, log=True)
    for tick in _log_ticks(low, high):
        _stroke(pen, [(left, y(tick)), (right, y(tick))], _GRID, 1)
        _text(pen, left - 8, y(tick), f"{tick:g}", "rm", colour=_MUTED)
    for step in _ticks(last):
        _stroke(pen, [(x(step), floor), (x(step), floor + 5)], _MUTED, 1)
        _text(pen, x(step), floor + 10, str(step), "mt", colour=_MUTED)
    _stroke(pen, [(left, floor), (right, floor)], _MUTED, 1)
    _text(pen, right, floor + 26, "steps", "rt", colour=_MUTED)
    for line in reversed(lines):  # the best on top
        for piece in _inside(line.points, high):
            path = [(x(step), y(value)) for step, value in piece]
            _stroke(pen, path, line.colour, 2, line.is_broken)
        shown = [(x(step), y(value)) for step, value in line.points if value < high]
        for at in shown if len(shown) < _FEW else shown[-1:]:
            _dot(pen, at, line.colour)


def _inside(points: Points, high: float) -> list[Points]:
    """The pieces of a line below the top, each up to where it leaves or comes back."""
    pieces: list[Points] = [[]]
    for (step, value), (after, then) in pairwise(points):
        if min(value, then) >= high:
            pieces.append([])
            continue
        pieces[-1] = pieces[-1] or [(step, min(value, high))]
        pieces[-1].append((after, min(then, high)))
    return [piece for piece in pieces if piece]


def _write_legend(pen: Pen, left: int, groups: Sequence[Group]) -> None:
    _text(
        pen,
        left,
        _TOP - 20,
        f"{groups[0].measure.metric} in the end, best first",
        "ls",
        colour=_MUTED,
    )
    second = left + _NAMES + max(_text_width(group.name) for group in groups) + 16
    for place, group in enumerate(groups):
        middle, (colour, is_broken) = _TOP + place * _ENTRY, _style(place)
        _stroke(pen, [(left, middle), (left + 26, middle)], colour, 3, is_broken)
        _text(pen, left + _NAMES, middle, group.name, "lm")
        _text(pen, second, middle, _result(group), "lm")


def _result(group: Group) -> str:
    """A group's loss, and how many of its runs ended well, where not all did."""
    loss = f"{group.loss:.4f}" if group.good else "failed"
    spread = f" ± {group.spread:.4f}" if len(group.good) > 1 else ""
    few = f" ({group.counted})" if 0 < len(group.good) < len(group.runs) else ""
    return f"{loss}{spread}{few}"


def _style(place: int) -> tuple[str, bool]:
    """The colour of a group, and whether its lines are broken."""
    return _COLOURS[place % len(_COLOURS)], place // len(_COLOURS) % 2 == 1


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """Steps and losses; what is not finite, or cannot be drawn, is left out."""
    known = ((row["step"], row.get(key)) for row in rows)
    return [(step, value) for step, value in known if value is not None and value > 0]


def _smoothed(points: Points) -> Points:
    """The mean of each loss and the few before it."""
    windows = [points[max(0, end - _SMOOTH) : end] for end in range(1, len(points) + 1)]
    return [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ..., or where these are few every digit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) >= 4:
            return shown
    return shown


def _ticks(last: int) -> list[int]:
    """0 and a few round steps."""
    rough = max(last / 4, 1)
    power = 10 ** math.floor(math.log10(rough))
    size = max(digit * power for digit in (1, 2, 5) if digit * power <= rough)
    return list(range(0, last + 1, size))


def _stroke(
    pen: Pen,
    path: Sequence[tuple[float, float]],
    colour: str,
    width: int,
    is_broken: bool = False,
) -> None:
    path = [(x * _SCALE, y * _SCALE) for x, y in path]
    parts = [piece for a, b in pairwise(path) for piece in _dashes(a, b)]
    for part in parts if is_broken else [path]:
        pen.line(part, fill=colour, width=width * _SCALE, joint="curve")


def _dashes(
    a: tuple[float, float], b: tuple[float, float], length: float = 8 * _SCALE
) -> list[list[tuple[float, float]]]:
    """The first halves of pieces of this length, or of the whole where it is shorter."""
    count = max(1, round(math.dist(a, b) / length))

    def at(share: float) -> tuple[float, float]:
        return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])

    return [[at(n / count), at((n + 0.55) / count)] for n in range(count)]


def _dot(pen: Pen, at: tuple[float, float], colour: str) -> None:
    x, y, radius = at[0] * _SCALE, at[1] * _SCALE, 3 * _SCALE
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _text(
    pen: Pen, x: float, y: float, text: str, anchor: str, size: int = 13, colour: str = _INK
) -> None:
    font = _font(size * _SCALE)
    pen.text((x * _SCALE, y * _SCALE), text, font=font, fill=colour, anchor=anchor)


def _text_width(text: str) -> int:
    return math.ceil(_font(13 * _SCALE).getlength(text) / _SCALE)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
