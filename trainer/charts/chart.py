"""Panels of lines side by side, with a legend.

The value axis is logarithmic: losses fall fast, then slowly, and the end matters most.  It covers
the runs that ended well, up to a ceiling: a run that diverges leaves at the top instead of
squeezing the others together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from PIL import Image, ImageDraw

from trainer.charts.axis import Axis
from trainer.charts.points import Points, thinned
from trainer.charts.strokes import Pen, Point, Style, text_width

SCALE = 2  # drawn this much larger, then reduced, for smooth lines
# Pixels:
_PANEL = 440  # width of the axes
_HEIGHT = 400  # of the axes, at least
_TALLEST = 680  # of the axes, at most, beside a long legend
_GAP = 64  # between panels
_LEFT = 60  # left of the first panel, for its ticks' numbers
_TOP = 52  # above the axes, for titles
_BOTTOM = 48  # below the axes, for steps
_LEGEND = 28  # left of the legend
_ENTRY = 22  # height of a line of the legend
_NAMES = 40  # from the legend's left to its names, past the strokes
_STRIP = 180  # width, at most, over which the points of one step are spread
_APART = 12  # distance, at most, between two of them
# Colours:
_MUTED = "#6b7280"  # ticks and axes
_GRID = "#e5e7eb"
_FAILED = "where a run failed"  # beside a cross
_FEW = 12  # a line with fewer points has a dot at each


@dataclass(kw_only=True)
class Line:
    """Values at steps, and how they are drawn."""

    style: Style
    points: Points
    band: list[tuple[float, float, float]] = field(default_factory=list)  # step, lowest, highest
    failed: bool = False
    cross: tuple[float, float] | None = None  # step and value, where it failed


@dataclass(kw_only=True)
class Panel:
    title: str
    lines: Sequence[Line]
    ceiling: float | None  # of the axis; None if unknown

    @property
    def is_of_points(self) -> bool:
        """Whether no line has more than two points, so that nothing is known in between."""
        return all(len(line.points) < 3 for line in self.lines)

    @property
    def has_bands(self) -> bool:
        return any(line.band for line in self.lines)

    def range(self) -> tuple[float, float]:
        """The lowest and the highest loss that are shown."""
        judged = [line for line in self.lines if not line.failed] or self.lines
        values = [value for line in judged for _, value in line.points]
        values += [value for line in judged for _, low, high in line.band for value in (low, high)]
        top = max(values) if self.ceiling is None else min(max(values), self.ceiling)
        return min(values) * 0.92, max(top, min(values)) * 1.08


class LegendEntry(NamedTuple):
    """A line of the legend."""

    style: Style
    name: str
    result: str


def drawn(panels: Sequence[Panel], title: str, entries: Sequence[LegendEntry]) -> Image.Image:
    """The panels, with the legend and its title on the right."""
    notes = _notes(panels)
    columns = ([e.name for e in entries], [e.result for e in entries])
    legend = _NAMES + sum(max(map(text_width, texts)) for texts in columns) + 16
    legend = max(legend, *(_aside(line) + text_width(line) for line in (title, *notes))) + 24
    left = _LEFT + len(panels) * (_PANEL + _GAP) - _GAP + _LEGEND
    below = _ENTRY * (len(entries) + len(notes) + 1)
    floor = _TOP + min(max(_HEIGHT, below - _BOTTOM), _TALLEST)
    height = max(floor + _BOTTOM, _TOP + below)
    picture = Image.new("RGB", ((left + legend) * SCALE, height * SCALE), "white")
    pen = Pen(ImageDraw.Draw(picture, "RGBA"), SCALE)
    for place, panel in enumerate(panels):
        _Axes(pen, _LEFT + place * (_PANEL + _GAP), floor, panel).draw()
    _write_legend(pen, left, title, entries)
    for line, note in enumerate(notes):
        middle = _TOP + (len(entries) + 0.5 + line) * _ENTRY
        pen.write((left + _aside(note), middle), note, "lm", colour=_MUTED)
        if note == _FAILED:
            pen.cross((left + 15, middle), _MUTED)
    return picture.reduce(SCALE)


def _notes(panels: Sequence[Panel]) -> list[str]:
    """Explanations of the marks that occur."""
    points = any(panel.has_bands and panel.is_of_points for panel in panels)
    bands = any(panel.has_bands and not panel.is_of_points for panel in panels)
    crosses = any(line.cross for panel in panels for line in panel.lines)
    what = " and ".join(["bands"] * bands + ["bars"] * points)
    notes = [f"means over seeds; {what} from lowest to highest"] if what else []
    notes += ["points stand in this order"] * any(panel.is_of_points for panel in panels)
    return notes + [_FAILED] * crosses


def _aside(note: str) -> int:
    """The indent of a legend line: room for its mark, if it has one."""
    return _NAMES if note == _FAILED else 0


def _write_legend(pen: Pen, left: int, title: str, entries: Sequence[LegendEntry]) -> None:
    pen.write((left, _TOP - 20), title, "ls", colour=_MUTED)
    second = left + _NAMES + max(text_width(entry.name) for entry in entries) + 16
    for place, entry in enumerate(entries):
        middle = _TOP + place * _ENTRY
        pen.stroke([(left, middle), (left + 30, middle)], entry.style, 3)
        pen.write((left + _NAMES, middle), entry.name, "lm")
        pen.write((second, middle), entry.result, "lm")


class _Axes:
    """One panel at its place."""

    def __init__(self, pen: Pen, left: int, floor: int, panel: Panel) -> None:
        self._pen, self._panel = pen, panel
        self._left, self._right, self._floor = left, left + _PANEL, floor
        self._low, self._high = panel.range()
        ends = (line.cross for line in panel.lines if line.cross)
        points = (point for line in panel.lines for point in line.points)
        self._last = round(max(step for step, _ in (*points, *ends)))
        count = len(panel.lines)
        self._apart = min(_APART, _STRIP / count) if panel.is_of_points else 0.0
        margin = self._apart * count / 2
        self._x = Axis(
            left=left + margin,
            right=self._right - margin,
            low=0,
            high=max(self._last, 1),
            log=False,
        )
        self._y = Axis(left=self._floor, right=_TOP, low=self._low, high=self._high, log=True)

    def draw(self) -> None:
        """Title, axes, bands, then lines, the best on top."""
        self._pen.write((self._left, _TOP - 20), self._panel.title, "ls", size=15)
        self._draw_ticks()
        numbered = list(enumerate(self._panel.lines))
        for place, line in reversed(numbered):
            self._draw_band(place, line)
        for place, line in reversed(numbered):
            self._draw_line(place, line)

    def _at(self, place: int, step: float, value: float) -> Point:
        """Pixel coordinates; values beyond the axis are clamped to its ends."""
        aside = (place - (len(self._panel.lines) - 1) / 2) * self._apart
        return self._x(step) + aside, self._y(min(max(value, self._low), self._high))

    def _draw_ticks(self) -> None:
        grid, axis = Style(colour=_GRID), Style(colour=_MUTED)
        for tick in log_ticks(self._low, self._high):
            y = self._y(tick)
            self._pen.stroke([(self._left, y), (self._right, y)], grid, 1)
            self._pen.write((self._left - 8, y), f"{tick:g}", "rm", colour=_MUTED)
        for step in [0, self._last] if self._panel.is_of_points else ticks(self._last):
            x = self._x(step)
            self._pen.stroke([(x, self._floor), (x, self._floor + 5)], axis, 1)
            self._pen.write((x, self._floor + 10), str(step), "mt", colour=_MUTED)
        self._pen.stroke([(self._left, self._floor), (self._right, self._floor)], axis, 1)
        self._pen.write((self._right, self._floor + 28), "steps", "rt", colour=_MUTED)

    def _draw_band(self, place: int, line: Line) -> None:
        lower = [self._at(place, step, low) for step, low, _ in line.band]
        upper = [self._at(place, step, high) for step, _, high in line.band]
        if self._panel.is_of_points:
            for bar in zip(lower, upper, strict=True):
                self._pen.stroke(bar, Style(colour=line.style.colour), 2)
        elif len(line.band) > 1:
            self._pen.fill([*lower, *reversed(upper)], line.style.colour)

    def _draw_line(self, place: int, line: Line) -> None:
        if not self._panel.is_of_points:
            for piece in inside(line.points, self._high):
                path = [self._at(place, step, value) for step, value in thinned(piece)]
                self._pen.stroke(path, line.style, 1 if line.failed else 2)
        marked = line.points if len(line.points) < _FEW else line.points[-1:]
        for step, value in marked:
            if value < self._high and (step, value) != line.cross:
                self._pen.dot(self._at(place, step, value), line.style.colour)
        if line.cross:
            self._pen.cross(self._at(place, *line.cross), line.style.colour)


def inside(points: Points, high: float) -> list[Points]:
    """The pieces of a line below the top, cut where it crosses it (interpolated linearly on the
    logarithmic axis)."""
    pieces: list[Points] = [[]]
    for (step, value), (after, then) in pairwise(points):
        if min(value, then) >= high:
            continue
        if max(value, then) > high:
            share = math.log(high / value) / math.log(then / value)
            edge = (step + share * (after - step), high)
        if value > high:
            pieces.append([edge])
        pieces[-1] = pieces[-1] or [(step, value)]
        pieces[-1].append(edge if then > high else (after, then))
    return [piece for piece in pieces if piece]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 or all digits if that gives fewer than 4; else round steps."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        shown = [tick for tick in found if low <= tick <= high]
        if len(shown) >= 4:
            return shown
    size = _round_step((high - low) / 4)
    return [n * size for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def ticks(last: int) -> list[int]:
    """0 and a few round steps."""
    return list(range(0, last + 1, int(_round_step(max(last / 4, 1)))))


def _round_step(rough: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that does not exceed `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))  # above `rough` if that is just below it
    return max(digit * power for digit in (0.5, 1, 2, 5) if digit * power <= rough)
