"""`model=`: what is fine-tuned."""

from dataclasses import dataclass

import torch

from trainer.config.fields import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelConfig:
    """What is fine-tuned: a Stable Diffusion XL pipeline in diffusers layout."""

    path: str  # folder with model_index.json
    dtype: str = one_of(*DTYPES)  # of the UNet's weights and arithmetic
