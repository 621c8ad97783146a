"""The pipeline that is fine-tuned: loaded from a diffusers folder, with everything but the UNet
frozen."""

import logging
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

from trainer.config import DTYPES, ModelConfig
from trainer.errors import UserError

log = logging.getLogger(__name__)


def load_pipeline(config: ModelConfig, device: torch.device) -> StableDiffusionXLPipeline:
    """Read the pipeline in `config.path`; UNet in `config.dtype`, the frozen parts in fp32.
    Nothing is downloaded."""
    folder = Path(config.path).expanduser()
    log.info("model: loading %s", folder)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.path={folder} cannot be loaded as a Stable Diffusion XL pipeline: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(DTYPES[config.dtype])  # before it goes to the device
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.float()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.to(device)
        part.requires_grad_(False)
        part.eval()
    return pipeline
