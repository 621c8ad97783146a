"""What the UNet is told and what it must restore: captions and pictures through the frozen
encoders, once.

Encoders never change during a run, so every caption and picture is encoded before the first step
and kept on the CPU.
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from trainer.data import Sample
from trainer.errors import UserError

_CHUNK = 16  # pictures or captions encoded at a time


@dataclass(kw_only=True)
class Encoded:
    """A data set as the UNet sees it.  Row i belongs to sample i; the extra last row of the text is
    the empty prompt."""

    latents: Tensor  # (N, 4, h, w), scaled by the VAE's scaling factor
    prompt: Tensor  # (N + 1, tokens, dim): penultimate states of both encoders, side by side
    pooled: Tensor  # (N + 1, dim): the second encoder's pooled projection
    time_ids: Tensor  # (N, 6)


@torch.no_grad()
def encode(pipeline: StableDiffusionXLPipeline, samples: list[Sample]) -> Encoded:
    """Encode every sample, and the empty prompt as the pipeline's own unconditional input.

    Raises UserError that names the picture when the VAE gives a latent that is not finite.
    """
    prompt, pooled = encode_captions(pipeline, [sample.caption for sample in samples])
    empty_prompt, empty_pooled = encode_captions(pipeline, [""])
    if pipeline.config.force_zeros_for_empty_prompt:
        empty_prompt, empty_pooled = torch.zeros_like(empty_prompt), torch.zeros_like(empty_pooled)
    return Encoded(
        latents=_encode_pictures(pipeline, samples),
        prompt=torch.cat([prompt, empty_prompt]),
        pooled=torch.cat([pooled, empty_pooled]),
        time_ids=torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
    )


@torch.no_grad()
def encode_captions(
    pipeline: StableDiffusionXLPipeline, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """captions (N) -> prompt (N, tokens, dim), pooled (N, dim), on the CPU."""
    prompts, pooled = [], []
    for start in range(0, len(captions), _CHUNK):
        encoded = pipeline.encode_prompt(
            captions[start : start + _CHUNK], do_classifier_free_guidance=False
        )
        prompts.append(encoded[0].cpu())
        pooled.append(encoded[2].cpu())
    return torch.cat(prompts), torch.cat(pooled)


def _encode_pictures(pipeline: StableDiffusionXLPipeline, samples: list[Sample]) -> Tensor:
    """The mode of the VAE's posterior, scaled: -> (N, 4, h, w)."""
    vae, latents = pipeline.vae, []
    for start in range(0, len(samples), _CHUNK):
        pixels = torch.stack([sample.pixels for sample in samples[start : start + _CHUNK]])
        latent = (
            vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            * vae.config.scaling_factor
        )
        for sample, row in zip(samples[start:], latent, strict=False):
            if not row.isfinite().all():
                raise UserError(
                    f"the VAE's latent of {sample.path} is not finite; "
                    "check the picture, or use another VAE"
                )
        latents.append(latent.cpu())
    return torch.cat(latents)
