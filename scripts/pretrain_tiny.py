"""Pre-train the tiny SDXL that ships in trainer/assets/tiny_sdxl: VAE, UNet, two text encoders.

    npm pack emojibase-data@17.0.0 && tar xf emojibase-data-17.0.0.tgz
    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py --emojibase package

A real StableDiffusionXLPipeline folder in miniature: 64-pixel pictures, 15 MB, about 65 minutes on
one CPU core. It learns 300 of Noto's emoji by heart, no more, so that a fine-tuning run has
something to start from without a download. Kill it whenever you like: the same command continues
from the checkpoints in --work, and ends with the same weights.

Decisions, each measured: v-prediction on a schedule that ends in pure noise, because with epsilon
the shapes come out right and the colours wrong (Lin et al. 2024). Text encoders trained along,
because random ones are hardly listened to. Latents rescaled by what each channel is worth in
pixels, because after full whitening the UNet spends half of its loss on detail that nobody sees.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from noto import (
    MODEL_PIXELS,
    Bpe,
    Emoji,
    SourceError,
    add_source_arguments,
    model_pixels,
    read_bpe,
    read_emoji,
    sources,
    split_held_out,
    write_tokenizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SEED = 0
SECONDS_PER_REPORT = 15
SECONDS_PER_CHECKPOINT = 120

MAX_BYTES = 16_000_000  # of the shipped folder
LATENT_NOISE = 0.05  # standard deviation, of latents with 1
TOKEN_STD = 0.7  # of a word's row before training

# Pictures per emojibase group: much that is colourful, few of the yellow faces that look alike.
NUM_PICTURES = {0: 20, 3: 95, 4: 85, 5: 50, 6: 25, 7: 25}


@dataclass(kw_only=True)
class Recipe:
    steps: int
    batch: int
    lr_peak: float
    flat_until: float  # fraction of the steps after which the learning rate falls
    ema: float  # decay per step of the averaged weights, which are the ones that ship
    warmup: int = 100  # steps


VAE_RECIPE = Recipe(steps=3200, batch=8, lr_peak=2e-3, flat_until=0.2, ema=0.995)
VAE_RECIPE_2 = Recipe(steps=1200, batch=8, lr_peak=1.5e-3, flat_until=0.2, ema=0.995)
BASE_RECIPE = Recipe(steps=6000, batch=32, lr_peak=1.5e-3, flat_until=0.5, ema=0.998)


# --- the pictures ---------------------------------------------------------------------------------


def choose_varied(emoji: list[Emoji], numbers: dict[int, int]) -> list[Emoji]:
    """The given number of emoji per group, as unlike each other as can be: of many clocks, one.

    Farthest-point selection on thumbnails: after the first, always the one farthest from all taken.
    """
    chosen = []
    for group, number in numbers.items():
        members = [e for e in emoji if e.group == group]
        thumbnails = np.stack(
            [np.asarray(e.picture.resize((16, 16)), dtype=np.float32) for e in members]
        )
        distances = np.full(len(members), np.inf)
        taken = [0]
        while len(taken) < min(number, len(members)):
            to_last = np.square(thumbnails - thumbnails[taken[-1]]).mean(axis=(1, 2, 3))
            distances = np.minimum(distances, to_last)
            taken.append(int(distances.argmax()))
        chosen += [members[i] for i in sorted(taken)]
    return chosen


def to_pixels(emoji: list[Emoji]) -> Tensor:
    """-> (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([model_pixels(e.picture) for e in emoji]))


@torch.no_grad()
def to_latents(vae: AutoencoderKL, emoji: list[Emoji]) -> Tensor:
    """-> (N, 4, 16, 16), mean square about 1."""
    return torch.cat([vae.encode(x).latent_dist.mean for x in to_pixels(emoji).split(64)])


# --- training, the same for both networks ---------------------------------------------------------


def fit(
    name: str,
    model: nn.Module,
    groups: list[dict],
    loss_at: Callable[[nn.Module, int], Tensor],
    recipe: Recipe,
    work: Path,
) -> nn.Module:
    """Minimise `loss_at(model, step)`, from the checkpoint if there is one.  -> the averaged model.

    AdamW; a group of parameters may carry an `lr_scale`. The loss draws everything random from
    `step`, so a continued run needs no generator state.
    """
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr_peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = copy.deepcopy(model).requires_grad_(False)
    checkpoint = work / f"{name}.pt"
    first = _restore(checkpoint, model, average, optimizer)
    report = Progress(name, first, recipe)
    saved_at = time.monotonic()
    for step in range(first, recipe.steps):
        # Set the learning rate: a function of the step alone.
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_peak * lr_factor(step, recipe) * group.get("lr_scale", 1.0)

        # Evaluate the loss, clip, and update the weights.
        loss = loss_at(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        # Update their average; early on over a short window, to forget the initialisation.
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

        # Report, and save.
        report.step(step, loss.item())
        if time.monotonic() - saved_at > SECONDS_PER_CHECKPOINT or step + 1 == recipe.steps:
            _save(checkpoint, step + 1, model, average, optimizer)
            saved_at = time.monotonic()
    return average.eval()


def lr_factor(step: int, recipe: Recipe) -> float:
    """Fraction of the peak learning rate: linear warm-up, flat, half a cosine down to 2 %."""
    warmth = min(1.0, (step + 1) / recipe.warmup)
    flat_steps = recipe.flat_until * recipe.steps
    progress = max(0.0, (step - flat_steps) / (recipe.steps - flat_steps))
    return warmth * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Progress:
    """Prints a line now and then: mean loss since the last line, samples per second, time left."""

    def __init__(self, name: str, first: int, recipe: Recipe):
        self.name, self.recipe = name, recipe
        self.losses: list[float] = []
        self.since = time.monotonic()
        print(f"{name}: from step {first} of {recipe.steps}", flush=True)

    def step(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        seconds = time.monotonic() - self.since
        if seconds < SECONDS_PER_REPORT and step + 1 < self.recipe.steps:
            return
        steps_per_second = len(self.losses) / seconds
        minutes_left = (self.recipe.steps - step - 1) / steps_per_second / 60
        print(
            f"{self.name}: step {step + 1}/{self.recipe.steps}  loss {np.mean(self.losses):.4f}"
            f"  {steps_per_second * self.recipe.batch:.1f} samples/s  ETA {minutes_left:.1f} min",
            flush=True,
        )
        self.losses, self.since = [], time.monotonic()


def _save(
    path: Path, step: int, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint under another name first: a kill never leaves half a file."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _restore(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint in place.  -> the step to go on with, 0 without one."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def draw(step: int) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.default_rng((SEED, step))


def picks(step: int, batch: int, number: int) -> list[int]:
    """The samples of one step, when `number` samples are gone through in a new order each time."""
    positions = range(step * batch, (step + 1) * batch)
    orders = {
        k // number: np.random.default_rng((SEED, 1, k // number)).permutation(number)
        for k in positions
    }
    return [int(orders[k // number][k % number]) for k in positions]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


# --- the VAE --------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    """64 x 64 x 3 -> 16 x 16 x 4, 0.68 million parameters."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=MODEL_PIXELS,
        scaling_factor=1.0,
        force_upcast=False,
    )


def train_vae(pixels: Tensor, work: Path) -> AutoencoderKL:
    """pixels (N, 3, 64, 64) in [-1, 1] -> a VAE whose latents suit the UNet.

    Twice. With a KL it learns fast, but the KL's noise drowns weak channels, and for good: one of
    the four came out empty. So then with all four held apart at unit variance, under little noise;
    done so from the start, it learned more slowly.
    """
    vae = make_vae()
    stages = [
        ("vae", loss_with_kl, VAE_RECIPE, 0.0),
        ("vae2", loss_with_covariance, VAE_RECIPE_2, 0.25),
    ]
    for name, loss, recipe, exponent in stages:

        def loss_at(vae: nn.Module, step: int, loss=loss, recipe=recipe) -> Tensor:
            return loss(vae, pixels[picks(step, recipe.batch, len(pixels))], draw(step))

        groups = [{"params": list(vae.requires_grad_(True).parameters())}]
        vae = fit(name, vae, groups, loss_at, recipe, work)
        fold_scale(vae, pixels, exponent)
    return vae


def loss_with_kl(vae: AutoencoderKL, x: Tensor, rng: np.random.Generator) -> Tensor:
    """Reconstruction by value and edges, plus a KL per latent element.  x (B, 3, 64, 64)."""
    x = torch.stack([augment(picture, rng) for picture in x])
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.mean + posterior.std * normal(rng, posterior.mean.shape)).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edge_loss(y, x) + 1e-4 * kl


def loss_with_covariance(vae: AutoencoderKL, x: Tensor, rng: np.random.Generator) -> Tensor:
    """Reconstruction by value, mean colour and edges, from unlike channels.  x (B, 3, 64, 64)."""
    x = torch.stack([augment(picture, rng, recolour=0.25) for picture in x])
    z = vae.encode(x).latent_dist.mean
    y = vae.decode(z + LATENT_NOISE * normal(rng, z.shape)).sample
    values = F.l1_loss(y, x) + F.mse_loss(y, x)
    colours = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
    excess = z.transpose(0, 1).flatten(1).cov() - torch.eye(z.shape[1])
    return values + colours + 0.25 * edge_loss(y, x) + 0.03 * excess.square().sum()


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and of the vertical gradients."""
    return F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))


def augment(x: Tensor, rng: np.random.Generator, *, recolour: float = 0.0) -> Tensor:
    """Mirror half of the pictures, and exchange the colours of a fraction.  x (3, 64, 64).

    The second is for colours that are rare in training: a lime frog came back mustard.
    """
    x = x.flip(-1) if rng.random() < 0.5 else x
    return x[rng.permutation(3)] if recolour and rng.random() < recolour else x


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, pixels: Tensor, exponent: float) -> None:
    """Make the latents z' = A (z - mu), inside the VAE's own 1 x 1 convolutions.

    A rotates to principal axes and gives each the spread worth^exponent, where worth is the squared
    error in pixels that its absence causes; mean square 1 over the channels. 0 whitens, 1/2 would
    be a loss in pixels, 1/4 is between. What the VAE reconstructs stays the same.
    """
    z = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(64)])
    flat = z.transpose(0, 1).flatten(1)  # (4, N * 256)
    mu = flat.mean(dim=1)
    variance, axes = torch.linalg.eigh(flat.cov())
    whiten = axes.T / variance.sqrt()[:, None]

    without_none = mse_without(vae, pixels, z, mu, torch.zeros(4))
    without_each = torch.tensor([mse_without(vae, pixels, z, mu, axes[:, c]) for c in range(4)])
    spread = (without_each - without_none).clamp(min=1e-6) ** exponent
    spread /= spread.square().mean().sqrt()
    A = whiten * spread[:, None]
    print(f"vae: latents rescaled to spreads {', '.join(f'{s:.2f}' for s in spread)}")

    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] = torch.einsum("ij,jkhw->ikhw", A, quant.weight[:4])
    quant.bias[:4] = A @ (quant.bias[:4] - mu)
    quant.weight[4:] = 0  # the encoder's variance, now that of the noise in training
    quant.bias[4:] = (A.square().sum(dim=1) * LATENT_NOISE**2).log()
    post.bias.add_(post.weight[:, :, 0, 0] @ mu)
    post.weight.copy_(torch.einsum("ijhw,jk->ikhw", post.weight, torch.linalg.inv(A)))


def mse_without(vae: AutoencoderKL, pixels: Tensor, z: Tensor, mu: Tensor, axis: Tensor) -> float:
    """Mean squared pixel error when z (N, 4, 16, 16) loses its component along an axis (4,)."""
    along = torch.einsum("nchw,c->nhw", z - mu[:, None, None], axis)
    without = z - along[:, None] * axis[:, None, None]
    errors = [
        F.mse_loss(vae.decode(a).sample, b).item()
        for a, b in zip(without[:256].split(64), pixels[:256].split(64), strict=True)
    ]
    return float(np.mean(errors))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio, dB, from the mean squared error over all pictures."""
    errors = [
        (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square()
        for x in pixels.split(64)
    ]
    return 10 * math.log10(4 / torch.cat(errors).mean().item())


# --- the captions ---------------------------------------------------------------------------------


class Captions:
    """Captions as token ids, over a vocabulary of only the words that occur.

    Of CLIP's 49,408 rows these captions use about 3,000; the rest would be ballast in every step.
    `used` (V,) are the real ids, ascending; a compact id is an index into it, and the end token
    stays the largest.
    """

    def __init__(self, tokenizer: CLIPTokenizer, emoji: list[Emoji]):
        self.tokenizer = tokenizer
        texts = [", ".join([e.label, *e.tags]) for e in emoji]
        padding = {tokenizer.convert_tokens_to_ids("!"), tokenizer.eos_token_id}
        self.used = torch.tensor(sorted(padding.union(*tokenizer(texts).input_ids)))
        self.compact = torch.zeros(len(tokenizer), dtype=torch.long)
        self.compact[self.used] = torch.arange(len(self.used))

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> compact ids (B, 77) per encoder; padding is the end token in one, "!" in the other."""
        batch = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ends = (batch.input_ids == self.tokenizer.eos_token_id).cumsum(dim=1)
        padded_with_0 = batch.input_ids.masked_fill(ends > 1, 0)
        return self.compact[batch.input_ids], self.compact[padded_with_0]


def caption(emoji: Emoji, rng: np.random.Generator) -> str:
    """Mostly the label alone; else with two to four tags, so that single words gain meaning."""
    if rng.random() < 0.6 or len(emoji.tags) < 2:
        return emoji.label
    number = min(int(rng.integers(2, 5)), len(emoji.tags))
    return ", ".join([emoji.label, *rng.choice(emoji.tags, number, replace=False)])


# --- the UNet and its text encoders ---------------------------------------------------------------


class Base(nn.Module):
    """What is trained together: the UNet and its text encoders, these over a compact vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        torch.manual_seed(SEED)
        self.text_encoder = CLIPTextModel(text_config(24, vocabulary))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(32, vocabulary))
        self.unet = make_unet()
        for encoder in (self.text_encoder, self.text_encoder_2):
            loosen(encoder)

    def forward(self, noisy: Tensor, t: Tensor, ids: tuple[Tensor, Tensor], keep: Tensor) -> Tensor:
        """noisy (B, 4, 16, 16), t (B,), ids 2 x (B, 77), keep (B,) -> v (B, 4, 16, 16).

        Where keep is 0, not 1, the caption is dropped: zeros, as the pipeline has it for an empty
        negative prompt.
        """
        first = self.text_encoder(ids[0], output_hidden_states=True)
        second = self.text_encoder_2(ids[1], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        context = context * keep[:, None, None]
        size = float(MODEL_PIXELS)
        conditions = {
            "text_embeds": second.text_embeds * keep[:, None],
            "time_ids": torch.tensor([size, size, 0, 0, size, size]).expand(len(t), 6),
        }
        return self.unet(noisy, t, context, added_cond_kwargs=conditions).sample

    def groups(self) -> list[dict]:
        """For the optimizer: a word's row gets a gradient in few steps, so it takes longer ones."""
        rows, layers = [], []
        for encoder in (self.text_encoder, self.text_encoder_2):
            table = encoder.get_input_embeddings().weight
            rows.append(table)
            layers += [p for p in encoder.parameters() if p is not table]
        return [
            {"params": list(self.unet.parameters())},
            {"params": layers, "lr_scale": 0.5},
            {"params": rows, "lr_scale": 4.0, "weight_decay": 0.0},
        ]


def text_config(hidden_size: int, vocab_size: int) -> CLIPTextConfig:
    """Two layers, as SDXL takes the last but one: the context is layer 1, pooled is after both."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 8,
        max_position_embeddings=77,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def make_unet() -> UNet2DConditionModel:
    """SDXL's UNet with three levels of 32, 64 and 96 channels, 2.74 million parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 6),  # diffusers' name for the number of heads, as in SDXL
        norm_num_groups=16,
        cross_attention_dim=24 + 32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def loosen(encoder: nn.Module) -> None:
    """Make a fresh text encoder worth listening to: CLIP's own rows (std 0.02) hardly differ.

    The end token starts at zero, so that what is pooled there is what attention brings to it.
    """
    table = encoder.get_input_embeddings().weight
    nn.init.normal_(table, std=TOKEN_STD)
    nn.init.zeros_(table[-1])
    for name, weight in encoder.named_parameters():
        if name.endswith(("v_proj.weight", "out_proj.weight")):
            nn.init.orthogonal_(weight)


def make_scheduler() -> DDIMScheduler:
    """SDXL's noise schedule, ending in pure noise (Lin et al. 2024), and sampled from there."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def v_loss(
    base: Base, latents: Tensor, ids: tuple[Tensor, Tensor], keep: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of v = signal * noise - sigma * latents, (B, 4, 16, 16).

    Salimans & Ho 2022, section 4.
    """
    alphas = make_scheduler().alphas_cumprod[t][:, None, None, None]
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    v = base(signal * latents + sigma * noise, t, ids, keep)
    return F.mse_loss(v, signal * noise - sigma * latents)


def train_base(emoji: list[Emoji], latents: Tensor, captions: Captions, work: Path) -> Base:
    """latents (N, 4, 16, 16) of the pictures -> UNet and text encoders that draw from captions."""

    def loss_at(base: nn.Module, step: int) -> Tensor:
        rng = draw(step)
        chosen = picks(step, BASE_RECIPE.batch, len(emoji))
        ids = captions.ids([caption(emoji[i], rng) for i in chosen])
        keep = torch.from_numpy((rng.random(len(chosen)) >= 0.1).astype(np.float32))
        t = stratified_timesteps(len(chosen), rng)
        return v_loss(base, latents[chosen], ids, keep, t, normal(rng, latents[chosen].shape))

    base = Base(len(captions.used))
    return fit("base", base, base.groups(), loss_at, BASE_RECIPE, work)


def newest_base(captions: Captions, work: Path) -> Base:
    """The averaged weights of the latest checkpoint, of a run that need not have ended."""
    base = Base(len(captions.used))
    base.load_state_dict(torch.load(work / "base.pt", weights_only=True)["average"])
    return base.eval()


def stratified_timesteps(number: int, rng: np.random.Generator) -> Tensor:
    """One timestep from each of `number` equal parts of [0, 1000), in any order: less variance."""
    fractions = (rng.permutation(number) + rng.random(number)) / number
    return torch.from_numpy((fractions * 1000).astype(np.int64))


@torch.no_grad()
def eval_loss(
    base: Base, emoji: list[Emoji], latents: Tensor, captions: Captions, number: int = 96
) -> float:
    """The v-loss on fixed points of picture, timestep and noise; the captions are the labels."""
    rng = np.random.default_rng((SEED, 2))
    chosen = [i % len(emoji) for i in rng.permutation(max(number, len(emoji)))[:number]]
    ids = captions.ids([emoji[i].label for i in chosen])
    t = stratified_timesteps(number, rng)
    noise = normal(rng, latents[chosen].shape)
    return v_loss(base, latents[chosen], ids, torch.ones(number), t, noise).item()


# --- the folder -----------------------------------------------------------------------------------


def export(base: Base, vae: AutoencoderKL, captions: Captions, bpe: Bpe, out: Path) -> None:
    """Write a StableDiffusionXLPipeline folder with fp16 weights, in place of an earlier one.

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


def with_whole_vocabulary(compact: nn.Module, captions: Captions) -> nn.Module:
    """A text encoder over all of CLIP's ids, equal to the compact one on the ids in use."""
    tokenizer, config = captions.tokenizer, copy.deepcopy(compact.config)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(SEED)
    table = torch.randn(len(tokenizer), config.hidden_size) * TOKEN_STD
    table[captions.used] = compact.get_input_embeddings().weight.detach()
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


# --- the stages -----------------------------------------------------------------------------------


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
    tokenizer = CLIPTokenizer(vocab=bpe.vocabulary, merges=bpe.merges, model_max_length=77)
    emoji = read_emoji(source)
    usable, held_out = split_held_out(emoji)
    chosen = choose_varied(usable, NUM_PICTURES)
    captions = Captions(tokenizer, emoji)

    # Train the VAE, on all that is not held out.
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(to_pixels(usable), args.work)
    seen, unseen = psnr(vae, to_pixels(usable)), psnr(vae, to_pixels(held_out))
    print(f"vae: PSNR {seen:.2f} dB on {len(usable)} pictures, {unseen:.2f} dB on the held-out")

    # Train the UNet and its text encoders, on the latents of the chosen pictures.
    latents = to_latents(vae, chosen)
    if args.export_only:
        base = newest_base(captions, args.work)
    else:
        base = train_base(chosen, latents, captions, args.work)
    seen = eval_loss(base, chosen, latents, captions)
    unseen = eval_loss(base, held_out, to_latents(vae, held_out), captions)
    print(f"base: v-loss {seen:.4f} on {len(chosen)} pictures, {unseen:.4f} on the held-out")

    # Ship them, and look.
    export(base, vae, captions, bpe, args.out)
    if args.grid:
        draw_grid(args.out, chosen[:: len(chosen) // 48][:48], args.grid)


if __name__ == "__main__":
    main()
