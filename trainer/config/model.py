"""`model=`: what is fine-tuned."""

from dataclasses import dataclass

import torch

from trainer.config.fields import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelConfig:
    """What is fine-tuned: SDXL, Stable Diffusion 1.5, or another pipeline with their UNet."""

    path: str  # a folder with model_index.json, a .safetensors or .ckpt file, or a hub repository
    variant: str | None  # of a folder's weights, such as fp16: diffusion_pytorch_model.fp16.*
    dtype: str = one_of(*DTYPES)  # of the UNet's weights and arithmetic
