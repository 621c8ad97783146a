"""Pictures from the model in training: the same prompts from the same noise each time, so that only
the weights differ."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from trainer.batches import sample_noise
from trainer.conditioning import Encoded
from trainer.config import LogConfig
from trainer.data import Sample, read_pixels


@dataclass(kw_only=True)
class Sampler:
    """Draws the first `log.sample_count` captions of the data set."""

    pipeline: StableDiffusionXLPipeline
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
        unet = self.pipeline.unet
        was_training = unet.training
        unet.eval()
        noise = sample_noise(self.data.latents[0], self.count)
        size = self.batch_size
        chunks = [range(i, min(i + size, self.count)) for i in range(0, self.count, size)]
        pictures = [picture for rows in chunks for picture in self._draw(rows, noise[rows])]
        unet.train(was_training)
        return pictures

    def _draw(self, rows: range, noise: Tensor) -> list[Image.Image]:
        # Prompts are encoded already, and diffusers would cast them to the text encoders' dtype.
        parts = self.pipeline.components | {"text_encoder": None, "text_encoder_2": None}
        denoiser = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        denoiser.set_progress_bar_config(disable=True)
        unet, vae, side = denoiser.unet, denoiser.vae, self.samples[0].side
        empty = [len(self.samples)] * len(rows)
        inputs = {
            "prompt_embeds": self.data.prompt[rows],
            "pooled_prompt_embeds": self.data.pooled[rows],
            "negative_prompt_embeds": self.data.prompt[empty],
            "negative_pooled_prompt_embeds": self.data.pooled[empty],
            "latents": noise,
        }
        latents = denoiser(
            **{name: x.to(unet.device, unet.dtype) for name, x in inputs.items()},
            height=side,
            width=side,
            num_inference_steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
            output_type="latent",
        ).images
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        pixels = torch.cat([vae.decode(latent[None]).sample for latent in scaled])
        return denoiser.image_processor.postprocess(pixels)

    def originals(self) -> list[Image.Image]:
        """The pictures that those captions belong to, as the model sees them."""
        pixels = (read_pixels(sample) for sample in self.samples[: self.count])
        arrays = (((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in pixels)
        return [Image.fromarray(array) for array in arrays]

    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples[: self.count]]
