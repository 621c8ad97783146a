"""The micro-batches of a step and their losses: functions of the configuration and the number of
the micro-batch, counted over the whole run."""

from torch import Tensor

from trainer.objective import batches, losses
from trainer.phases.state import State


def draw(state: State, number: int) -> batches.Batch:
    """Training micro-batch `number` with its noise and timesteps."""
    config = state.config
    inputs = state.data.gather(state.data.dataset.batch(config.seed, number))
    return batches.noised(inputs, state.noise_schedule, config.noise, config.seed, number)


def members_of(state: State, first: int) -> list[list[int]]:
    """The rows of the dataset in each micro-batch of the step that begins with number `first`."""
    numbers = range(first, first + state.config.runtime.accumulation)
    return [state.data.dataset.plan.batch(state.config.seed, number) for number in numbers]


def shares(members: list[list[int]]) -> list[float]:
    """Each micro-batch's share of the step's samples, so that samples of a short batch count as
    much as others."""
    sizes = list(map(len, members))
    return [size / sum(sizes) for size in sizes]


def loss_of(state: State, first: int, place: int) -> Tensor:
    """The loss of micro-batch number `first + place`; `place` counts within the step."""
    batch = draw(state, first + place)
    prediction = batches.predict(state.model.unet, batch)
    return losses.loss(state.config.loss, state.noise_schedule, prediction, batch)


def weighted_prediction(state: State, number: int) -> tuple[Tensor, Tensor | None]:
    """The prediction for micro-batch `number`, and the weight of each element's squared error in
    the loss."""
    batch = draw(state, number)
    factor = losses.factor(state.config.loss, state.noise_schedule, batch)
    return batches.predict(state.model.unet, batch), factor
