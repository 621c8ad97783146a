"""What the UNet is told and what it must restore: captions and pictures through the encoders.

Frozen encoders give the same for the same input, so every caption and picture is encoded before the
first step and kept on the CPU.  Text encoders that are trained read the captions of each batch
anew.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer import text
from trainer.data import Sample, read_pixels
from trainer.errors import UserError
from trainer.model import Model
from trainer.text import Text

log = logging.getLogger(__name__)

_CHUNK = 16  # captions encoded at a time

Read = Callable[
    [Sequence[str | None]], Text
]  # captions -> what the UNet is told; None is no prompt


@dataclass(kw_only=True)
class Encoded:
    """A data set as the UNet sees it.  Row i belongs to sample i."""

    latents: Tensor  # (N, 4, h, w), scaled by the VAE's scaling factor
    captions: list[str]
    time_ids: Tensor  # (N, 6)
    read: Read


class Kept:
    """Captions that were encoded once: looked up on the CPU."""

    def __init__(self, encoder: text.Encoder, captions: Sequence[str]) -> None:
        every = [None, *dict.fromkeys(captions)]
        self._row = {caption: row for row, caption in enumerate(every)}
        chunks = [every[i : i + _CHUNK] for i in range(0, len(every), _CHUNK)]
        with torch.no_grad():
            encoded = [encoder(chunk) for chunk in chunks]
        prompt = torch.cat([x.prompt.cpu() for x in encoded])
        pooled = [x.pooled.cpu() for x in encoded if x.pooled is not None]
        self._text = Text(prompt=prompt, pooled=torch.cat(pooled) if pooled else None)

    def __call__(self, captions: Sequence[str | None]) -> Text:
        return self._text[[self._row[caption] for caption in captions]]


def encode(model: Model, samples: list[Sample]) -> Encoded:
    """Encode every sample.  Raises UserError that names the picture when the VAE gives a latent
    that is not finite."""
    _report_cut_captions(model, samples)
    captions = [sample.caption for sample in samples]
    read = model.text_encoder or Kept(model.load_text_encoders(), captions)
    with model.vae() as vae:
        latents = _encode_pictures(vae, samples)
    time_ids = torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32)
    return Encoded(latents=latents, captions=captions, time_ids=time_ids, read=read)


@torch.no_grad()
def _encode_pictures(vae: nn.Module, samples: list[Sample]) -> Tensor:
    """The mode of the VAE's posterior, scaled: -> (N, 4, h, w).  One picture at a time."""
    latents = []
    for sample in tqdm(samples, desc="encoding pictures", disable=None, leave=False):
        pixels = read_pixels(sample)[None].to(vae.device, vae.dtype)
        latent = scaled(vae, vae.encode(pixels).latent_dist.mode())
        if not latent.isfinite().all():
            raise UserError(
                f"the VAE's latent of {sample.path} is not finite; check the picture, or set "
                "model.vae_dtype=float32 or model.vae to another VAE"
            )
        latents.append(latent.float().cpu())
    return torch.cat(latents)


def scaled(vae: nn.Module, latents: Tensor) -> Tensor:
    """The VAE's latents as the UNet takes them."""
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def unscaled(vae: nn.Module, latents: Tensor) -> Tensor:
    """The UNet's latents as the VAE takes them."""
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)


def _report_cut_captions(model: Model, samples: list[Sample]) -> None:
    """Name the captions that are longer than the text encoders read."""
    tokenizer = text.tokenizer(model.origin, model.text_parts[0])
    room = text.room(model.config, tokenizer)
    cut = [s for s in samples if text.count_tokens(tokenizer, s.caption) > room]
    if cut:
        names = ", ".join(s.path.name for s in cut[:5]) + (", ..." if len(cut) > 5 else "")
        log.warning(
            "%d captions are cut at %d tokens (model.prompt_chunks reads more): %s",
            len(cut),
            room,
            names,
        )
