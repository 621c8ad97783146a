"""One optimizer step, from its batch to its update."""

import time
from contextlib import nullcontext
from functools import partial

import torch

from trainer.phases import micro_batches, saving
from trainer.phases.state import State
from trainer.system import memory, processes
from trainer.training import curvature, gradients, method, optimizers
from trainer.training.probe import UpdateProbe
from trainer.training.schedule import lr_scale


class Stepper:
    """Makes the steps of a run.  Batches, noise and timesteps are drawn from counters: they depend
    on a step's number alone."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._parameters = list(method.trained_parameters(state.model).values())
        self._backward = gradients.make(
            state.config, self._parameters, state.optimizer, state.counters.grad_norm
        )

    def take(self, step: int, measures: bool) -> dict[str, float]:
        """Make step number `step`, from 0, and count it in the state; a step whose loss or
        gradients are not finite only counts as skipped.

        measures: -> the values of the steps since the last that was measured, and of this one; else
        nothing, which is faster.
        """
        state = self._state
        state.peaks.end("rest")
        started, first = time.monotonic(), state.micro_batches
        members = micro_batches.members_of(state, first)
        lr = optimizers.set_lr(state.optimizer, lr_scale(state.config.schedule, step))
        probe = UpdateProbe(self._parameters) if measures else None
        outcome = self._update(step, first, micro_batches.shares(members))
        state.watch.step(outcome.loss, outcome.grad_norm, state.loss_before)
        state.step, state.micro_batches = step + 1, first + len(members)
        if measures and state.device.type == "cuda":
            torch.cuda.synchronize(state.device)  # what a step queued belongs to its seconds
        shapes = [(state.data.dataset.samples[rows[0]].bucket, len(rows)) for rows in members]
        state.clock.step(time.monotonic() - started, shapes, sum(map(len, members)))
        state.peaks.end("training")
        if probe is None:
            return {}
        measured = {"lr": lr, "grad_norm": outcome.grad_norm, "update_ratio": probe.ratio()}
        return state.watch.lately() | measured

    def _update(self, step: int, first: int, shares: list[float]) -> gradients.Outcome:
        """The gradients of this process's micro-batches of those from number `first`, and the
        update."""
        state, optimizer, backward = self._state, self._state.optimizer, self._backward
        # With the curvature estimated but no step made, the state is not that of any step.
        is_kept = processes.is_main() and not curvature.is_due(optimizer)
        own = range(processes.rank(), len(shares), processes.world_size())
        keeping = saving.kept_if_unreadable(state) if is_kept else nullcontext()
        with memory.explained(state.config, f"in step {step + 1}"), keeping:
            # Estimate the curvature, where the optimizer wants it; then the loss and its gradients
            # (the fused backward steps the optimizer inside).
            predict = partial(micro_batches.weighted_prediction, state, first)
            curvature.estimate(optimizer, backward, predict, state.config.seed, step)
            outcome = backward.of_step(
                lambda place: micro_batches.loss_of(state, first, own[place]),
                [shares[place] for place in own],
            )
            state.counters.grad_norm = backward.clip.last_norm

            # Judge the step: unless loss and gradients are finite, leave everything as it was.
            if state.guard.accepts(step + 1, outcome.loss, outcome.grad_norm, outcome.begun):
                with state.optimizer_clock.measuring():
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if state.ema:
                state.ema.update(step + 1)
        return outcome
