"""Every step's loss and gradient norm, and which of them stand out.

Losses of single steps go up and down with their timesteps.  A loss counts as a spike above 3 times
the median of the 50 before it.  Norms are compared with their own median.  Runs of a sweep with one
seed see the same timesteps, so their counts can be compared.
"""

import math
from dataclasses import dataclass, field
from statistics import median

_SPIKE = 3.0  # a loss above this times the median is one
_WINDOW = 50  # steps that the median is of
_LEAST = 10  # fewest steps for a median


@dataclass(kw_only=True)
class Watch:
    """Counts over all sessions of a run, saved with its counters.

    Steps without a finite loss or norm are counted elsewhere (`trainer.guard`).
    """

    loss_spikes: int = 0
    grad_norm_over_median: float | None = None  # the largest; None in the first few steps
    losses: list[float] = field(default_factory=list)  # the last, of _WINDOW steps
    norms: list[float] = field(default_factory=list)
    # Since the last report.
    steps: int = 0
    loss_sum: float = 0.0
    grad_norm_max: float = 0.0

    def step(self, loss: float, grad_norm: float) -> None:
        """Count a step."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return
        self.steps, self.loss_sum = self.steps + 1, self.loss_sum + loss
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        if len(self.losses) >= _LEAST:
            self.loss_spikes += loss > _SPIKE * median(self.losses)
            usual = median(self.norms)
            if usual > 0:
                self.grad_norm_over_median = max(
                    self.grad_norm_over_median or 0.0, grad_norm / usual
                )
        self.losses = [*self.losses, loss][-_WINDOW:]
        self.norms = [*self.norms, grad_norm][-_WINDOW:]

    def lately(self) -> dict[str, float]:
        """The mean loss and the largest gradient norm since the last call; NaN where no step was
        whole."""
        count, total, largest = self.steps, self.loss_sum, self.grad_norm_max
        self.steps, self.loss_sum, self.grad_norm_max = 0, 0.0, 0.0
        if not count:
            return {"loss": math.nan, "grad_norm_max": math.nan}
        return {"loss": total / count, "grad_norm_max": largest}
