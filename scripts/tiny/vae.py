"""The VAE: 64-pixel pictures to latents of 16 x 16 x 4 and back."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tiny.fit import SEED, Recipe, draw, fit, normal, picks
from tiny.noto import MODEL_PIXELS, Emoji, model_pixels

Loss = Callable[[AutoencoderKL, Tensor, np.random.Generator], Tensor]

LATENT_NOISE = 0.05  # standard deviation, of latents with 1


def to_pixels(emoji: list[Emoji]) -> Tensor:
    """-> (N, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([model_pixels(e.picture) for e in emoji]))


@torch.no_grad()
def to_latents(vae: AutoencoderKL, emoji: list[Emoji]) -> Tensor:
    """-> (N, 4, 16, 16), mean square about 1."""
    return torch.cat([vae.encode(x).latent_dist.mean for x in to_pixels(emoji).split(64)])


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


def train_vae(pixels: Tensor, recipes: tuple[Recipe, Recipe], work: Path) -> AutoencoderKL:
    """pixels (N, 3, 64, 64) in [-1, 1] -> a VAE whose latents suit the UNet.

    Twice. With a KL it learns fast, but the KL's noise drowns weak channels, and for good: one of
    the four came out empty. So then with all four held apart at unit variance, under little noise;
    done so from the start, it learned more slowly.
    """
    vae = make_vae()
    stages = [
        ("vae", loss_with_kl, recipes[0], 0.0),
        ("vae2", loss_with_covariance, recipes[1], 0.25),
    ]
    for name, loss, recipe, exponent in stages:

        def loss_at(
            vae: AutoencoderKL, step: int, loss: Loss = loss, recipe: Recipe = recipe
        ) -> Tensor:
            return loss(vae, pixels[picks(step, recipe.batch, len(pixels))], draw(step))

        groups = [{"params": list(vae.requires_grad_(True).parameters())}]
        vae = fit(name, vae, groups, loss_at, recipe, work)
        fold_scale(vae, pixels, exponent)
    return vae


# --- the losses -----------------------------------------------------------------------------------


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


# --- the scale of the latents ---------------------------------------------------------------------


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
