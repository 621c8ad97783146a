"""Batches: the UNet's inputs, its targets and its predictions.

A training batch is a function of (seed, number, place in the batch) and of the data, and nothing
here draws from a global generator.  Two runs with one seed therefore train on the same noise and
timesteps whatever their optimizer, and their losses can be compared point by point.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from trainer.config import NoiseConfig
from trainer.models.execution import on_device
from trainer.objective import noise
from trainer.objective.noise_schedule import NoiseSchedule
from trainer.streams import Stream

_GOLDEN = (5**0.5 - 1) / 2
# The seed of eval points and of generated pictures, which are the same in every run.
_EVAL_SEED = 20_260_101


@dataclass(kw_only=True)
class Inputs:
    """A batch without its noise: B rows of one size, on the CPU."""

    latents: Tensor  # (B, 4, h, w), scaled by the VAE's scaling factor
    prompt: Tensor  # (B, tokens, dim)
    pooled: Tensor | None  # (B, dim); None for models without it (SD 1.5)
    time_ids: Tensor | None  # (B, 6)
    loss_weights: Tensor | None = None  # (B,): how much each counts in the loss; None: all 1
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1]: where the loss counts; None: everywhere


@dataclass(kw_only=True)
class Batch(Inputs):
    """The inputs and the target of one forward pass."""

    noisy: Tensor  # (B, 4, h, w)
    target: Tensor  # (B, 4, h, w): the noise, v, or the flow's velocity
    timesteps: Tensor  # (B,) int64: from 0
    time: Tensor  # (B,) int64: what the UNet is given for them


def noised(
    inputs: Inputs, noise_schedule: NoiseSchedule, config: NoiseConfig, seed: int, number: int
) -> Batch:
    """Training batch `number`: these inputs with its noise and timesteps."""
    size, like = len(inputs.latents), inputs.latents[0]
    steps = noise.timesteps(config, noise_schedule.count, seed, number, size)
    drawn = [noise.draw(config, like, seed, number, place) for place in range(size)]
    seen = [noise.perturbed(config, x, seed, number, place) for place, x in enumerate(drawn)]
    return _batch(inputs, noise_schedule, steps, torch.stack(drawn), torch.stack(seen))


def eval_batches(
    rows: Sequence[int],
    gather: Callable[[list[int]], Inputs],
    noise_schedule: NoiseSchedule,
    points: int,
    batch_size: int,
    size_of: Callable[[int], object] = lambda row: None,
) -> Iterator[Batch]:
    """`points` fixed (row, timestep, noise) triples: white noise over all timesteps, the same in
    every run whatever its noise options.

    `gather` gives the inputs of some rows, without any dropout; only rows of one `size_of` share a
    batch.  Rows take turns; where there are more rows than points, the rows used are evenly
    spaced.  Timesteps follow the golden-ratio sequence, which covers the schedule evenly for any
    number of points and does not fall into step with the rows.
    """
    count = noise_schedule.count
    by_size: dict[object, list[int]] = {}  # the points' numbers
    few = len(rows) <= points
    row_of = [rows[p % len(rows) if few else p * len(rows) // points] for p in range(points)]
    for point, row in enumerate(row_of):
        by_size.setdefault(size_of(row), []).append(point)
    for members in by_size.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            inputs = gather([row_of[point] for point in chosen])
            timesteps = torch.tensor([int((p + 0.5) * _GOLDEN % 1 * count) for p in chosen])
            drawn = torch.stack([_fixed(inputs.latents[0], point) for point in chosen])
            yield _batch(inputs, noise_schedule, timesteps, drawn, drawn)


def sample_noise(like: Tensor, seeds: Sequence[int]) -> Tensor:
    """Initial noise for sampling, the same in every run: like (4, h, w) -> (B, 4, h, w), one for
    each seed."""
    return torch.stack([_fixed(like, _EVAL_SEED, seed) for seed in seeds])


def predict(unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    """The UNet's prediction in fp32: (B, 4, h, w).  The batch goes to its device and dtype.

    A UNet that takes a pooled prompt and sizes (SDXL) gets them, one that does not (SD 1.5) gets
    neither.
    """
    device, dtype = unet.device, unet.dtype
    added = None
    if batch.pooled is not None and batch.time_ids is not None:
        added = {
            "text_embeds": on_device(batch.pooled.to(dtype), device),
            "time_ids": on_device(batch.time_ids, device),
        }
    return unet(
        on_device(batch.noisy.to(dtype), device),
        on_device(batch.time, device),
        encoder_hidden_states=on_device(batch.prompt.to(dtype), device),
        added_cond_kwargs=added,
    ).sample.float()


def _batch(
    inputs: Inputs, noise_schedule: NoiseSchedule, timesteps: Tensor, noise: Tensor, seen: Tensor
) -> Batch:
    """`seen` is the noise of the input, `noise` that of the target: both (B, 4, h, w)."""
    latents = inputs.latents.float()
    return Batch(
        **vars(inputs),
        noisy=noise_schedule.noisy(latents, seen, timesteps),
        target=noise_schedule.target(latents, noise, timesteps),
        timesteps=timesteps,
        time=noise_schedule.time(timesteps),
    )


def _fixed(like: Tensor, *counters: int) -> Tensor:
    """White noise that no seed and no option changes, in the shape of `like`."""
    return noise.normal(like.shape, Stream.NOISE, _EVAL_SEED, *counters)
