"""Judges a step before it changes anything: a loss or gradient that is not finite must not reach
the weights."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.training.gradients import Outcome

log = logging.getLogger(__name__)

_SLOWER = 0.5  # learning rate after a rollback, relative to the one before


def slowed(rollbacks: int) -> float:
    """What the schedule's learning rate is multiplied by after so many rollbacks."""
    return _SLOWER**rollbacks


class Guard:
    """Counts skipped steps, stops a run that only skips, and slows one that went back.

    `skipped` is their number so far; `in_a_row`, which may be at most `max_in_a_row`, counts those
    since the last whole step, `last_whole` (0: none).  A fused backward pass finds a bad gradient
    only when part of the step is done: that step is finished (the optimizer skips elements whose
    gradient is not finite), and counts as skipped too.  `last_update` is the last step that changed
    weights, whole or not.  `rollbacks` counts how often the run went back to a checkpoint; each
    halves the learning rate (`lr_scale`).
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.skipped = self.in_a_row = self.last_whole = self.last_update = self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "last_whole": self.last_whole,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which is of a whole step or of a return to one."""
        self.skipped, self.last_whole = state["skipped"], state["last_whole"]
        self.rollbacks = state.get("rollbacks", 0)  # of older versions: none
        self.last_update = self.last_whole

    def go_back(self, step: int) -> None:
        """Count a return to a checkpoint after step `step`; the weights are good again."""
        self.rollbacks, self.in_a_row, self.last_update = self.rollbacks + 1, 0, step

    @property
    def lr_scale(self) -> float:
        """What the schedule's learning rate is multiplied by."""
        return slowed(self.rollbacks)

    def accepts(self, step: int, outcome: Outcome) -> bool:
        """Whether this step may update the weights, or finish updating them."""
        loss, grad_norm = outcome.loss, outcome.grad_norm
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row, self.last_whole, self.last_update = 0, step, step
            return True
        self.skipped += 1
        self.in_a_row += 1
        done, left = "was skipped", "weights and optimizer are unchanged"
        if outcome.partially_applied:
            done = "was applied only partly"
            left = "elements without a finite gradient are unchanged"
            self.last_update = step
        log.warning("step %d %s: loss %g, gradient norm %g; %s", step, done, loss, grad_norm, left)
        return outcome.partially_applied

    @property
    def is_exhausted(self) -> bool:
        """Whether more steps in a row were skipped than may be."""
        return self.in_a_row > self.max_in_a_row


@torch.no_grad()
def broken(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold a NaN or an infinity.  Each is read once, on its device, and
    the host waits once."""
    read = [name for name, x in tensors.items() if x.numel()]
    if not read:
        return []
    extremes = [torch.stack(torch.aminmax(tensors[name].detach())).float() for name in read]
    finite = torch.stack([pair.to(extremes[0].device) for pair in extremes]).isfinite().all(1)
    return [name for name, is_finite in zip(read, finite.tolist(), strict=True) if not is_finite]
