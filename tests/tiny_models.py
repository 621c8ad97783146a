"""Pipelines of a few kilobytes with random weights, saved in diffusers layout."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.config import ASSETS


def save_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 in miniature: one text encoder, no added conditions, epsilon."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_attention_heads=3,
        num_hidden_layers=2,
        projection_dim=24,
        eos_token_id=49407,
        bos_token_id=49406,
        pad_token_id=49407,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=24,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        layers_per_block=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "tiny_sdxl/tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
