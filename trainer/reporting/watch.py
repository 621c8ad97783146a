"""Every step's loss and gradient norm, which of them stand out, and whether the run diverges.

A diffusion loss varies more with its timesteps than with the weights: SDXL's falls a hundredfold
from the first to the last, so at batch 1 even ten steps often have three times the usual mean.
Losses are therefore relative: divided by what the evaluation before the first step found in the
same quarters of the timesteps.  As there, they are squared errors without weights and masks: a
Huber loss would not grow enough, and a mean of weighted losses has another scale.

A relative loss counts as a spike above 3 times the median of the previous 50, or above 3 in the
first 10 steps.  A gradient norm is compared with the median of the previous 50, the first 10 with
their own median, so the largest ratio is at least 1.  Runs of a sweep with the same seed see the
same timesteps, so their counts can be compared.

A run diverges if the mean relative loss of 20 steps is above 3; or if that of 50 steps is above 3
times the lowest so far, and above 1/2, since a rate that rises again (restarts) may lose some of
what was learned without any harm.  After a rollback means are of the steps since then, until there
are so many (of at least 5 and 20).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

_SPIKE = 3.0  # a loss above this times the median is one
WINDOW = 50  # steps in the median, and in the longer mean
_LEAST = 10  # fewest steps for a median
_SHORT = 20  # steps in the shorter mean
_FEW = 5  # fewest steps for it
_LOST = 0.5  # a relative loss below which most of what was learned is still there
_WELL = 2 / 3  # a mean above this times the least one of a divergence may be its beginning


def is_far(loss: float, before: float) -> bool:
    """Whether a loss is so far above the one before the first step that the run has diverged."""
    return loss > _SPIKE * before


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A mean relative loss that is far above what it was."""

    steps: int  # the last ones, of which it is the mean
    relative_loss: float
    lowest: float | None = None  # of as many steps; None: it is far above 1

    def __str__(self) -> str:
        found = (
            f"the loss of the last {self.steps} steps is {self.relative_loss:.3g} times what it "
            "was at their timesteps before the first step"
        )
        return found if self.lowest is None else f"{found}; at its lowest, {self.lowest:.3g} times"


@dataclass(kw_only=True)
class Watch:
    """Counts over all sessions of a run.

    Steps without a finite loss or norm are counted elsewhere (`trainer.training.guard`).
    """

    loss_spikes: int = 0
    grad_norm_over_median: float | None = None  # the largest; None in the first 9 steps
    onset: int | None = None  # the step from which a run may have diverged that did not go back
    lowest: float | None = None  # mean of WINDOW relative losses
    relative: list[float] = field(default_factory=list)  # losses of the last WINDOW steps
    norms: list[float] = field(default_factory=list)
    # Since the last report.
    steps: int = 0
    loss_sum: float = 0.0
    grad_norm_max: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            if name in vars(self):  # older versions have others
                setattr(self, name, value)

    @property
    def diverged(self) -> bool:
        return self.onset is not None

    def go_back(self) -> None:
        """Judge only what follows: a later divergence is not one of the checkpoint, nor of before
        it."""
        self.relative, self.norms, self.onset = [], [], None

    def step(
        self, loss: float, grad_norm: float, error: float = math.nan, before: float = math.nan
    ) -> None:
        """Count a step.  error: its squared error; before: the one at its timesteps before the
        first step; NaN if unknown, and then losses are not relative."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return
        self.steps, self.loss_sum = self.steps + 1, self.loss_sum + loss
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        is_known = before > 0
        relative = error / before if is_known else loss
        first = 1.0 if is_known else math.nan
        usual = median(self.relative) if len(self.relative) >= _LEAST else first
        self.loss_spikes += relative > _SPIKE * usual
        judged, known = [grad_norm], self.norms
        self.relative = [*self.relative, relative][-WINDOW:]
        self.norms = [*self.norms, grad_norm][-WINDOW:]
        if len(self.relative) == WINDOW:
            now = fmean(self.relative)
            self.lowest = now if self.lowest is None else min(self.lowest, now)
        if self.grad_norm_over_median is None:
            judged = known = self.norms
        if len(known) >= _LEAST and (usual_norm := median(known)) > 0:
            ratio = max(judged) / usual_norm
            self.grad_norm_over_median = max(self.grad_norm_over_median or 0.0, ratio)

    def divergence(self) -> Divergence | None:
        """What shows that the run diverges, if anything does.  Its losses are relative."""
        lately = self.relative[-_SHORT:]
        if len(lately) >= _FEW and (now := fmean(lately)) > _SPIKE:
            return Divergence(steps=len(lately), relative_loss=now)
        if len(self.relative) >= _SHORT and (now := fmean(self.relative)) > self._limit:
            return Divergence(steps=len(self.relative), relative_loss=now, lowest=self.lowest)
        return None

    def was_well(self, then: Sequence[float]) -> bool:
        """Whether the last losses of a checkpoint of this run, `then`, show no beginning of a
        divergence."""
        lately = then[-_SHORT:]  # the first losses of one count for little in a longer mean
        return not lately or fmean(lately) <= _WELL * self._limit

    @property
    def _limit(self) -> float:
        """The mean of WINDOW relative losses above which most of what was learned is lost."""
        return math.inf if self.lowest is None else max(_SPIKE * self.lowest, _LOST)

    def lately(self) -> dict[str, float]:
        """The mean loss and the largest gradient norm since the last call; NaN if no step was
        good."""
        count, total, largest = self.steps, self.loss_sum, self.grad_norm_max
        self.steps, self.loss_sum, self.grad_norm_max = 0, 0.0, 0.0
        if not count:
            return {"loss": math.nan, "grad_norm_max": math.nan}
        return {"loss": total / count, "grad_norm_max": largest}
