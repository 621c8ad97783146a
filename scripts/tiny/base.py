"""The base model: an SDXL UNet and its two text encoders in miniature, trained together."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
)

from tiny.captions import Captions, caption
from tiny.fit import SEED, Recipe, draw, fit, normal, picks
from tiny.noto import MODEL_PIXELS, Emoji

TOKEN_STD = 0.7  # of a word's row before training


# --- the networks ---------------------------------------------------------------------------------


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
            table = encoder.get_input_embeddings().get_parameter("weight")
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


def loosen(encoder: PreTrainedModel) -> None:
    """Make a fresh text encoder worth listening to: CLIP's own rows (std 0.02) hardly differ.

    The end token starts at zero, so that what is pooled there is what attention brings to it.
    """
    table = encoder.get_input_embeddings().get_parameter("weight")
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


# --- their training -------------------------------------------------------------------------------


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


def train_base(
    emoji: list[Emoji], latents: Tensor, captions: Captions, recipe: Recipe, work: Path
) -> Base:
    """latents (N, 4, 16, 16) of the pictures -> UNet and text encoders that draw from captions."""

    def loss_at(base: Base, step: int) -> Tensor:
        rng = draw(step)
        chosen = picks(step, recipe.batch, len(emoji))
        ids = captions.ids([caption(emoji[i], rng) for i in chosen])
        keep = torch.from_numpy((rng.random(len(chosen)) >= 0.1).astype(np.float32))
        t = stratified_timesteps(len(chosen), rng)
        return v_loss(base, latents[chosen], ids, keep, t, normal(rng, latents[chosen].shape))

    base = Base(len(captions.used))
    return fit("base", base, base.groups(), loss_at, recipe, work)


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
