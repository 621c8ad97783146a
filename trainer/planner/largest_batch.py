"""The largest batch that fits, found in a few rehearsals.

A peak is a line in the batch size, or several of which the highest counts (activations at one
moment of a step, gradients at another).  So a batch size is estimated from two that were planned,
and then planned itself: the answer is never an estimate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.planner.plan import Plan
from trainer.planner.room import Room
from trainer.reporting.report import format_bytes

LIMIT = 256  # larger ones are not tried: they are of no use in fine-tuning


@dataclass(frozen=True, kw_only=True)
class LargestBatch:
    """Two plans of neighbouring batch sizes."""

    fitting: Plan | None  # None: not even one picture at a time fits
    too_large: Plan | None  # with one picture more; None: `LIMIT` is reached

    def __str__(self) -> str:
        if self.fitting is None:
            assert self.too_large is not None
            return f"no data.batch_size fits: 1 needs {_needed(self.too_large)}"
        size, needed = _size(self.fitting), _needed(self.fitting)
        if self.too_large is None:
            return f"data.batch_size={size} fits ({needed}), and larger ones were not tried"
        return (
            f"the largest data.batch_size that fits is {size} ({needed}); {size + 1} needs "
            f"{_needed(self.too_large)}"
        )


def find(plan: Plan, room: Room, planned: Callable[[int], Plan]) -> LargestBatch:
    """The largest batch that fits in the room.

    plan: of one batch size, whether it fits or not.  planned: batch size -> the plan of the same
    run with it, which takes seconds.
    """
    fitting, too_large = (plan, None) if plan.fits(room) else (None, plan)
    guess = 2 * _size(plan) if fitting else 1
    while True:
        least = _size(fitting) + 1 if fitting else 1
        most = _size(too_large) - 1 if too_large else LIMIT
        if least > most:
            return LargestBatch(fitting=fitting, too_large=too_large)
        before, tried = fitting or too_large, planned(min(max(guess, least), most))
        if tried.fits(room):
            fitting = tried
        else:
            too_large = tried
        assert before is not None
        pair = (fitting, too_large) if fitting and too_large else (before, tried)
        guess = _estimate(*pair, room)


def _estimate(one: Plan, other: Plan, room: Room) -> int:
    """The largest batch that fits if the peak is a line through those of two plans."""
    slope = (other.training_bytes - one.training_bytes) / (_size(other) - _size(one))
    if slope <= 0:  # something else is the peak, as gradients are in small batches
        return LIMIT
    free = room.free_bytes / (1 + one.fragmented)
    return _size(one) + math.floor((free - one.training_bytes) / slope)


def _size(plan: Plan) -> int:
    return plan.config.data.batch_size


def _needed(plan: Plan) -> str:
    return format_bytes(plan.needed_bytes)
