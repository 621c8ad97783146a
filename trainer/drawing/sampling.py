"""Pictures from the model in training: each time the same prompts from the same noise, so that only
the weights differ."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from trainer.config import LogConfig
from trainer.data import Sample, free_rows
from trainer.data.buckets import Size
from trainer.drawing import pictures, prompts
from trainer.drawing.prompts import Prompt
from trainer.models.model import Model
from trainer.objective.batches import sample_noise
from trainer.objective.encoding import Encoded, unscaled
from trainer.system import console, memory, signals

log = logging.getLogger(__name__)

TILE = 512  # pixels on a side, of the tiles that a VAE decodes if memory is short


@dataclass(kw_only=True)
class Sampler:
    """Draws `log.prompts`, or else the first `log.sample_count` captions of the dataset, each at
    its picture's size."""

    model: Model
    data: Encoded
    config: LogConfig
    batch_size: int  # pictures drawn at a time
    stop: Sequence[int] = ()  # holds a signal once the run is asked to stop

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples whose captions are drawn; none if there are prompts."""
        dataset = self.data.dataset
        count = 0 if self.config.prompts else self.config.sample_count
        return [dataset.samples[row] for row in dataset.shown[:count]]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The configured prompts, or the samples' captions."""
        if self.config.prompts:
            side = self.data.dataset.config.largest_resolution
            return prompts.of_config(self.config, side)
        return [
            prompts.of_caption(sample.caption, place, self.config, sample.bucket)
            for place, sample in enumerate(self.samples)
        ]

    @property
    def count(self) -> int:
        return len(self.prompts)

    @torch.no_grad()
    def denoise(self, is_trained: bool = True) -> list[Tensor]:
        """The latents (4, h, w) of a picture for each of the `count` prompts.  An untrained model
        uses its own scheduler, whose prediction type `noise` may change.  Raises
        `signals.Stopped`."""
        self._denoiser.scheduler = self.model.sampling_schedule(is_trained)
        latents: dict[int, Tensor] = {}  # by the prompt's place
        with self.model.evaluating(), console.Aside("drawing", self.count, "pictures") as aside:
            for places in self._chunks():
                signals.leave_if(self.stop)
                latents |= dict(zip(places, self._denoise(places), strict=True))
                aside.advance(len(places))
        return [latents[place] for place in range(self.count)]

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
        known = self.data.latents[0]["latent"]
        pixels = self.data.dataset.samples[0].bucket[0] // known.shape[-2]  # per latent element
        like = known.new_zeros(known.shape[0], first.height // pixels, first.width // pixels)
        noise = sample_noise(like, [prompt.seed for prompt in wanted])
        prompt = self.data.read([prompt.text for prompt in wanted])
        negative = self.data.read([prompt.negative or None for prompt in wanted])
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

    def originals(self) -> list[Image.Image]:
        """The pictures that the captions belong to, as the model sees them; none for prompts."""
        originals = [pictures.of_pixels(sample.read_pixels()) for sample in self.samples]
        free_rows()
        return originals

    def captions(self) -> list[str]:
        """The prompts or captions as they were given."""
        return [prompt.line for prompt in self.prompts]
