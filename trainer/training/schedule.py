"""The length of a run, and its learning rate, a pure function of the optimizer's step, so that a
resumed run needs no scheduler state."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from trainer.config import DecayConfig, ScheduleConfig, schema_of
from trainer.config import of_saved as of_saved_group
from trainer.errors import UserError

_WARMUP = 20  # steps, at most, if not set
_ALMOST = 1e-6  # steps: tolerance for rounding errors


def settled(
    config: ScheduleConfig, steps_per_epoch: float, done: tuple[int, float] = (0, 0.0)
) -> ScheduleConfig:
    """The configuration with its open values filled in: the run's steps if its length is in epochs,
    and the warm-up's.  done: steps and epochs done by a resumed run, whose epochs may have had
    another length.

    Raises UserError for a run that is shorter than its warm-up.
    """
    steps, warmup = config.steps, config.warmup_steps
    if config.epochs is not None:
        steps_done, epochs_done = done
        exact = steps_done + (config.epochs - epochs_done) * steps_per_epoch
        # Round half up, whichever step a run resumes from: `exact` differs in its last bits.
        steps = max(math.floor(exact + 0.5 + _ALMOST), 1)
    if warmup is None:
        warmup = min(_WARMUP, steps // 10)
    known = replace(config, steps=steps, warmup_steps=warmup)
    check(known)
    return known


def check(config: ScheduleConfig) -> None:
    """Raise UserError for a run of known length that is shorter than its warm-up."""
    if config.warmup_steps is not None and config.warmup_steps > config.steps:
        raise UserError(
            f"schedule.warmup_steps={config.warmup_steps} is out of range; it must be in "
            f"[0, {config.steps}], the run's steps; set schedule.warmup_steps=0 for none"
        )


def of_saved(saved: Mapping[str, Any]) -> ScheduleConfig:
    """The schedule of a checkpoint's configuration."""
    kind = schema_of("schedule", saved["name"])
    return cast(ScheduleConfig, of_saved_group("schedule", kind, saved))


def lr_scale(config: ScheduleConfig, step: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses: warm up linearly, stay,
    decay."""
    warmup = _warmup_steps(config)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not isinstance(config, DecayConfig):
        return 1.0
    length = decay_steps(config)
    done = max(step - (config.steps - length), 0) / max(length, 1)
    return config.final_scale + (1 - config.final_scale) * config.remaining(done)


def decay_steps(config: DecayConfig) -> int:
    """The number of steps in the decay; the first is at the peak, and the step after the last at
    the final value.  Below 2 there is no room for a decay."""
    return config.steps - max(_warmup_steps(config), round(config.start() * config.steps))


def _warmup_steps(config: ScheduleConfig) -> int:
    assert config.warmup_steps is not None, "not settled"
    return config.warmup_steps
