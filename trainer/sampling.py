"""Pictures from the model in training: the same prompts from the same noise each time, so that only
the weights differ."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainer.batches import sample_noise
from trainer.conditioning import Encoded
from trainer.config import LogConfig
from trainer.data import Sample, read_pixels

_TILE, _LABEL, _MARGIN, _COLUMNS = 96, 14, 64, 8  # pixels; pictures a band


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


def save_pictures(folder: Path, pictures: list[Image.Image]) -> None:
    """Write 00.png, 01.png, ... in the order of the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")


def load_pictures(folder: Path, count: int) -> list[Image.Image]:
    """What `save_pictures` wrote; empty when there are not `count` pictures."""
    paths = [folder / f"{number:02d}.png" for number in range(count)]
    return [Image.open(p).convert("RGB") for p in paths] if all(p.exists() for p in paths) else []


def grid(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """Labelled pictures: {row title: one picture per caption} -> bands of eight columns, captions
    on top, titles at the left."""
    count = len(captions)
    bands = -(-count // _COLUMNS)
    band_height = _LABEL + len(rows) * _TILE + 6
    sheet = Image.new("RGB", (_MARGIN + min(count, _COLUMNS) * _TILE, bands * band_height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, caption in enumerate(captions):
        left, top = _MARGIN + number % _COLUMNS * _TILE, number // _COLUMNS * band_height
        pen.text((left + 2, top), _fit(pen, caption, font), fill="black", font=font)
        for row, pictures in enumerate(rows.values()):
            sheet.paste(
                pictures[number].resize((_TILE, _TILE), Image.Resampling.BICUBIC),
                (left, top + _LABEL + row * _TILE),
            )
    for band in range(bands):
        for row, title in enumerate(rows):
            pen.text(
                (4, band * band_height + _LABEL + row * _TILE + _TILE // 2 - 6),
                title,
                fill="black",
                font=font,
            )
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont) -> str:
    """As much of the text as a tile is wide."""
    if pen.textlength(text[:_TILE], font=font) <= _TILE - 4:
        return text[:_TILE]
    end = next(
        n for n in range(_TILE, 0, -1) if pen.textlength(text[:n] + "…", font=font) <= _TILE - 4
    )
    return text[:end] + "…"
