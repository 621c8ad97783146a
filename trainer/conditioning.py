"""What the UNet is told and what it must restore: captions and pictures through the frozen
encoders, once.

Encoders never change during a run, so every caption and picture is encoded before the first step
and kept on the CPU or on the disk (`trainer.data.store`); the text encoders then leave the device.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from trainer.batches import Inputs
from trainer.config import ModelConfig
from trainer.data import Dataset, Entries, Pick, Store
from trainer.data.dataset import some

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Encoded:
    """A data set as the UNet sees it."""

    dataset: Dataset
    latents: Entries  # by a sample's number: latent (4, h, w), scaled; mask (1, h, w) where wanted
    texts: Entries  # by caption: prompt (tokens, dim), penultimate states; pooled (dim,)
    empty: dict[str, Tensor]  # of the empty prompt

    def gather(self, picks: Sequence[Pick]) -> Inputs:
        """The inputs of a batch, on the CPU in fp32.  All picks have one bucket."""
        samples = [self.dataset.samples[pick.sample] for pick in picks]
        latents = [self.latents[pick.sample] for pick in picks]
        texts = [self.empty if p.caption is None else self.texts[p.caption] for p in picks]
        weights = [sample.loss_weight for sample in samples]
        return Inputs(
            latents=_stacked(latents, "latent"),
            prompt=_stacked(texts, "prompt"),
            pooled=_stacked(texts, "pooled") if "pooled" in self.empty else None,
            time_ids=torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
            loss_weights=None if set(weights) == {1.0} else torch.tensor(weights),
            mask=_stacked(latents, "mask") if "mask" in latents[0] else None,
        )

    def plain(self, rows: Sequence[int]) -> Inputs:
        """The inputs of these samples with their captions as they are written: none is dropped."""
        captions = ((row, self.dataset.samples[row].caption) for row in rows)
        return self.gather([Pick(sample=row, caption=caption) for row, caption in captions])

    def texts_of(self, rows: Sequence[int], name: str) -> Tensor:
        """`prompt` or `pooled` of these samples' own captions: (B, ...)."""
        return _stacked([self.texts[self.dataset.samples[row].caption] for row in rows], name)


def encode(
    pipeline: StableDiffusionXLPipeline,
    dataset: Dataset,
    fingerprint: Callable[..., str],
    stop: Sequence[int] = (),
) -> Encoded:
    """Encode what the store does not have of the captions and pictures, and the empty prompt as the
    pipeline's own unconditional input.

    `fingerprint(*parts)` names parts of the model; it is asked for where there is a cache.  Raises
    UserError that names the picture when the VAE gives a latent that is not finite, and SystemExit
    once `stop` holds a signal.
    """
    captions = dataset.all_captions()
    config = dataset.config
    _report_cut_captions(pipeline, captions)
    store = Store(config.cache, config.cache_dtype)
    names = {
        "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        "picture": ("vae",),
    }
    named = {k: fingerprint(*parts) if config.cache else "" for k, parts in names.items()}
    texts = store.texts(captions, named["text"], lambda: text_encoder(pipeline), stop)
    if pipeline.config.force_zeros_for_empty_prompt:
        empty = {name: torch.zeros_like(x) for name, x in texts[captions[0]].items()}
    else:
        empty = store.texts([""], named["text"], lambda: text_encoder(pipeline), stop)[""]
    pipeline.text_encoder.cpu()
    pipeline.text_encoder_2.cpu()
    latents = store.latents(
        dataset.samples, named["picture"], lambda: picture_encoder(pipeline), stop
    )
    return Encoded(dataset=dataset, latents=latents, texts=texts, empty=empty)


def text_encoder(
    pipeline: StableDiffusionXLPipeline,
) -> Callable[[list[str]], list[dict[str, Tensor]]]:
    """Captions -> prompt (tokens, dim) and pooled (dim,) of each, on the CPU."""

    @torch.no_grad()
    def encode(captions: list[str]) -> list[dict[str, Tensor]]:
        encoded = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        pairs = zip(encoded[0].cpu(), encoded[2].cpu(), strict=True)
        return [{"prompt": prompt, "pooled": pooled} for prompt, pooled in pairs]

    return encode


def picture_encoder(pipeline: StableDiffusionXLPipeline) -> Callable[[Tensor], Tensor]:
    """Pixels (3, H, W) -> the mode of the VAE's posterior, scaled (4, h, w), on the CPU."""
    vae = pipeline.vae

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        return (posterior.mode() * vae.config.scaling_factor)[0].cpu()

    return encode


def fingerprint(config: ModelConfig, *parts: str) -> str:
    """A hash of the files of these parts of the model, by which a cache knows its encoders."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((Path(config.path).expanduser() / part).glob("*")):
            digest.update(f"{part}/{path.name}".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _stacked(entries: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([entry[name] for entry in entries]).float()


def _report_cut_captions(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> None:
    """Name the captions that are longer than the text encoders read."""
    limit = pipeline.tokenizer.model_max_length
    cut = [text for text in captions if len(pipeline.tokenizer(text).input_ids) > limit]
    if cut:
        names = some([f"{text[:40]}..." for text in cut])
        log.warning("%d captions are cut at %d tokens: %s", len(cut), limit, names)
