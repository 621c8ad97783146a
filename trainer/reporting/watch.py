"""Every step's loss and gradient norm, and which of them stand out.

Losses of single steps vary with their timesteps.  A loss counts as a spike above 3 times the median
of the previous 50, or in the first 10 steps above 3 times the loss before the first step, if the
two are comparable.  A gradient norm is compared with the median of the previous 50, the first 10
with their own median, so the largest ratio is at least 1.  Runs of a sweep with the same seed see
the same timesteps, so their counts can be compared.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

_SPIKE = 3.0  # a loss above this times the median is one
_WINDOW = 50  # steps in the median
_LEAST = 10  # fewest steps for a median
_FEW = 5  # fewest steps for a mean


def is_far(loss: float, before: float) -> bool:
    """Whether a loss is so far above the one before the first step that the run has diverged."""
    return loss > _SPIKE * before


@dataclass(kw_only=True)
class Watch:
    """Counts over all sessions of a run.

    Steps without a finite loss or norm are counted elsewhere (`trainer.training.guard`).
    """

    loss_spikes: int = 0
    grad_norm_over_median: float | None = None  # the largest; None in the first 9 steps
    diverged: bool = False  # whether `found_divergence` has found one
    losses: list[float] = field(default_factory=list)  # of the last _WINDOW steps
    norms: list[float] = field(default_factory=list)
    # Since the last report.
    steps: int = 0
    loss_sum: float = 0.0
    grad_norm_max: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def step(self, loss: float, grad_norm: float, before: float = math.nan) -> None:
        """Count a step.  before: the loss before the first step; NaN if unknown."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return
        self.steps, self.loss_sum = self.steps + 1, self.loss_sum + loss
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        usual = median(self.losses) if len(self.losses) >= _LEAST else before
        self.loss_spikes += loss > _SPIKE * usual
        judged, known = [grad_norm], self.norms
        self.losses = [*self.losses, loss][-_WINDOW:]
        self.norms = [*self.norms, grad_norm][-_WINDOW:]
        if self.grad_norm_over_median is None:
            judged = known = self.norms
        if len(known) >= _LEAST and (usual_norm := median(known)) > 0:
            ratio = max(judged) / usual_norm
            self.grad_norm_over_median = max(self.grad_norm_over_median or 0.0, ratio)

    def found_divergence(self, before: float) -> float | None:
        """The mean loss of the last 10 steps (5 suffice), the first time that it is above 3 times
        the loss before the first step; else None."""
        lately = self.losses[-_LEAST:]
        if self.diverged or len(lately) < _FEW or not is_far(mean(lately), before):
            return None
        self.diverged = True
        return mean(lately)

    def lately(self) -> dict[str, float]:
        """The mean loss and the largest gradient norm since the last call; NaN if no step was
        good."""
        count, total, largest = self.steps, self.loss_sum, self.grad_norm_max
        self.steps, self.loss_sum, self.grad_norm_max = 0, 0.0, 0.0
        if not count:
            return {"loss": math.nan, "grad_norm_max": math.nan}
        return {"loss": total / count, "grad_norm_max": largest}
