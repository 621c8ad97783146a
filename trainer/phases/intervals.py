"""Work between steps that is due every so many steps or epochs."""

from fractions import Fraction

from trainer.config import Config, Interval, epochs_of

EVALUATING, DRAWING, SAVING, EXPORTING = "evaluating", "drawing", "saving", "exporting"


class Intervals:
    """After which steps of a run each kind of work is due.

    At the end of the run all of it is done anyway, so nothing is due after the last step.  Epochs
    have this configuration's number of steps and are counted from the run's first step; if one ends
    within a step, its work follows that step.
    """

    def __init__(self, config: Config, batches_per_epoch: Fraction) -> None:
        steps_per_epoch = batches_per_epoch / config.runtime.micro_batches
        options = {
            EVALUATING: config.log.eval_every,
            DRAWING: config.log.sample_every,
            SAVING: config.runtime.save_every,
            EXPORTING: config.method.export_every,
        }
        self._steps = config.schedule.steps
        self._every = {work: _in_steps(n, steps_per_epoch) for work, n in options.items()}

    def is_due(self, work: str, step: int) -> bool:
        """Whether this is due after step `step`, counted from 1."""
        return step < self._steps and self._times(work, step) > self._times(work, step - 1)

    def left(self, done: int) -> dict[str, int]:
        """How often each kind of work is still due after `done` steps, including the run's end."""
        last = self._steps - 1
        return {
            work: 1 + self._times(work, last) - self._times(work, min(done, last))
            for work in self._every
        }

    def _times(self, work: str, steps: int) -> int:
        """How often it was due within so many steps."""
        every = self._every[work]
        return int(steps // every) if every else 0


def _in_steps(every: Interval, steps_per_epoch: Fraction) -> Fraction:
    """An option's interval in steps, at least 1; 0 is never."""
    epochs = epochs_of(every)
    if epochs is None:
        return Fraction(every)
    return max(epochs * steps_per_epoch, Fraction(1)) if epochs else Fraction(0)
