"""What is drawn of the rows of a metrics.jsonl."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]  # step, value

_LEAST = 5  # rows, of which a point of a smoothed line is the mean
_PART = 40  # of a long line, where that is more
_MOST = 800  # points of a line
_ROOM = 1.5  # above the largest loss before the first step


def of(rows: Rows, metric: str) -> Points:
    """Its values; what is not finite, or has no place on a logarithmic axis, is left out."""
    known = ((row["step"], row.get(metric)) for row in rows)
    return [(step, value) for step, value in known if value is not None and value > 0]


def window(count: int) -> int:
    """How many of a line's points a smoothed line has the mean of."""
    return max(_LEAST, count // _PART)


def smoothed(points: Points, over: int) -> Points:
    """The mean of each value and as many on both of its sides, `over` in all; the first and the
    last are as they are."""
    sums = list(accumulate((value for _, value in points), initial=0.0))
    found = []
    for place, (step, _) in enumerate(points):
        side = min(over // 2, place, len(points) - 1 - place)
        first, end = place - side, place + side + 1
        found.append((step, (sums[end] - sums[first]) / (end - first)))
    return found


def thinned(points: Points) -> Points:
    """As many as a panel can show: of neighbours the lowest and the highest, so that no spike is
    lost."""
    size = math.ceil(2 * len(points) / _MOST)
    if size <= 2:
        return points
    blocks = [points[first : first + size] for first in range(0, len(points), size)]
    ends = ({min(block, key=_value), max(block, key=_value)} for block in blocks)
    return [*sorted(point for pair in ends for point in pair if point != points[-1]), points[-1]]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def ceiling(begins: Sequence[float]) -> float | None:
    """The top of an axis of losses: what a run that diverges rises above.  begins: the losses
    before the first step; None where none is known."""
    return _ROOM * max(begins) if begins else None
