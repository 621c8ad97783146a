"""Points of a chart, from the rows of a metrics.jsonl."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]  # step, value

_LEAST = 5  # points in a smoothing window, at least
_PART = 40  # the window of a long line is this fraction of it
_MOST = 800  # points drawn per line
_ROOM = 1.5  # the ceiling, as a multiple of the largest loss before the first step


def of(rows: Rows, metric: str) -> Points:
    """A metric's values, without those that are missing, NaN or not positive (logarithmic axis)."""
    known = ((row["step"], row.get(metric)) for row in rows)
    return [(step, value) for step, value in known if value is not None and value > 0]


def window(count: int) -> int:
    """The smoothing window of a line with `count` points."""
    return max(_LEAST, count // _PART)


def smoothed(points: Points, over: int) -> Points:
    """The centred moving mean over `over` points; the window shrinks towards the ends, so that the
    first and the last value are unchanged."""
    # Exact, as after a spike of 1e16 times a value the difference of two rounded sums would be 0.
    sums = list(accumulate((Fraction(value) for _, value in points), initial=Fraction()))
    found = []
    for place, (step, _) in enumerate(points):
        side = min(over // 2, place, len(points) - 1 - place)
        first, end = place - side, place + side + 1
        found.append((step, float((sums[end] - sums[first]) / (end - first))))
    return found


def thinned(points: Points) -> Points:
    """As many points as a panel can show: the lowest and the highest of each block of neighbours,
    so that no spike is lost."""
    size = math.ceil(2 * len(points) / _MOST)
    if size <= 2:
        return points
    blocks = [points[first : first + size] for first in range(0, len(points), size)]
    ends = ({min(block, key=_value), max(block, key=_value)} for block in blocks)
    return [*sorted(point for pair in ends for point in pair if point != points[-1]), points[-1]]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def ceiling(begins: Sequence[float]) -> float | None:
    """The top of an axis of losses, which only a diverging run exceeds; None if unknown.  begins:
    the known losses before the first step."""
    return _ROOM * max(begins) if begins else None
