"""Pre-train the tiny SDXL that ships in trainer/assets/tiny_sdxl: VAE, UNet, two text encoders.

    npm pack emojibase-data@17.0.0 && tar xf emojibase-data-17.0.0.tgz
    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py --emojibase package

A real StableDiffusionXLPipeline folder in miniature: 64-pixel pictures, 15 MB, about 65 minutes on
one CPU core. It only memorises 300 of Noto's emoji, so that a fine-tuning run has a base model
without a download. It can be killed at any time: the same command continues from the checkpoints
in --work, and ends with the same weights.

Decisions, each measured: v-prediction on a schedule that ends in pure noise, because epsilon
prediction gets the shapes right but the colours wrong (Lin et al. 2024). Text encoders are trained
too, because random ones have little effect. Latents are rescaled by each channel's effect on the
pixels, because after full whitening the UNet spends half of its loss on invisible detail.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tiny.base import eval_loss, newest_base, train_base
from tiny.captions import Captions, read_bpe
from tiny.export import draw_grid, export
from tiny.fit import Recipe
from tiny.noto import (
    SourceError,
    add_source_arguments,
    choose_varied,
    read_emoji,
    sources,
    split_held_out,
)
from tiny.vae import psnr, to_latents, to_pixels, train_vae
from transformers import CLIPTokenizer

# Pictures per emojibase group: much that is colourful, few of the yellow faces that look alike.
NUM_PICTURES = {0: 20, 3: 95, 4: 85, 5: 50, 6: 25, 7: 25}

VAE_RECIPES = (
    Recipe(steps=3200, batch=8, lr_peak=2e-3, flat_until=0.2, ema=0.995),  # with a KL
    Recipe(steps=1200, batch=8, lr_peak=1.5e-3, flat_until=0.2, ema=0.995),  # with covariance
)
BASE_RECIPE = Recipe(steps=6000, batch=32, lr_peak=1.5e-3, flat_until=0.5, ema=0.998)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source_arguments(parser, bpe=True)
    parser.add_argument("--out", type=Path, default=Path("trainer/assets/tiny_sdxl"))
    parser.add_argument("--work", type=Path, default=Path("tiny_sdxl_work"), help="for checkpoints")
    parser.add_argument(
        "--export-only", action="store_true", help="export the newest checkpoint, as it is"
    )
    parser.add_argument(
        "--grid", type=Path, metavar="PNG", help="also draw 48 samples below their originals"
    )
    args = parser.parse_args()
    try:
        run(args)
    except SourceError as error:
        sys.exit(f"pretrain_tiny: {error}")


def run(args: argparse.Namespace) -> None:
    # Read pictures and captions.
    source = sources(args)
    bpe = read_bpe(source.bpe)
    merges: Any = bpe.merges  # pairs, whatever transformers 5 annotates
    tokenizer = CLIPTokenizer(vocab=bpe.vocabulary, merges=merges, model_max_length=77)
    emoji = read_emoji(source)
    usable, held_out = split_held_out(emoji)
    chosen = choose_varied(usable, NUM_PICTURES)
    captions = Captions(tokenizer, emoji)

    # Train the VAE, on all that is not held out.
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(to_pixels(usable), VAE_RECIPES, args.work)
    seen, unseen = psnr(vae, to_pixels(usable)), psnr(vae, to_pixels(held_out))
    print(f"vae: PSNR {seen:.2f} dB on {len(usable)} pictures, {unseen:.2f} dB on the held-out")

    # Train the UNet and its text encoders, on the latents of the chosen pictures.
    latents = to_latents(vae, chosen)
    if args.export_only:
        base = newest_base(captions, args.work)
    else:
        base = train_base(chosen, latents, captions, BASE_RECIPE, args.work)
    seen = eval_loss(base, chosen, latents, captions)
    unseen = eval_loss(base, held_out, to_latents(vae, held_out), captions)
    print(f"base: v-loss {seen:.4f} on {len(chosen)} pictures, {unseen:.4f} on the held-out")

    # Export them, and draw samples.
    export(base, vae, captions, bpe, args.out)
    if args.grid:
        draw_grid(args.out, chosen[:: len(chosen) // 48][:48], args.grid)


if __name__ == "__main__":
    main()
