"""Judges a step before it changes anything: a loss or gradient that is not finite must not reach
the weights."""

import logging
import math

from trainer.errors import UserError

log = logging.getLogger(__name__)


class Guard:
    """Counts skipped steps, and stops a run that only skips.

    `skipped` is the number so far, of which at most `max_in_a_row` may be consecutive.  In a fused
    backward pass a gradient is known only when parts of the step are done: such a step is finished
    (the optimizer skips elements whose gradient is not finite), and counts as skipped too.
    """

    def __init__(self, max_in_a_row: int, skipped: int = 0) -> None:
        self.max_in_a_row = max_in_a_row
        self.skipped = skipped
        self._in_a_row = 0

    def accepts(self, step: int, loss: float, grad_norm: float, begun: bool = False) -> bool:
        """Whether this step may update the weights, or finish updating them."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        done, left = "skipped", "weights and optimizer are unchanged"
        if begun:
            done, left = "stepped in part", "elements without a finite gradient are unchanged"
        log.warning("step %d %s: loss %g, gradient norm %g; %s", step, done, loss, grad_norm, left)
        return begun

    def complaint(self) -> UserError | None:
        """The error that ends the run after too many skipped steps in a row; None before."""
        count = self._in_a_row
        if count <= self.max_in_a_row:
            return None
        return UserError(
            f"{count} step{'s in a row' if count > 1 else ''} without a finite loss and gradient; "
            "lower optim.lr, or check the model's VAE and the data (runtime.max_skipped_steps "
            "allows more)"
        )
