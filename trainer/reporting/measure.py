"""The loss by which runs are compared: that of the exported weights, after the last step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.reporting.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A final loss in summary.json; the lower, the better."""

    title: str  # in a table
    metric: str  # in metrics.jsonl
    keys: tuple[str, ...]  # in summary.json; the first one present is used

    def __call__(self, summary: Summary) -> float:
        """Its value; infinite if there is none."""
        known: Mapping[str, Any] = summary
        value = next((known[key] for key in self.keys if key in known), None)
        return value if value is not None and math.isfinite(value) else math.inf


TRAIN = "train/loss"  # in metrics.jsonl: the mean over the steps since the previous line
EVAL = Measure(title="eval after", metric="eval/loss", keys=("eval_loss_result", "eval_loss_after"))
HOLDOUT = Measure(
    title="held out",
    metric="eval/holdout_loss",
    keys=("holdout_loss_result", "holdout_loss_after"),
)


# Relative change of a loss before the first step, below which a model has learned nothing.
STILL = 1e-3


def got_worse(before: float, after: float) -> bool:
    """Whether a loss has grown since before the first step; false for NaN."""
    return after - before > STILL * before


def ended_well(summary: Summary) -> bool:
    """Whether a run did not fail, and has a final loss."""
    return "error" not in summary and math.isfinite(EVAL(summary))


def measure_of(summaries: Sequence[Summary]) -> Measure:
    """The measure that ranks these runs: the held-out loss if all that ended well have one."""
    good = [summary for summary in summaries if ended_well(summary)]
    held_out = bool(good) and all(math.isfinite(HOLDOUT(summary)) for summary in good)
    return HOLDOUT if held_out else EVAL


def objective(summary: Summary) -> float:
    """The value that a sweeper minimises."""
    return measure_of([summary])(summary)
