"""One optimizer step, from its batch to its update."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from trainer.phases import micro_batches, saving
from trainer.phases.micro_batches import MicroBatch
from trainer.phases.state import State
from trainer.system import memory, processes
from trainer.training import curvature, gradients, method, optimizers
from trainer.training.probe import UpdateProbe
from trainer.training.schedule import lr_scale


def take(state: State, measures: bool = False) -> dict[str, float]:
    """Make the next step, and count it; a step whose loss or gradients are not finite only counts
    as skipped.  Its batch, noise and timesteps depend on its number alone.

    measures: return the values averaged since the last measured step, and this step's; otherwise
    {}, without extra work.
    """
    state.peaks.end("rest")
    started, drawn = time.monotonic(), micro_batches.of_step(state)
    scale = lr_scale(state.config.schedule, state.step) * state.guard.lr_scale
    lr = optimizers.set_lr(state.optimizer, scale)
    trained = method.trained_parameters(state.model).values()
    probe = UpdateProbe([*trained]) if measures else None
    outcome, error = _update(state, drawn)
    before = micro_batches.error_before(state, drawn)
    state.watch.step(outcome.loss, outcome.grad_norm, error, before)
    state.step += 1
    state.micro_batches += len(drawn)
    if measures and state.device.type == "cuda":
        torch.cuda.synchronize(state.device)  # what a step queued belongs to its seconds
    sizes = [len(batch.rows) for batch in drawn]
    buckets = [state.data.dataset.samples[batch.rows[0]].bucket for batch in drawn]
    shapes = [*zip(buckets, sizes, strict=True)]
    state.clock.step(time.monotonic() - started, shapes, sum(sizes))
    state.peaks.end("training")
    if probe is None:
        return {}
    measured = {"lr": lr, "grad_norm": outcome.grad_norm, "update_ratio": probe.ratio()}
    return state.watch.lately() | measured


def _update(state: State, drawn: Sequence[MicroBatch]) -> tuple[gradients.Outcome, float]:
    """The gradients of this process's share of the micro-batches, and the update; also the squared
    error of all micro-batches, unless the loss of some is not finite."""
    config, optimizer, backward = state.config, state.optimizer, state.backward
    errors: dict[int, Tensor] = {}  # by number, since a forward pass may run twice

    def loss_of(batch: MicroBatch) -> Tensor:
        loss, error = micro_batches.loss_of(state, batch.number)
        errors[batch.number] = error * batch.share
        return loss

    # With the curvature estimated but no step made, the state is not that of any step.
    is_kept = processes.is_main() and not curvature.is_due(optimizer)
    keeping = saving.kept_if_unreadable(state) if is_kept else nullcontext()
    with memory.explained(config, state.step + 1), keeping:
        # Estimate the curvature, where the optimizer wants it; then the loss and its gradients (the
        # fused backward steps the optimizer inside).
        predict = partial(micro_batches.weighted_prediction, state, drawn[0].number)
        curvature.estimate(optimizer, backward, predict, config.seed, state.step)
        own = drawn[processes.rank() :: processes.world_size()]
        outcome = backward.run(
            [gradients.Pass(partial(loss_of, batch), batch.share) for batch in own]
        )
        error = processes.total(sum(error.item() for error in errors.values()))

        # Judge the step: unless loss and gradients are finite, leave everything as it was.
        if state.guard.accepts(state.step + 1, outcome):
            with state.optimizer_clock.measuring():
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(state.step + 1)
    return outcome, error
