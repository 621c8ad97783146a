"""The shipped folder: a StableDiffusionXLPipeline in fp16, and a grid of what it draws."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tiny.base import TOKEN_STD, Base, make_scheduler
from tiny.captions import Bpe, Captions, write_tokenizer
from tiny.fit import SEED
from tiny.noto import MODEL_PIXELS, Emoji

MAX_BYTES = 16_000_000  # of the shipped folder


def export(base: Base, vae: AutoencoderKL, captions: Captions, bpe: Bpe, out: Path) -> None:
    """Write a StableDiffusionXLPipeline folder with fp16 weights, instead of an earlier one.

    The text encoders get CLIP's whole vocabulary; rows of words that never occurred are random.
    """
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=with_whole_vocabulary(base.text_encoder, captions).half(),
        text_encoder_2=with_whole_vocabulary(base.text_encoder_2, captions).half(),
        tokenizer=captions.tokenizer,
        tokenizer_2=captions.tokenizer,
        unet=copy.deepcopy(base.unet).half(),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(fresh)
    for name in ("text_encoder", "text_encoder_2"):
        make_classic(fresh / name)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(fresh / name)  # transformers wrote one file of 3.6 MB
        write_tokenizer(fresh / name, bpe, pad=pad)

    size = sum(f.stat().st_size for f in fresh.rglob("*") if f.is_file())
    assert size <= MAX_BYTES, f"{size:,} bytes are more than a repository should carry"
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"export: {out}, {size:,} bytes")


def make_classic(folder: Path) -> None:
    """Let a text encoder that transformers 5 has written load like SDXL's own, in every version.

    SDXL's weights are named text_model.*. And where diffusers loads fp32, transformers 5 loads what
    config.json names: the parts of a pipeline would disagree.
    """
    weights = load_file(folder / "model.safetensors")
    prefix = "" if any(name.startswith("text_model.") for name in weights) else "text_model."
    weights = {prefix + name: weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def with_whole_vocabulary(compact: PreTrainedModel, captions: Captions) -> PreTrainedModel:
    """A text encoder over all of CLIP's ids, equal to the compact one on the ids in use."""
    tokenizer = captions.tokenizer
    config: Any = copy.deepcopy(compact.config)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(SEED)
    table = torch.randn(len(tokenizer), config.hidden_size) * TOKEN_STD
    table[captions.used] = compact.get_input_embeddings().get_parameter("weight").detach()
    state = {
        k: table if k.endswith("token_embedding.weight") else v
        for k, v in compact.state_dict().items()
    }
    whole = type(compact)(config)
    whole.load_state_dict(state)
    return whole.eval()


@torch.no_grad()
def draw_grid(
    folder: Path, emoji: list[Emoji], path: Path, *, steps: int = 25, guidance: float = 1.0
) -> None:
    """Sample the labels with the exported pipeline, 12 a row, each original above its sample."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        [e.label for e in emoji],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
    ).images
    cell, columns = 2 * MODEL_PIXELS, 12
    grid = Image.new("RGB", (columns * cell, 2 * cell * math.ceil(len(emoji) / columns)), "white")
    for index, (original, sample) in enumerate(zip(emoji, samples, strict=True)):
        left, top = index % columns * cell, index // columns * 2 * cell
        grid.paste(original.picture.resize((cell, cell)), (left, top))
        grid.paste(sample.resize((cell, cell)), (left, top + cell))
    grid.save(path)
    print(f"grid: {path}")
