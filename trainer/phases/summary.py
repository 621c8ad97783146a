"""The results of a run, for its summary.json."""

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from trainer.phases.state import State
from trainer.reporting.summary import Summary
from trainer.reporting.watch import is_far
from trainer.storage import record
from trainer.training import optimizers


def summary_of(state: State, after: Mapping[str, float]) -> Summary:
    """The results of the run; `after` is its last evaluation."""
    pace = state.clock.usual_pace(state.step)
    was, now = state.model.predictions
    results: Summary = {
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
        "peak_training_bytes": state.peaks.training or None,
        "planned_training_bytes": state.planned_bytes,
        "skipped_steps": state.guard.skipped,
        "rollbacks": state.guard.rollbacks or None,
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
    return {**_known_before(state), **results, **_identity(state), **_of_some(state, after)}


def _of_some(state: State, after: Mapping[str, float]) -> Summary:
    """Losses that only runs with held-out pictures or averaged weights have."""
    prefix = "ema_" if state.exports_average else ""
    found = Summary()
    if "holdout_loss" in state.losses_before:
        found["holdout_loss_before"] = state.losses_before["holdout_loss"]
    if "holdout_loss" in after:
        found["holdout_loss_after"] = after["holdout_loss"]
        found["holdout_loss_result"] = after[f"{prefix}holdout_loss"]
    if "ema_loss" in after:
        found["ema_loss_after"] = after["ema_loss"]
    return found


def _has_diverged(state: State, after: float) -> bool:
    """Whether the loss was far above the one before the first step, in training or in the end."""
    was, now = state.model.predictions
    is_same = was == now or state.starts_from_adapter
    return state.watch.diverged or (is_same and is_far(after, state.eval_loss_before))


def of_failed(state: State) -> Summary:
    """The summary of a failed run; if it failed in or before the first step, just what identifies
    it."""
    if state.clock.pictures:
        return summary_of(state, {})
    return {**_known_before(state), **_identity(state)}


def _known_before(state: State) -> Summary:
    """What is known before the first step."""
    return {
        "name": state.config.name,
        "overrides": list(state.overrides),
        "seed": state.config.seed,
        "steps": state.step,
        "eval_loss_before": state.eval_loss_before,
    }


def _identity(state: State) -> Summary:
    """What distinguishes the run from others."""
    config = state.config
    return {
        "optimizer": config.optim.name,
        "lr": config.optim.lr,
        "method": config.method.name,
        "model": Path(config.model.path).name,
        "device": record.device_name(state.device),
        "on_cpu": state.device.type == "cpu",
        "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
