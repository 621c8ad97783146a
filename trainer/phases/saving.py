"""Writing the checkpoints and results of a run, and what happens if one cannot be written."""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.config import AdapterConfig, file_name
from trainer.data import census
from trainer.errors import UserError, reason
from trainer.phases import intervals
from trainer.phases.state import State
from trainer.storage import checkpoint, result
from trainer.storage.steps import completed, delete, step_name, step_of
from trainer.system import memory
from trainer.training import method, switching
from trainer.training.guard import broken

log = logging.getLogger(__name__)


def save(state: State) -> Path:
    """Write a checkpoint of this step; older ones stay until `rotate`.

    Raises UserError if trained weights are not finite or the checkpoint cannot be written.
    """
    if names := broken(method.trained_parameters(state.model)):
        raise UserError(f"no checkpoint at step {state.step}: {names[0]} is not finite")
    state.peaks.end("rest")
    with state.clock.aside(intervals.SAVING):
        saved = checkpoint.save(
            state.checkpoints,
            checkpoint.Checkpoint(
                step=state.step,
                epochs=state.epochs,
                weights=method.saved_tensors(state.model),
                optimizer=state.optimizer.state_dict(),
                average=_average(state),
                config=asdict(state.config),
                overrides=list(state.overrides),
                model=state.model_sketch,
                data=state.data_fingerprint,
                losses_before=state.losses_before,
                counters={name: one.state_dict() for name, one in state.counters.items()},
                counted=_kohya_counts(state),
            ),
        )
    state.unproven = state.step
    return saved


def _average(state: State) -> dict[str, Tensor]:
    """The averaged weights, of method.ema or of the optimizer's own, if there are any."""
    if state.ema:
        return state.ema.state()
    if not switching.switches(state.optimizer):
        return {}
    with state.evaluated():
        trained = method.trained_parameters(state.model)
        return {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}


def rotate(state: State, is_good: bool = False) -> None:
    """Delete checkpoints beyond `runtime.keep_checkpoints`, but none while steps are skipped: the
    step before may have ruined the weights, so that an older checkpoint is better.

    The newest checkpoint that was followed by enough good steps is always kept, of a run that
    diverged the newest from before.  is_good: the evaluation shows that the current weights are
    usable, so the newest counts as such.
    """
    if state.guard.in_a_row and not is_good:
        return
    proven = state.step if is_good else state.guard.last_whole - state.needed_proof
    if state.watch.onset is not None:
        proven = min(proven, state.watch.onset - 1)
    keep, awaited = state.config.runtime.keep_checkpoints, not state.watch.diverged
    checkpoint.rotate(state.checkpoints, keep, proven, awaited)


def rotate_if_proven(state: State) -> None:
    """Rotate once enough good steps have followed the newest checkpoint."""
    if state.unproven is None or state.guard.in_a_row:
        return
    if state.guard.last_whole - state.unproven >= state.needed_proof:
        state.unproven = None
        rotate(state)


@contextmanager
def kept_if_unreadable(state: State) -> Iterator[None]:
    """Save a checkpoint of the last step before raising, if a batch cannot be read in this block:
    weights and optimizer have not changed since."""
    try:
        yield
    except UserError as error:
        if not state.step or state.guard.in_a_row:
            raise
        try:
            saved = save(state)
        except UserError as second:
            log.error("%s", second)
            raise error from None
        raise UserError(f"{error} (resume={saved})") from error


@contextmanager
def tolerated() -> Iterator[None]:
    """Turn a UserError in this block, such as a full disk, into a warning: training continues."""
    try:
        yield
    except UserError as error:
        log.warning("%s; training continues", error)


def save_or_owe(state: State) -> None:
    """Save now or, if this step was skipped, after the next good one."""
    was_owed, state.owes_checkpoint = state.owes_checkpoint, state.guard.in_a_row > 0
    if not state.owes_checkpoint:
        save(state)
        rotate(state)
    elif not was_owed:
        log.warning(
            "no checkpoint at step %d, which was skipped; one will be saved after the next good "
            "step",
            state.step,
        )


def keep_old_result(state: State) -> None:
    """Export what was the result of a run that becomes longer, if an export is due at its step: the
    new result will overwrite it."""
    if state.intervals.is_due(intervals.EXPORTING, state.step):
        with tolerated():
            export(state)


def export(state: State) -> list[Path]:
    """Write the current model or adapter; returns its files and folders.  Before the end of the run
    it gets a folder of its own, and the step in its name; those beyond `method.keep_exports` are
    deleted."""
    name, folder = file_name(state.config.name), state.folder
    if not state.is_last:
        step = step_name(state.step)
        name, folder = f"{name}-{step}", folder / "results" / step
    is_new = not folder.exists()
    counted = _kohya_counts(state)
    try:
        with (
            state.clock.aside(intervals.EXPORTING),
            state.evaluated(),
            state.averaged(state.exports_average),
        ):
            written = result.write(state.config, name, state.model, folder, state.step, counted)
    except Exception as error:
        if is_new:  # a folder of results is complete, or is not there
            shutil.rmtree(folder, ignore_errors=True)
        if not memory.ran_out(error):
            raise
        raise UserError(
            "out of memory while writing the result; python -m trainer.export can write it from a "
            f"checkpoint ({reason(error)})"
        ) from error
    if not state.is_last and (keep := state.config.method.keep_exports):
        until_now = [old for old in completed(folder.parent) if step_of(old) <= state.step]
        delete(until_now[:-keep])
    return written


def _kohya_counts(state: State) -> dict[str, Any]:
    """A LoRA's metadata on data and epochs, under the keys of kohya's scripts and counted as they
    do: an epoch that has begun counts as one."""
    config, dataset = state.config, state.data.dataset
    own, prior = census.own_and_prior(dataset)
    per_epoch = dataset.plan.batches_per_epoch
    left = (config.schedule.steps - state.step) * config.runtime.micro_batches
    counted = {
        "ss_num_train_images": own,
        "ss_num_reg_images": prior,
        "ss_num_batches_per_epoch": math.ceil(per_epoch),
        "ss_epoch": math.ceil(state.micro_batches / per_epoch),
        "ss_num_epochs": math.ceil((state.micro_batches + left) / per_epoch),
    }
    if not (isinstance(config.method, AdapterConfig) and config.method.tag_frequency):
        return counted
    return counted | {"ss_tag_frequency": json.dumps(census.tag_frequency(dataset))}
