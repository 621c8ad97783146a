"""What the UNet is told and what it must restore: captions and pictures through the frozen
encoders, once.

Encoders never change during a run, so every caption and picture is encoded before the first step
and kept on the CPU; the text encoders then leave the device.
"""

import logging
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from tqdm import tqdm

from trainer.data import Sample, read_pixels
from trainer.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 16  # captions encoded at a time


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
    _report_cut_captions(pipeline, samples)
    prompt, pooled = encode_captions(pipeline, [sample.caption for sample in samples])
    empty_prompt, empty_pooled = encode_captions(pipeline, [""])
    if pipeline.config.force_zeros_for_empty_prompt:
        empty_prompt, empty_pooled = torch.zeros_like(empty_prompt), torch.zeros_like(empty_pooled)
    pipeline.text_encoder.cpu()
    pipeline.text_encoder_2.cpu()
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
    """The mode of the VAE's posterior, scaled: -> (N, 4, h, w).  One picture at a time."""
    vae, latents = pipeline.vae, []
    for sample in tqdm(samples, desc="encoding pictures", disable=None, leave=False):
        pixels = read_pixels(sample)[None].to(vae.device, vae.dtype)
        latent = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        if not latent.isfinite().all():
            raise UserError(
                f"the VAE's latent of {sample.path} is not finite; "
                "check the picture, or use another VAE"
            )
        latents.append(latent.cpu())
    return torch.cat(latents)


def _report_cut_captions(pipeline: StableDiffusionXLPipeline, samples: list[Sample]) -> None:
    """Name the captions that are longer than the text encoders read."""
    limit = pipeline.tokenizer.model_max_length
    cut = [s for s in samples if len(pipeline.tokenizer(s.caption).input_ids) > limit]
    if cut:
        names = ", ".join(s.path.name for s in cut[:5]) + (", ..." if len(cut) > 5 else "")
        log.warning("%d captions are cut at %d tokens: %s", len(cut), limit, names)
