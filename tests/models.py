"""Small models for the format tests: the shipped SDXL, and a tiny Stable Diffusion 1.5."""

import json
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.config import ASSETS
from trainer.formats import architectures

TINY = ASSETS / "tiny_sdxl"


def make_sd15(folder):
    """Write a pipeline with one text encoder, 1x1 convolutions in attention, and four levels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=49408,
            eos_token_id=49407,
        )
    )
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.save_pretrained(folder / name)
    shutil.copytree(TINY / "tokenizer", folder / "tokenizer")
    shutil.copytree(TINY / "scheduler", folder / "scheduler")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    plain = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | plain))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def assert_same_model(a, b, dtype=None):
    for part in architectures.WEIGHT_PARTS:
        assert a.has(part) == b.has(part)
        if not a.has(part):
            continue
        one, two = a.weights(part), b.weights(part)
        assert one.keys() == two.keys()
        for name, lazy in one.items():
            wanted = lazy.read() if dtype is None or part == "vae" else lazy.read().to(dtype)
            assert two[name].dtype == wanted.dtype, name
            assert torch.equal(two[name].read(), wanted), name


def parts_of(found):
    return [part for part in architectures.WEIGHT_PARTS if found.has(part)]


def assert_equal_modules(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert not tensor.is_meta, name
        assert torch.equal(tensor.float(), theirs[name].float()), name
