"""The UNet's inputs: encoded captions and pictures.

Frozen encoders give the same output for the same input, so every caption and picture is encoded
before the first step and kept in memory or on disk (`trainer.data.store`).  Text encoders that are
trained encode the captions of each batch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.data import Dataset, Entries, Entry, Pick, Store, free_rows
from trainer.models import text
from trainer.models.model import Model
from trainer.models.text import Text
from trainer.objective.batches import Inputs
from trainer.wording import counted, some

log = logging.getLogger(__name__)

# Captions -> their encoding; None is no prompt.
Read = Callable[[Sequence[str | None]], Text]


@dataclass(kw_only=True)
class Encoded:
    """An encoded dataset."""

    dataset: Dataset
    latents: Entries  # by sample index: latent (4, h, w), scaled
    masks: Entries | None  # by sample index: mask (1, h, w), if the loss is masked
    read: Read

    def gather(self, picks: Sequence[Pick]) -> Inputs:
        """The inputs of a batch, in fp32.  All picks share one bucket."""
        samples = [self.dataset.samples[pick.sample] for pick in picks]
        latents = [self.latents[pick.sample] for pick in picks]
        masks = [self.masks[pick.sample] for pick in picks] if self.masks is not None else None
        encoded = self.read([pick.caption for pick in picks])
        weights = [sample.loss_weight for sample in samples]
        return Inputs(
            latents=_stacked(latents, "latent"),
            prompt=encoded.prompt,
            pooled=encoded.pooled,
            time_ids=torch.tensor([sample.time_ids for sample in samples], dtype=torch.float32),
            loss_weights=None if set(weights) == {1.0} else torch.tensor(weights),
            mask=_stacked(masks, "mask") if masks is not None else None,
        )

    def plain(self, rows: Sequence[int]) -> Inputs:
        """The inputs of these samples with their captions as written, without dropout."""
        captions = zip(rows, self.captions(rows), strict=True)
        return self.gather([Pick(sample=row, caption=caption) for row, caption in captions])

    def captions(self, rows: Sequence[int]) -> list[str]:
        return [self.dataset.samples[row].caption for row in rows]


def encode(
    model: Model, dataset: Dataset, prompts: Sequence[str] = (), stop: Sequence[int] = ()
) -> Encoded:
    """Encode the captions, `prompts` and pictures that the store lacks; an encoder is loaded only
    if there are any.

    Raises a UserError that names the picture if the VAE's latent is not finite, and SystemExit once
    `stop` holds a signal.
    """
    captions = list(dict.fromkeys([*dataset.all_captions(), *prompts]))
    config = dataset.config
    _report_cut_captions(model, captions)
    store = Store(config.cache, config.cache_dtype)
    read: Read | None = model.text_encoder
    if read is None:
        of_text = text_fingerprint(model, config.cache) if config.cache else ""
        read = read_texts(captions, store, of_text, model.load_text_encoders, stop)
    of_pictures = picture_fingerprint(model, config.cache) if config.cache else ""
    latents = store.latents(dataset.samples, of_pictures, lambda: _picture_encoder(model), stop)
    masks = store.masks(dataset.samples, latents, stop)
    free_rows()
    return Encoded(dataset=dataset, latents=latents, masks=masks, read=read)


def read_texts(
    captions: Sequence[str],
    store: Store,
    fingerprint: str,
    load: Callable[[], text.Encoder],
    stop: Sequence[int] = (),
) -> Read:
    """Encode those of the captions that the store lacks, and the empty prompt; `load` is called
    only if there are any.  -> what looks them up.  fingerprint: of the text encoders, for a store
    on the disk."""
    every = [None, *captions]
    kept = store.texts(every, fingerprint, lambda: _text_encoder(load()), stop)

    def read(wanted: Sequence[str | None]) -> Text:
        found = [kept[caption] for caption in wanted]
        pooled = _stacked(found, "pooled") if "pooled" in found[0] else None
        return Text(prompt=_stacked(found, "prompt"), pooled=pooled)

    return read


def text_fingerprint(model: Model, cache: str) -> str:
    """Identifies everything that encoded captions depend on; slow hashes are remembered in
    `cache`."""
    config, origin = model.config, model.origin
    memo = Path(cache).expanduser()
    read_by = (*model.text_parts, *map(text.tokenizer_part, model.text_parts))
    parts = [origin.fingerprint(part, memo) for part in read_by]
    how = (config.text_dtype, config.prompt_chunks, config.clip_skip, origin.zeros_for_empty)
    return repr((parts, how))


def picture_fingerprint(model: Model, cache: str) -> str:
    """Identifies the VAE that pictures are encoded with, and its dtype."""
    memo = Path(cache).expanduser()
    return repr((model.vae_origin.fingerprint("vae", memo), model.config.vae_dtype))


def scaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The VAE's latents, scaled for the UNet: (B, C, h, w) -> (B, C, h, w)."""
    shift, scale = _normalization(vae, latents)
    return (latents - shift) * scale


def unscaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The UNet's latents, scaled back for the VAE: (B, C, h, w) -> (B, C, h, w)."""
    shift, scale = _normalization(vae, latents)
    return latents / scale + shift


def _normalization(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The shift to subtract from a VAE's latents, and the factor to multiply them by: numbers, or
    (1, C, 1, 1) if the VAE has per-channel statistics (used as in diffusers' SDXL pipelines: both
    or neither)."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.shift_factor or 0.0, config.scaling_factor
    shift, deviation = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return shift, config.scaling_factor / deviation


def _text_encoder(encoder: text.Encoder) -> Callable[[list[str | None]], list[Entry]]:
    """Captions -> prompt (tokens, dim) and pooled (dim,) of each, on the CPU."""

    @torch.no_grad()
    def encode(captions: list[str | None]) -> list[Entry]:
        encoded = encoder(captions)
        both = {"prompt": encoded.prompt.cpu()}
        if encoded.pooled is not None:
            both["pooled"] = encoded.pooled.cpu()
        return [{name: x[row] for name, x in both.items()} for row in range(len(captions))]

    return encode


def _picture_encoder(model: Model) -> Callable[[Tensor], Tensor]:
    """Pixels (3, H, W) -> the mode of the VAE's posterior, scaled (4, h, w), on the CPU."""
    vae = model.load_vae()

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        return scaled(vae, posterior.mode())[0].float().cpu()

    return encode


def _stacked(entries: Sequence[Entry], name: str) -> Tensor:
    return torch.stack([entry[name] for entry in entries]).float()


def _report_cut_captions(model: Model, captions: list[str]) -> None:
    """Warn about captions that are longer than the text encoders read."""
    cut, room = cut_captions(model, captions)
    if cut:
        what = f"captions are truncated at {room} tokens (model.prompt_chunks allows more)"
        log.warning("%s: %s", counted(len(cut), what), some(f"{text[:40]}..." for text in cut))


def cut_captions(model: Model, captions: list[str]) -> tuple[dict[str, int], int]:
    """The captions longer than the text encoders read, with their token counts; and how many tokens
    are read."""
    tokenizer = text.tokenizer(model.origin, model.text_parts[0])
    room = text.room(model.config, tokenizer)
    # A token has at least one character, so most captions are known to fit without being tokenized
    # (but a character that is not ASCII may be several tokens).
    long = [caption for caption in captions if len(caption) > room or not caption.isascii()]
    counts = {caption: len(text.token_ids(tokenizer, caption)) for caption in long}
    return {caption: count for caption, count in counts.items() if count > room}, room
