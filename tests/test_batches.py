"""Batches: functions of (seed, number, place), with the targets defined in the literature."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from trainer.data import Dataset, Entries, Pick
from trainer.models.text import Text
from trainer.objective.batches import Inputs, eval_batches, noised, predict, sample_noise
from trainer.objective.encoding import Encoded, scaled, unscaled


@pytest.fixture
def data():
    """Five samples with their numbers as captions."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(6, 3, 8, generator=generator)
    prompt[-1] = 0

    def read(captions):
        rows = prompt[[-1 if caption is None else int(caption) for caption in captions]]
        return Text(prompt=rows, pooled=rows[:, 0])

    latents = torch.randn(5, 4, 8, 8, generator=generator)
    samples = [
        SimpleNamespace(caption=str(i), captions=(str(i),), time_ids=(1,) * 6, loss_weight=1.0)
        for i in range(5)
    ]
    return Encoded(
        dataset=Dataset(
            samples=samples, views={}, plan=None, config=SimpleNamespace(caption_dropout=0.0)
        ),
        latents=Entries(
            keys={i: str(i) for i in range(5)},
            memory={str(i): {"latent": latent} for i, latent in enumerate(latents)},
        ),
        masks=None,
        read=read,
    )


def gathered(data, rows, dropout, seed, number):
    """The inputs of batch `number` if it consists of these samples."""
    data.dataset.config.caption_dropout = dropout
    captions = [data.dataset.caption(r, seed, number, place) for place, r in enumerate(rows)]
    return data.gather(
        [Pick(sample=r, caption=caption) for r, caption in zip(rows, captions, strict=True)]
    )


@pytest.fixture
def training_batch(data, v_schedule, noise_config):
    def make(indices=(0, 1, 2), dropout=0.1, seed=0, number=3):
        inputs = gathered(data, list(indices), dropout, seed, number)
        return noised(inputs, v_schedule, noise_config(), seed, number)

    return make


def test_batches_repeat_for_their_counters_and_differ_for_others(training_batch):
    torch.manual_seed(1)
    first = training_batch()
    torch.manual_seed(2)  # the global generator has no effect
    again = training_batch()
    for name in ("noisy", "target", "timesteps", "prompt", "pooled", "time_ids"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert not torch.equal(first.noisy, training_batch(number=4).noisy)
    assert not torch.equal(first.noisy, training_batch(seed=1).noisy)


def test_default_batches_and_eval_points_are_those_of_the_first_release(
    data, v_schedule, training_batch
):
    """The same bits as in version 0.1, so that runs remain comparable with that version's."""

    def digest(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]

    batch = training_batch((3, 1, 4), dropout=0.5, seed=7, number=11)
    assert batch.timesteps.tolist() == [92, 638, 673]
    assert digest(batch.prompt) == "946930e401b17d36"
    noise = sample_noise(data.latents[0]["latent"], range(2))
    assert digest(noise) == "cb4d9c46196fbcb8"
    expected = torch.tensor([0.35303795, -0.77099437, -0.24690765])
    assert torch.allclose(batch.target.flatten()[:3], expected, atol=1e-6)
    expected = torch.tensor([0.06566241, 1.20923758, 2.34197640])
    assert torch.allclose(batch.noisy.flatten()[:3], expected, atol=1e-6)
    gather = lambda rows: gathered(data, rows, 0.0, 0, 0)  # noqa: E731
    points = list(eval_batches(range(5), gather, v_schedule, 7, 3))
    assert [b.timesteps.tolist() for b in points] == [[309, 927, 545], [163, 781, 399], [17]]
    expected = torch.tensor([-0.25871280, -0.23751730, 0.24907050])
    assert torch.allclose(points[0].noisy.flatten()[:3], expected, atol=1e-6)


def test_v_target_and_noisy_latent_follow_salimans_and_ho(data, make_ddpm, training_batch):
    """Salimans & Ho 2022, app. D: x_t = a x + s e, v = a e - s x; so x = a x_t - s v."""
    batch = training_batch((0, 1, 2, 3))
    squares = make_ddpm(rescale_betas_zero_snr=True).alphas_cumprod[batch.timesteps]
    a, s = (x.sqrt().view(-1, 1, 1, 1) for x in (squares, 1 - squares))
    restored = a * batch.noisy - s * batch.target
    latents = torch.stack([data.latents[i]["latent"] for i in range(4)])
    assert torch.allclose(restored, latents, atol=1e-4)


def test_a_samples_noise_does_not_depend_on_its_neighbours(data, v_schedule, noise_config):
    kinds = noise_config(offset=0.1, pyramid=0.5, input_perturbation=0.1)
    inputs = gathered(data, [0, 1, 2, 3], 0.0, 0, 3)
    alone = gathered(data, [0], 0.0, 0, 3)
    together = noised(inputs, v_schedule, kinds, 0, 3)
    timestep = together.timesteps[0].item()  # a batch of one draws from the whole range
    kinds.timestep_low, kinds.timestep_high = timestep, timestep + 1
    single = noised(alone, v_schedule, kinds, 0, 3)
    assert torch.equal(single.noisy, together.noisy[:1])
    assert torch.equal(single.target, together.target[:1])


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_dropped_captions_are_the_empty_prompt(training_batch, dropout):
    dropped = torch.cat(
        [
            (training_batch((0, 1, 2, 3), dropout, number=t).prompt == 0).all((1, 2))
            for t in range(300)
        ]
    )
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.04)


def test_weights_masks_and_half_precision_latents_pass_through_in_fp32(v_schedule, noise_config):
    weights, mask = torch.tensor([1.0, 0.3]), torch.rand(2, 1, 8, 8)
    inputs = Inputs(
        latents=torch.randn(2, 4, 8, 8).half(),
        prompt=torch.zeros(2, 3, 8),
        pooled=None,
        time_ids=None,
        loss_weights=weights,
        mask=mask,
    )
    batch = noised(inputs, v_schedule, noise_config(), 0, 0)
    assert batch.loss_weights is weights
    assert batch.mask is mask
    assert batch.noisy.dtype == batch.target.dtype == torch.float32


def test_eval_points_are_fixed_and_cover_rows_and_timesteps(data, v_schedule):
    def points():
        gather = lambda rows: gathered(data, rows, 0.0, 0, 0)  # noqa: E731
        batches = list(eval_batches(range(5), gather, v_schedule, 50, 16))
        return torch.cat([b.timesteps for b in batches]), torch.cat([b.noisy for b in batches])

    timesteps, noisy = points()
    assert torch.equal(noisy, points()[1])
    assert len(timesteps) == 50
    per_fifth = torch.histc(timesteps.float(), bins=5, min=0, max=1000)
    assert per_fifth.min() >= 9


def test_eval_points_use_only_their_rows_and_put_one_size_in_a_batch(data, v_schedule):
    """Rows 1, 3 and 4; row 3 differs in size."""
    asked = []

    def gather(rows):
        asked.append(rows)
        return gathered(data, rows, 0.0, 0, 0)

    sizes = lambda row: row == 3  # noqa: E731
    batches = list(eval_batches([1, 3, 4], gather, v_schedule, 9, 4, sizes))
    assert asked == [[1, 4, 1, 4], [1, 4], [3, 3, 3]]
    (in_order,) = eval_batches([1, 3, 4], gather, v_schedule, 9, 9)
    assert torch.equal(batches[2].noisy, in_order.noisy[1::3])
    assert torch.equal(batches[2].timesteps, in_order.timesteps[1::3])


def test_a_unet_without_pooled_prompt_and_sizes_is_predicted_by(v_schedule, noise_config):
    """The layout of SD 1.5's UNet: cross attention to the prompt only."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    prompt = torch.randn(2, 3, 8)
    inputs = Inputs(latents=torch.randn(2, 4, 8, 8), prompt=prompt, pooled=None, time_ids=None)
    batch = noised(inputs, v_schedule, noise_config(), 0, 0)
    expected = unet(batch.noisy, batch.timesteps, encoder_hidden_states=prompt).sample
    assert torch.equal(predict(unet, batch), expected)


def test_a_unet_with_pooled_prompt_and_sizes_gets_them_in_its_dtype(training_batch):
    class Unet(nn.Module):
        device, dtype = torch.device("cpu"), torch.bfloat16

        def forward(self, noisy, timesteps, encoder_hidden_states, added_cond_kwargs):
            self.added = added_cond_kwargs
            return SimpleNamespace(sample=noisy)

    unet, batch = Unet(), training_batch()
    assert predict(unet, batch).dtype == torch.float32
    assert torch.equal(unet.added["text_embeds"], batch.pooled.bfloat16())
    assert torch.equal(unet.added["time_ids"], batch.time_ids)  # sizes beyond 256 need fp32


def test_latents_are_normalized_by_the_statistics_of_a_vae_as_diffusers_does():
    """By mean and std or by neither, as StableDiffusionXLImg2ImgPipeline encodes and decodes."""
    small = {"block_out_channels": (8,), "norm_num_groups": 1, "scaling_factor": 0.5}
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, -0.2, 0.3, 1.0], [2.0, 4.0, 0.5, 1.0]
    vae = AutoencoderKL(**small, latents_mean=mean, latents_std=std)
    shift, deviation = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    assert torch.allclose(scaled(vae, latents), (latents - shift) * 0.5 / deviation)
    assert torch.allclose(unscaled(vae, latents), latents * deviation / 0.5 + shift)
    for plain in (AutoencoderKL(**small), AutoencoderKL(**small, latents_mean=mean)):
        assert torch.equal(scaled(plain, latents), latents * 0.5)
        assert torch.equal(unscaled(plain, latents), latents / 0.5)
