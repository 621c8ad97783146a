"""The results of a run, for its summary.json."""

import math
from collections.abc import Mapping
from typing import Any

from trainer.phases.state import State
from trainer.reporting.watch import is_far
from trainer.storage import record
from trainer.training import optimizers


def summary_of(state: State, after: Mapping[str, float]) -> dict[str, Any]:
    """The results of the run; `after` is its last evaluation."""
    pace = state.clock.usual_pace(state.step)
    was, now = state.model.predictions
    results = {
        "eval_loss_after": after.get("loss", math.nan),
        "eval_loss_result": after.get("ema_loss" if state.exports_average else "loss", math.nan),
        "pictures": state.clock.pictures,
        "wall_seconds": state.clock.wall_seconds,
        "seconds": state.clock.seconds,
        "seconds_per_step": pace.seconds_per_step,
        "seconds_per_step_quartiles": state.clock.quartiles(),
        "images_per_second": pace.images_per_second,
        "optimizer_state_bytes": optimizers.state_bytes(state.optimizer),
        "peak_memory_bytes": state.peaks.run,
        "peak_training_bytes": state.peaks.training or None,  # None if no step was made
        "planned_training_bytes": state.planned_bytes,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks or None,  # a column of a sweep's table if any run has
        "prediction_before": now if state.starts_from_adapter else was,
        "prediction": now,
        "optimizer_seconds_per_step": state.optimizer_clock.seconds_per_step,
        "rate_found": optimizers.found_rate(state.optimizer).get("optim/d"),
        "loss_spikes": state.watch.loss_spikes,
        "zero_gradient": bool(state.watch.norms) and not any(state.watch.norms),
        "diverged": _has_diverged(state, after.get("loss", math.nan)),
        "grad_norm_over_median": state.watch.grad_norm_over_median,
        "runs_before_in_process": state.peaks.runs_before,
    }
    identity = record.identity(state.config, state.device)
    return _known_before(state) | results | identity | _of_some(state, after)


def _of_some(state: State, after: Mapping[str, float]) -> dict[str, float]:
    """Losses that only runs with held-out pictures or averaged weights have."""
    prefix = "ema_" if state.exports_average else ""
    names = {
        "holdout_loss_after": "holdout_loss",
        "holdout_loss_result": f"{prefix}holdout_loss",
        "ema_loss_after": "ema_loss",
    }
    found = {name: after[key] for name, key in names.items() if key in after}
    before = state.losses_before.get("holdout_loss")
    return found if before is None else {"holdout_loss_before": before} | found


def _has_diverged(state: State, after: float) -> bool:
    """Whether the loss was far above the one before the first step, in training or in the end."""
    was, now = state.model.predictions
    is_same = was == now or state.starts_from_adapter
    return state.watch.diverged or (is_same and is_far(after, state.eval_loss_before))


def of_failed(state: State) -> dict[str, Any]:
    """The summary of a failed run; if it failed in or before the first step, just what identifies
    it."""
    if state.clock.pictures:
        return summary_of(state, {})
    return _known_before(state) | record.identity(state.config, state.device)


def _known_before(state: State) -> dict[str, Any]:
    """What is known before the first step."""
    return {
        "name": state.config.name,
        "overrides": list(state.overrides),
        "seed": state.config.seed,
        "steps": state.step,
        "eval_loss_before": state.eval_loss_before,
    }
