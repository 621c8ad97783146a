"""The micro-batches of a step and their losses: functions of the configuration and the number of
the micro-batch, counted over the whole run."""

import torch
from torch import Tensor

from optim import rng
from trainer.objective import batches, losses
from trainer.phases.state import State
from trainer.streams import Stream


def draw(state: State, number: int) -> batches.Batch:
    """Training micro-batch `number` with its noise and timesteps."""
    config = state.config
    inputs = state.data.gather(state.data.dataset.batch(config.seed, number))
    return batches.noised(inputs, state.noise_schedule, config.noise, config.seed, number)


def members_of(state: State, first: int) -> list[list[int]]:
    """The rows of the dataset in each micro-batch of the step that begins with number `first`, of
    all processes."""
    numbers = range(first, first + state.config.runtime.micro_batches)
    return [state.data.dataset.plan.batch(state.config.seed, number) for number in numbers]


def shares(members: list[list[int]]) -> list[float]:
    """Each micro-batch's share of the step's samples, so that samples of a short batch count as
    much as others."""
    sizes = list(map(len, members))
    return [size / sum(sizes) for size in sizes]


def loss_of(state: State, first: int, place: int) -> Tensor:
    """The loss of micro-batch number `first + place`; `place` counts within the step."""
    batch, prediction = _predicted(state, first + place)
    return losses.loss(state.config.loss, state.noise_schedule, prediction, batch)


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
