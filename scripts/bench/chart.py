"""The rows as a picture: how long a step takes, and how much state it keeps.

Time is a ratio, from a half to fifty, so its axis is logarithmic and its bars begin at 1: to the
left is faster than the reference.  State is an amount, so its axis is linear and begins at 0.
"""

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bench.measure import Row
from trainer.charts.axis import Axis

WIDTH, MARGIN, GAP = 1600, 32, 44  # pixels
ROW, BAR = 36, 22
TOP, BOTTOM = 132, 62
STATE_WIDTH = 430
LABEL_ROOM = 78  # for the number at a bar's end

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
OURS, PEER, ONE = "#2563eb", "#b4bac4", "#111827"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def draw(rows: list[Row], path: Path, footer: str) -> None:
    """Write the chart as a PNG; rows from top to bottom as they come."""
    picture = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), "white")
    pen = ImageDraw.Draw(picture)
    names_end = MARGIN + max(pen.textlength(row.name, font=_font(19)) for row in rows)
    state_left = WIDTH - MARGIN - STATE_WIDTH
    ratios = [row.ratio for row in rows]
    time = Axis(
        left=names_end + GAP + LABEL_ROOM,
        right=state_left - GAP - LABEL_ROOM,
        low=min([0.5, *ratios]),
        high=max([2.0, *ratios]),
        log=True,
    )
    most = max([1.0, *(row.state_per_param for row in rows)])
    state = Axis(left=state_left, right=WIDTH - MARGIN - LABEL_ROOM, low=0, high=most, log=False)

    _headings(pen, time.left - LABEL_ROOM, state_left)
    floor = TOP + ROW * len(rows)
    _ticks(pen, time, [t for t in TICKS if time.low <= t <= time.high], "x", floor)
    _ticks(pen, state, [float(t) for t in _state_ticks(most)], "", floor)
    for index, row in enumerate(rows):
        _draw_row(pen, row, TOP + ROW * index + ROW // 2, time, state)
    pen.line([(time(1), TOP - 6), (time(1), floor)], fill=ONE, width=2)
    pen.text((MARGIN, floor + BOTTOM - 14), footer, font=_font(15), fill=MUTED, anchor="ls")
    picture.save(path)


def _draw_row(pen: ImageDraw.ImageDraw, row: Row, middle: int, time: Axis, state: Axis) -> None:
    colour = OURS if row.ours else PEER
    top, bottom = middle - BAR // 2, middle + BAR // 2
    pen.text((MARGIN, middle), row.name, font=_font(19), fill=INK, anchor="lm")

    start, end = sorted((time(1), time(row.ratio)))
    pen.rectangle([start, top, end, bottom], fill=colour)
    label = f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.0f}"
    if row.ratio < 1:
        _number(pen, start - 8, middle, label, "rm")
    else:
        _number(pen, end + 8, middle, label, "lm")

    end = max(state(row.state_per_param), state.left + 1)
    pen.rectangle([state.left, top, end, bottom], fill=colour)
    kept = row.state_per_param
    label = "0" if kept < 5e-4 else f"{kept:.3f}" if kept < 0.1 else f"{kept:.2f}"
    _number(pen, end + 8, middle, label, "lm")


def _number(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str) -> None:
    """A number at a bar's end, on white so that no grid line runs through it."""
    font = _font(18)
    pen.rectangle(pen.textbbox((x, y), text, font=font, anchor=anchor), fill="white")
    pen.text((x, y), text, font=font, fill=INK, anchor=anchor)


def _headings(pen: ImageDraw.ImageDraw, time_left: float, state_left: float) -> None:
    bold: dict[str, Any] = {"font": _font(23), "fill": INK, "anchor": "ls"}
    pen.text((time_left, 44), "Time of a step, torch's fused AdamW = 1", **bold)
    pen.text((state_left, 44), "State, bytes per parameter", **bold)
    small: dict[str, Any] = {"font": _font(16), "fill": MUTED, "anchor": "ls"}
    pen.text((time_left, 70), "logarithmic; left of the line is faster", **small)
    pen.text((state_left, 70), "beside weights and gradients", **small)
    for index, (colour, label) in enumerate(((OURS, "this package"), (PEER, "peers"))):
        top = 30 + 28 * index
        pen.rectangle([MARGIN, top, MARGIN + 18, top + 18], fill=colour)
        pen.text((MARGIN + 28, top + 9), label, font=_font(18), fill=INK, anchor="lm")


def _ticks(
    pen: ImageDraw.ImageDraw, axis: Axis, values: list[float], unit: str, floor: int
) -> None:
    for value in values:
        x = axis(value)
        pen.line([(x, TOP - 6), (x, floor)], fill=GRID, width=1)
        pen.text((x, TOP - 12), f"{value:g}{unit}", font=_font(15), fill=MUTED, anchor="ms")


def _state_ticks(most: float) -> list[int]:
    return list(range(0, math.floor(most) + 1, max(1, math.ceil(most / 8))))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
