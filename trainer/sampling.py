"""Pictures from the model in training: the same prompts from the same noise each time, so that only
the weights differ."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from trainer.batches import sample_noise
from trainer.conditioning import Encoded
from trainer.config import LogConfig
from trainer.data import Sample


@dataclass(kw_only=True)
class Sampler:
    """Draws the first `log.sample_count` captions of the data set, each at its picture's size."""

    pipeline: StableDiffusionXLPipeline
    data: Encoded
    config: LogConfig
    batch_size: int  # pictures drawn at a time

    @property
    def rows(self) -> list[int]:
        """The samples whose captions are drawn."""
        return self.data.dataset.own[: self.config.sample_count]

    @property
    def count(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """One picture for each of the `count` captions."""
        unet = self.pipeline.unet
        was_training = unet.training
        unet.eval()
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for place, sample in enumerate(self._samples()):
            by_bucket.setdefault(sample.bucket, []).append(place)
        pictures = {}
        for places in by_bucket.values():
            for start in range(0, len(places), self.batch_size):
                chunk = places[start : start + self.batch_size]
                pictures |= dict(zip(chunk, self._draw(chunk), strict=True))
        unet.train(was_training)
        return [pictures[place] for place in range(self.count)]

    def _draw(self, places: list[int]) -> list[Image.Image]:
        """The pictures at these places of `rows`, which have one bucket."""
        rows = [self.rows[place] for place in places]
        noise = sample_noise(self.data.latents[rows[0]]["latent"], self.count)[places]
        # Prompts are encoded already, and diffusers would cast them to the text encoders' dtype.
        parts = self.pipeline.components | {"text_encoder": None, "text_encoder_2": None}
        denoiser = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        denoiser.set_progress_bar_config(disable=True)
        unet, vae = denoiser.unet, denoiser.vae
        height, width = self.data.dataset.samples[rows[0]].bucket
        empty = {name: torch.stack([x] * len(rows)) for name, x in self.data.empty.items()}
        inputs = {
            "prompt_embeds": self.data.texts_of(rows, "prompt"),
            "pooled_prompt_embeds": self.data.texts_of(rows, "pooled"),
            "negative_prompt_embeds": empty["prompt"],
            "negative_pooled_prompt_embeds": empty["pooled"],
            "latents": noise,
        }
        latents = denoiser(
            **{name: x.to(unet.device, unet.dtype) for name, x in inputs.items()},
            height=height,
            width=width,
            num_inference_steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
            output_type="latent",
        ).images
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        pixels = torch.cat([vae.decode(latent[None]).sample for latent in scaled])
        return denoiser.image_processor.postprocess(pixels)

    def originals(self) -> list[Image.Image]:
        """The pictures that those captions belong to, as the model sees them."""
        pixels = (sample.read_pixels() for sample in self._samples())
        arrays = (((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in pixels)
        return [Image.fromarray(array) for array in arrays]

    def captions(self) -> list[str]:
        return [sample.caption for sample in self._samples()]

    def _samples(self) -> list[Sample]:
        return [self.data.dataset.samples[row] for row in self.rows]
