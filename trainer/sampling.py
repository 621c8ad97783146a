"""Pictures from the model in training: the same prompts from the same noise each time, so that only
the weights differ."""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from trainer.batches import sample_noise
from trainer.conditioning import Encoded, unscaled
from trainer.config import LogConfig
from trainer.data import Sample, read_pixels
from trainer.model import Model


@dataclass(kw_only=True)
class Sampler:
    """Draws the first `log.sample_count` captions of the data set."""

    model: Model
    data: Encoded
    samples: list[Sample]
    config: LogConfig
    batch_size: int  # pictures drawn at a time

    @property
    def count(self) -> int:
        return min(self.config.sample_count, len(self.samples))

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """One picture for each of the first `count` captions."""
        unet = self.model.unet
        was_training = unet.training
        unet.eval()
        noise = sample_noise(self.data.latents[0], self.count)
        size = self.batch_size
        chunks = [range(i, min(i + size, self.count)) for i in range(0, self.count, size)]
        latents = torch.cat([self._denoise(rows, noise[rows]) for rows in chunks])
        unet.train(was_training)
        with self.model.vae() as vae:
            scaled = unscaled(vae, latents.to(vae.dtype))
            pixels = torch.cat([vae.decode(latent[None]).sample for latent in scaled])
        return VaeImageProcessor().postprocess(pixels)

    def _denoise(self, rows: range, noise: Tensor) -> Tensor:
        """-> latents (B, 4, h, w)."""
        unet, side = self.model.unet, self.samples[0].side
        prompt = self.data.read([self.data.captions[row] for row in rows])
        empty = self.data.read([None] * len(rows))
        inputs = {
            "prompt_embeds": prompt.prompt,
            "negative_prompt_embeds": empty.prompt,
            "pooled_prompt_embeds": prompt.pooled,
            "negative_pooled_prompt_embeds": empty.pooled,
            "latents": noise,
        }
        given = {k: x.to(unet.device, unet.dtype) for k, x in inputs.items() if x is not None}
        return self._denoiser(
            **given,
            height=side,
            width=side,
            num_inference_steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
            output_type="latent",
        ).images

    @cached_property
    def _denoiser(self) -> DiffusionPipeline:
        """The model's pipeline around the UNet alone: prompts are encoded already, and latents are
        decoded here."""
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
        """The pictures that those captions belong to, as the model sees them."""
        pixels = (read_pixels(sample) for sample in self.samples[: self.count])
        arrays = (((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in pixels)
        return [Image.fromarray(array) for array in arrays]

    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples[: self.count]]
