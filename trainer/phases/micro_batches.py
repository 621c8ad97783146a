"""The micro-batches of a step and their losses: functions of the configuration and the number of
the micro-batch, counted over the whole run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optim import rng
from trainer.objective import batches, losses, noise
from trainer.phases.state import State
from trainer.streams import Stream


@dataclass(kw_only=True)
class MicroBatch:
    number: int
    rows: list[int]  # of the dataset
    share: float  # of the step's samples: those of a short batch count as much as others


def of_step(state: State) -> list[MicroBatch]:
    """Those of the next step, of all processes."""
    first, count = state.micro_batches, state.config.runtime.micro_batches
    plan, seed = state.data.dataset.plan, state.config.seed
    rows = {number: plan.batch(seed, number) for number in range(first, first + count)}
    total = sum(map(len, rows.values()))
    return [MicroBatch(number=n, rows=own, share=len(own) / total) for n, own in rows.items()]


def draw(state: State, number: int) -> batches.Batch:
    """Training micro-batch `number` with its noise and timesteps."""
    config = state.config
    inputs = state.data.gather(state.data.dataset.batch(config.seed, number))
    return batches.noised(inputs, state.noise_schedule, config.noise, config.seed, number)


def loss_of(state: State, number: int) -> tuple[Tensor, Tensor]:
    """The loss of micro-batch `number`, and its squared error, which can be judged whatever the
    loss: see `error_before`."""
    batch, prediction = _predicted(state, number)
    loss = losses.loss(state.config.loss, state.noise_schedule, prediction, batch)
    return loss, losses.squared_error(prediction, batch)


def error_before(state: State, drawn: list[MicroBatch]) -> float:
    """The squared error that evaluation found before the first step at the timesteps of these
    micro-batches, and what their kind of noise may add; NaN if it is unknown."""
    config = state.config
    if not state.losses_are_relative:
        return math.nan
    count = state.noise_schedule.count
    return noise.unforeseen(config.noise) + sum(
        batch.share
        * losses.at_timesteps(
            state.losses_before,
            noise.timesteps(config.noise, count, config.seed, batch.number, len(batch.rows)),
            count,
        )
        for batch in drawn
    )


def weighted_prediction(state: State, number: int) -> tuple[Tensor, Tensor | None]:
    """The prediction for micro-batch `number`, and the weight of each element's squared error in
    the loss."""
    batch, prediction = _predicted(state, number)
    return prediction, losses.factor(state.config.loss, state.noise_schedule, batch)


def _predicted(state: State, number: int) -> tuple[batches.Batch, Tensor]:
    """Training micro-batch `number`, and what the UNet predicts for it.  Dropout, the only draw
    from torch's own generators, depends on the number as well."""
    torch.manual_seed(rng.mix(state.config.seed, Stream.LAYER_DROPOUT, number) >> 1)
    batch = draw(state, number)
    return batch, batches.predict(state.model.unet, batch)
