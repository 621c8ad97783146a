"""`model=`: what is fine-tuned."""

from dataclasses import dataclass

import torch

from trainer.config.fields import one_of, within

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class ModelConfig:
    """What is fine-tuned: a pipeline with a UNet2DConditionModel, such as SDXL or Stable Diffusion
    1.5."""

    path: str  #: a diffusers folder, a single .safetensors or .ckpt file, or a name on the hub
    variant: str | None  #: of a diffusers folder's files, such as fp16
    dtype: str = one_of("float32", "bfloat16")  #: of the UNet's weights
    #: Dtype of its matrix products: the weights', or bf16 with fp32 weights (autocast).
    compute: str = one_of("same", "bfloat16")
    #: Store the UNet's frozen weights in 8 or 4 bits, under a LoRA: trainer/models/quantization.py.
    quantization: str = one_of("none", "int8", "nf4")
    #: Another VAE, exported with the result: a folder, file or hub repository of a VAE or a model.
    vae: str | None
    vae_dtype: str = one_of(*DTYPES)  #: the original SDXL VAE overflows in float16
    text_dtype: str = one_of(*DTYPES)  #: of the text encoders; not float16 if they are trained
    #: A caption is encoded in up to this many chunks of 75 tokens; the rest is truncated.
    prompt_chunks: int = within(1, 16)
    #: Layers left out at the end; null: as published (SDXL 1, SD 1.5 0).  Equals kohya's/A1111's
    #: number - 1; diffusers' for SD 1.5; diffusers' + 1 for SDXL.
    clip_skip: int | None = within(0, 11)
