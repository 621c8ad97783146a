"""Judges a step before it changes anything: a loss or gradient that is not finite must not reach
the weights."""

import logging
import math

from trainer.errors import UserError

log = logging.getLogger(__name__)


class Guard:
    """Counts skipped steps, and stops a run that only skips.

    `skipped` is the number so far.  Up to `max_in_a_row` may follow each other.
    """

    def __init__(self, max_in_a_row: int, skipped: int = 0) -> None:
        self.max_in_a_row = max_in_a_row
        self.skipped = skipped
        self._in_a_row = 0

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether this step may update the weights.  Raises UserError after too many refusals in a
        row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        log.warning(
            "step %d skipped: loss %g, gradient norm %g; weights and optimizer are unchanged",
            step,
            loss,
            grad_norm,
        )
        if self._in_a_row > self.max_in_a_row:
            raise UserError(
                f"{self._in_a_row} steps in a row without a finite loss and gradient; "
                "the last checkpoint is from before. Lower optim.lr, or check the model's VAE and "
                "the data (runtime.max_skipped_steps allows more)"
            )
        return False
