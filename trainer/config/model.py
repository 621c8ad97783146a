"""`model=`: what is fine-tuned."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.config.fields import one_of, within

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def why_missing(option: str, name: str) -> str | None:
    """What to say where `name` is neither on the disk nor what a hub repository may be called."""
    is_pair = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    is_repository = is_pair and not name.endswith((".safetensors", ".ckpt"))
    if is_repository or Path(name).expanduser().exists():
        return None
    return (
        f"{option}={name} does not exist; name a folder in diffusers layout, a .safetensors or "
        ".ckpt file, or a hub repository (owner/name)"
    )


@dataclass(kw_only=True)
class ModelConfig:
    """What is fine-tuned: a pipeline with a UNet2DConditionModel, such as SDXL or Stable Diffusion
    1.5."""

    path: str  # a diffusers folder, a single .safetensors or .ckpt file, or a name on the hub
    variant: str | None  # of a diffusers folder's files, such as fp16
    dtype: str = one_of("float32", "bfloat16")  # of the UNet's weights
    # Of its matrix products: as the weights, or bf16 with fp32 weights (autocast).
    compute: str = one_of("same", "bfloat16")
    # Another VAE, exported with the result: its folder, file or hub repository, or a model's.
    vae: str | None
    vae_dtype: str = one_of(*DTYPES)  # the original SDXL VAE overflows in float16
    text_dtype: str = one_of(*DTYPES)  # of the text encoders; trained ones cannot be in float16
    # A caption is read in this many chunks of 75 tokens; the rest of it is cut.
    prompt_chunks: int = within(1, 16)
    # Layers left out at the end of the text encoders; null as published (SDXL 1, SD 1.5 none).  It
    # is the number of kohya's scripts and A1111 minus 1; diffusers' for SD 1.5, and diffusers' plus
    # 1 for SDXL, whose published layer it counts from.
    clip_skip: int | None = within(0, 11)
