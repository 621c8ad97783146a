"""Training batches: functions of (seed, step, sample), with the targets the literature defines."""

import pytest
import torch
from diffusers import DDPMScheduler

from trainer.batches import eval_batches, training_batch
from trainer.conditioning import Encoded
from trainer.losses import loss
from trainer.schedule import lr_scale
from trainer.text import Text


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(5, 3, 8, generator=generator)

    def read(captions):
        rows = [torch.zeros(3, 8) if c is None else prompt[int(c)] for c in captions]
        return Text(prompt=torch.stack(rows), pooled=torch.stack(rows)[:, 0])

    return Encoded(
        latents=torch.randn(5, 4, 8, 8, generator=generator),
        captions=["0", "1", "2", "3", "4"],
        time_ids=torch.ones(5, 6),
        read=read,
    )


@pytest.fixture
def schedule():
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )


def test_batches_repeat_for_their_counters_and_differ_for_others(data, schedule):
    def batch(seed=0, step=3, indices=(0, 1, 2)):
        return training_batch(data, schedule, list(indices), 0.1, seed, step)

    torch.manual_seed(1)
    first = batch()
    torch.manual_seed(2)  # the global generator has no say
    again = batch()
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    assert not torch.equal(first.noisy, batch(step=4).noisy)
    assert not torch.equal(first.noisy, batch(seed=1).noisy)


def test_v_target_and_noisy_latent_follow_salimans_and_ho(data, schedule):
    """Salimans & Ho 2022, app. D: x_t = a x + s e, v = a e - s x; so x = a x_t - s v."""
    batch = training_batch(data, schedule, [0, 1, 2, 3], 0.0, 0, 0)
    a = schedule.alphas_cumprod[batch.timesteps].sqrt().view(-1, 1, 1, 1)
    s = (1 - schedule.alphas_cumprod[batch.timesteps]).sqrt().view(-1, 1, 1, 1)
    restored = a * batch.noisy - s * batch.target
    assert torch.allclose(restored, data.latents[:4], atol=1e-4)


def test_timesteps_are_stratified_and_uniform(data, schedule):
    size = 8
    drawn = torch.stack(
        [training_batch(data, schedule, [0] * size, 0.0, 0, t).timesteps for t in range(300)]
    )
    strata = torch.arange(size) * 1000 // size
    assert ((drawn >= strata) & (drawn < strata + 1000 // size)).all()
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=8)


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_dropped_captions_are_the_empty_prompt(data, schedule, dropout):
    dropped = torch.cat(
        [
            (training_batch(data, schedule, [0, 1, 2, 3], dropout, 0, t).prompt == 0).all((1, 2))
            for t in range(300)
        ]
    )
    assert dropped.float().mean().item() == pytest.approx(dropout, abs=0.04)


def test_eval_points_are_fixed_and_cover_samples_and_timesteps(data, schedule):
    def points():
        batches = eval_batches(data, schedule, 50, 16)
        return torch.cat([b.timesteps for b in batches]), torch.cat([b.noisy for b in batches])

    timesteps, noisy = points()
    assert torch.equal(noisy, points()[1])
    assert len(timesteps) == 50
    per_fifth = torch.histc(timesteps.float(), bins=5, min=0, max=1000)
    assert per_fifth.min() >= 9


def test_losses_agree_where_errors_are_small(composed):
    prediction, target = torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 0.1)
    mse = loss(composed("loss=mse").loss, prediction, target)
    huber = loss(composed("loss=huber", "loss.delta=0.5").loss, prediction, target)
    assert mse.item() == pytest.approx(0.01)
    assert huber.item() == pytest.approx(0.005)  # half a square below delta
    far = loss(composed("loss=huber", "loss.delta=0.5").loss, prediction, target * 20)
    assert far.item() == pytest.approx(0.5 * (2 - 0.25))


@pytest.mark.parametrize(
    ("choice", "step", "scale"),
    [
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 99, 1.0),
        ("linear", 49, 1.0),
        ("linear", 99, 0.1),
        ("linear", 74, 0.1 + 0.9 * (1 - 24 / 49)),
        ("cosine", 50, 1.0),
        ("cosine", 99, 0.1),
    ],
)
def test_learning_rate_warms_up_holds_and_decays(composed, choice, step, scale):
    decay = [] if choice == "constant" else ["schedule.hold=0.5", "schedule.final_scale=0.1"]
    made = composed(
        f"schedule={choice}", "schedule.steps=100", "schedule.warmup_steps=1", *decay
    ).schedule
    assert lr_scale(made, step) == pytest.approx(scale)
