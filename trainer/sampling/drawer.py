"""Pictures of prompts: from each prompt's own noise, so that only the weights make a difference."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from trainer.data.buckets import Size
from trainer.models.model import Model
from trainer.objective.batches import sample_noise
from trainer.objective.encoding import Read, unscaled
from trainer.sampling.prompts import Prompt
from trainer.system import console, memory, signals

log = logging.getLogger(__name__)

TILE = 512  # pixels on a side, of the tiles that a VAE decodes if memory is short


@dataclass(kw_only=True)
class Drawer:
    """Draws prompts with a model whose UNet is loaded."""

    model: Model
    read: Read  # the texts of the prompts -> their encoding
    prompts: list[Prompt]
    batch_size: int  # pictures drawn at a time
    stop: Sequence[int] = ()  # holds a signal once this process is asked to stop

    @property
    def count(self) -> int:
        return len(self.prompts)

    def denoise(self, is_trained: bool = True) -> list[Tensor]:
        """The latents (4, h, w) of a picture for each of the `count` prompts; otherwise as
        `denoised`."""
        latents: dict[int, Tensor] = {}  # by the prompt's place
        with console.Aside("drawing", self.count, "pictures") as aside:
            for place, latent in self.denoised(is_trained):
                latents[place] = latent
                aside.advance(1)
        return [latents[place] for place in range(self.count)]

    @torch.no_grad()
    def denoised(self, is_trained: bool = True) -> Iterator[tuple[int, Tensor]]:
        """The place of each prompt, and the latent (4, h, w) of its picture, as they are drawn.  An
        untrained model uses its own scheduler, whose prediction type `noise` may change.  Raises
        `signals.Stopped`."""
        self._denoiser.scheduler = self.model.sampling_schedule(is_trained)
        with self.model.evaluating():
            for places in self._chunks():
                signals.leave_if(self.stop)
                yield from zip(places, self._denoise(places), strict=True)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """The pictures of these latents.  A VAE needs more than a training step (3 GB for 1024
        pixels in fp32), so if memory runs out the UNet makes room for it, and then it decodes in
        tiles that overlap.  Raises MemoryError if that is not enough."""
        drawn = self._decoded(latents)
        if isinstance(drawn, str):
            with self.model.unet_aside():
                drawn = self._decoded(latents)
                if isinstance(drawn, str):
                    log.warning(
                        "the VAE decodes in tiles of %d pixels, as memory is short: colours may "
                        "differ between tiles",
                        TILE,
                    )
                    drawn = self._decoded(latents, in_tiles=True)
        if isinstance(drawn, str):
            raise MemoryError(drawn)
        return drawn

    def _decoded(
        self, latents: Sequence[Tensor], in_tiles: bool = False
    ) -> list[Image.Image] | str:
        """The pictures; if memory runs out, only the error's text, since the error itself keeps the
        VAE alive."""
        try:
            drawn, vae = [], self.model.load_vae()
            if in_tiles:
                vae.enable_tiling()
                vae.tile_sample_min_size = TILE
                vae.tile_latent_min_size = TILE >> (len(vae.config.block_out_channels) - 1)
            for latent in latents:
                scaled = unscaled(vae, latent[None].to(vae.dtype))
                pixels = vae.decode(scaled).sample.nan_to_num()  # NaN from a broken model
                drawn += VaeImageProcessor().postprocess(pixels)
            return drawn
        except Exception as error:
            if not memory.ran_out(error):
                raise
            return str(error)

    def _chunks(self) -> list[list[int]]:
        """Indices of pictures drawn together: at most `batch_size`, with the same size, steps and
        guidance."""
        alike: dict[tuple[Size, int, float], list[int]] = {}
        for place, prompt in enumerate(self.prompts):
            alike.setdefault((prompt.size, prompt.steps, prompt.guidance_scale), []).append(place)
        count = self.batch_size
        return [
            group[i : i + count] for group in alike.values() for i in range(0, len(group), count)
        ]

    def _denoise(self, places: list[int]) -> Tensor:
        """-> latents (B, 4, h, w)."""
        unet, wanted = self.model.unet, [self.prompts[place] for place in places]
        first = wanted[0]
        side = self.model.pixels_per_latent
        like = torch.empty(unet.config.in_channels, first.height // side, first.width // side)
        noise = sample_noise(like, [prompt.seed for prompt in wanted])
        prompt = self.read([prompt.text for prompt in wanted])
        negative = self.read([prompt.negative or None for prompt in wanted])
        inputs = {
            "prompt_embeds": prompt.prompt,
            "negative_prompt_embeds": negative.prompt,
            "pooled_prompt_embeds": prompt.pooled,
            "negative_pooled_prompt_embeds": negative.pooled,
            "latents": noise,
        }
        given = {k: x.to(unet.device, unet.dtype) for k, x in inputs.items() if x is not None}
        return self._denoiser(
            **given,
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in wanted],
            output_type="latent",
        ).images

    @cached_property
    def _denoiser(self) -> DiffusionPipeline:
        """The model's pipeline with only the UNet: prompts are encoded before, and latents decoded
        here."""
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        parts |= {"unet": self.model.unet, "scheduler": self.model.sampling_schedule()}
        if self.model.unet.config.addition_embed_type == "text_time":
            more = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
            denoiser = StableDiffusionXLPipeline(**parts, **more, add_watermarker=False)
        else:
            more = dict.fromkeys(("safety_checker", "feature_extractor"))
            denoiser = StableDiffusionPipeline(**parts, **more, requires_safety_checker=False)
        denoiser.set_progress_bar_config(disable=True)
        return denoiser
