"""Batches: which latents, how noisy, towards which target, and what the UNet makes of them.

A training batch is a function of (seed, step, place in the batch) and of the data, and nothing here
draws from a global generator.  Two runs with one seed therefore train on the same noise and
timesteps whatever their optimizer, and their losses can be compared point by point.
"""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from optim import rng
from trainer.conditioning import Encoded
from trainer.streams import Stream

_GOLDEN = (5**0.5 - 1) / 2
_EVAL_SEED = 20_260_101  # eval points are the same in every run, whatever its seed


@dataclass(kw_only=True)
class Batch:
    """Inputs and target of one forward pass; B rows."""

    noisy: Tensor  # (B, 4, h, w)
    target: Tensor  # (B, 4, h, w): the noise, or v
    timesteps: Tensor  # (B,) int64
    prompt: Tensor  # (B, tokens, dim)
    pooled: Tensor | None  # (B, dim); None for a UNet that is told neither it nor sizes
    time_ids: Tensor  # (B, 6)


def training_batch(
    data: Encoded, schedule: DDPMScheduler, indices: list[int], dropout: float, seed: int, step: int
) -> Batch:
    """The batch of `step`: these samples with fresh noise, timesteps and caption dropout."""
    size = len(indices)
    num_timesteps = schedule.config.num_train_timesteps
    # Stratified: sample i of the batch draws from the i-th of B equal parts of the schedule, which
    # lowers the loss's variance.
    shares = [(i + rng.uniform(seed, Stream.TIMESTEP, step, i)) / size for i in range(size)]
    timesteps = torch.tensor([int(share * num_timesteps) for share in shares])
    captions = [
        None if rng.uniform(seed, Stream.DROPOUT, step, i) < dropout else data.captions[index]
        for i, index in enumerate(indices)
    ]
    noise = torch.stack([_normal(data.latents[0], seed, step, i) for i in range(size)])
    return _batch(data, schedule, indices, captions, timesteps, noise)


def eval_batches(
    data: Encoded, schedule: DDPMScheduler, points: int, batch_size: int
) -> list[Batch]:
    """Fixed (sample, timestep, noise) triples: `points` of them, no dropout, the same in every run.

    Samples take turns; timesteps follow the golden-ratio sequence, which covers the schedule evenly
    for any number of points and does not fall into step with the samples.
    """
    batches = []
    for start in range(0, points, batch_size):
        numbers = range(start, min(start + batch_size, points))
        indices = [number % len(data.latents) for number in numbers]
        shares = [(number + 0.5) * _GOLDEN % 1 for number in numbers]
        timesteps = torch.tensor([int(s * schedule.config.num_train_timesteps) for s in shares])
        noise = torch.stack([_normal(data.latents[0], _EVAL_SEED, n) for n in numbers])
        captions = [data.captions[index] for index in indices]
        batches.append(_batch(data, schedule, indices, captions, timesteps, noise))
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


def _batch(
    data: Encoded,
    schedule: DDPMScheduler,
    rows: list[int],
    captions: list[str | None],
    timesteps: Tensor,
    noise: Tensor,
) -> Batch:
    latents, text = data.latents[rows], data.read(captions)
    predicts_v = schedule.config.prediction_type == "v_prediction"
    return Batch(
        noisy=schedule.add_noise(latents, noise, timesteps),
        target=schedule.get_velocity(latents, noise, timesteps) if predicts_v else noise,
        timesteps=timesteps,
        prompt=text.prompt,
        pooled=text.pooled,
        time_ids=data.time_ids[rows],
    )


def _normal(like: Tensor, seed: int, *counters: int, stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normal noise for this seed and these counters, in the shape of `like`."""
    return torch.randn(like.shape, generator=rng.generator(seed, stream, *counters))
