"""Batches: which latents, how noisy, towards which target, and what the UNet makes of them.

A training batch is a function of (seed, step, place in the batch) and of the data, and nothing here
draws from a global generator.  Two runs with one seed therefore train on the same noise and
timesteps whatever their optimizer, and their losses can be compared point by point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from optim import rng
from trainer.streams import Stream

_GOLDEN = (5**0.5 - 1) / 2
_EVAL_SEED = 20_260_101  # eval points are the same in every run, whatever its seed


@dataclass(kw_only=True)
class Inputs:
    """What a batch is made of, before the noise; B rows of one size, on the CPU."""

    latents: Tensor  # (B, 4, h, w), scaled by the VAE's scaling factor
    prompt: Tensor  # (B, tokens, dim)
    pooled: Tensor | None  # (B, dim), of models that have it (SDXL); so the next
    time_ids: Tensor | None  # (B, 6)
    loss_weights: Tensor | None = None  # (B,): how much each counts in the loss; None: all 1
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1]: where the loss counts; None: everywhere


@dataclass(kw_only=True)
class Batch:
    """Inputs and target of one forward pass; B rows."""

    noisy: Tensor  # (B, 4, h, w)
    target: Tensor  # (B, 4, h, w): the noise, or v
    timesteps: Tensor  # (B,) int64
    prompt: Tensor  # (B, tokens, dim)
    pooled: Tensor | None  # (B, dim)
    time_ids: Tensor | None  # (B, 6)
    loss_weights: Tensor | None = None  # (B,)
    mask: Tensor | None = None  # (B, 1, h, w)


def noised(inputs: Inputs, schedule: DDPMScheduler, seed: int, number: int) -> Batch:
    """Batch `number` of training: these inputs with fresh noise at fresh timesteps."""
    size = len(inputs.latents)
    num_timesteps = schedule.config.num_train_timesteps
    # Stratified: sample i of the batch draws from the i-th of B equal parts of the schedule, which
    # lowers the loss's variance.
    shares = [(i + rng.uniform(seed, Stream.TIMESTEP, number, i)) / size for i in range(size)]
    timesteps = torch.tensor([int(share * num_timesteps) for share in shares])
    noise = torch.stack([_normal(inputs.latents[0], seed, number, i) for i in range(size)])
    return _batch(inputs, schedule, timesteps, noise)


def eval_batches(
    rows: Sequence[int],
    gather: Callable[[list[int]], Inputs],
    schedule: DDPMScheduler,
    points: int,
    batch_size: int,
    size_of: Callable[[int], object] = lambda row: None,
) -> list[Batch]:
    """Fixed (row, timestep, noise) triples: `points` of them, the same in every run.

    `gather` gives the inputs of some rows, without any dropout; only rows of one `size_of` share a
    batch.  Rows take turns; timesteps follow the golden-ratio sequence, which covers the schedule
    evenly for any number of points and does not fall into step with the rows.
    """
    by_size: dict[object, list[int]] = {}
    for point in range(points):
        by_size.setdefault(size_of(rows[point % len(rows)]), []).append(point)
    batches = []
    for members in by_size.values():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            inputs = gather([rows[point % len(rows)] for point in chosen])
            shares = [(point + 0.5) * _GOLDEN % 1 for point in chosen]
            timesteps = torch.tensor([int(s * schedule.config.num_train_timesteps) for s in shares])
            noise = torch.stack([_normal(inputs.latents[0], _EVAL_SEED, n) for n in chosen])
            batches.append(_batch(inputs, schedule, timesteps, noise))
    return batches


def sample_noise(like: Tensor, count: int) -> Tensor:
    """The start noise of sample grids, the same in every run: like (4, h, w) -> (count, 4, h,
    w)."""
    return torch.stack([_normal(like, _EVAL_SEED, _EVAL_SEED, i) for i in range(count)])


def bartlett_noise(like: Tensor, count: int, seed: int, step: int) -> Tensor:
    """By which the sampled targets of this step's estimate of the curvature differ from the
    prediction: like (4, h, w) -> (count, 4, h, w), on the CPU."""
    draws = [_normal(like, seed, step, i, stream=Stream.CURVATURE) for i in range(count)]
    return torch.stack(draws)


def predict(unet: nn.Module, batch: Batch) -> Tensor:
    """The UNet's prediction in fp32: (B, 4, h, w).  The batch goes to its device and dtype."""
    device, dtype = unet.device, unet.dtype
    told = None
    if batch.pooled is not None:
        sizes = batch.time_ids.to(device)
        told = {"text_embeds": batch.pooled.to(device, dtype), "time_ids": sizes}
    return unet(
        batch.noisy.to(device, dtype),
        batch.timesteps.to(device),
        encoder_hidden_states=batch.prompt.to(device, dtype),
        added_cond_kwargs=told,
    ).sample.float()


def _batch(inputs: Inputs, schedule: DDPMScheduler, timesteps: Tensor, noise: Tensor) -> Batch:
    latents = inputs.latents
    predicts_v = schedule.config.prediction_type == "v_prediction"
    return Batch(
        noisy=schedule.add_noise(latents, noise, timesteps),
        target=schedule.get_velocity(latents, noise, timesteps) if predicts_v else noise,
        timesteps=timesteps,
        prompt=inputs.prompt,
        pooled=inputs.pooled,
        time_ids=inputs.time_ids,
        loss_weights=inputs.loss_weights,
        mask=inputs.mask,
    )


def _normal(like: Tensor, seed: int, *counters: int, stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normal noise for this seed and these counters, in the shape of `like`."""
    return torch.randn(like.shape, generator=rng.generator(seed, stream, *counters))
