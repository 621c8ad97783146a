"""Training batches: functions of (seed, step, sample), with the targets the literature defines."""

import pytest
import torch
from diffusers import DDPMScheduler

from trainer.batches import Inputs, eval_batches, noised
from trainer.losses import loss
from trainer.schedule import lr_scale


@pytest.fixture
def data():
    """The inputs of five samples."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(5, 3, 8, generator=generator)
    return Inputs(
        latents=torch.randn(5, 4, 8, 8, generator=generator),
        prompt=prompt,
        pooled=prompt[:, 0].clone(),
        time_ids=torch.ones(5, 6),
    )


def of(data, rows):
    return Inputs(**{name: x if x is None else x[list(rows)] for name, x in vars(data).items()})


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
        return noised(of(data, indices), schedule, seed, step)

    torch.manual_seed(1)
    first = batch()
    torch.manual_seed(2)  # the global generator has no say
    again = batch()
    for name, value in vars(first).items():
        assert value is getattr(again, name) or torch.equal(value, getattr(again, name)), name
    assert not torch.equal(first.noisy, batch(step=4).noisy)
    assert not torch.equal(first.noisy, batch(seed=1).noisy)


def test_v_target_and_noisy_latent_follow_salimans_and_ho(data, schedule):
    """Salimans & Ho 2022, app. D: x_t = a x + s e, v = a e - s x; so x = a x_t - s v."""
    batch = noised(of(data, range(4)), schedule, 0, 0)
    a = schedule.alphas_cumprod[batch.timesteps].sqrt().view(-1, 1, 1, 1)
    s = (1 - schedule.alphas_cumprod[batch.timesteps]).sqrt().view(-1, 1, 1, 1)
    restored = a * batch.noisy - s * batch.target
    assert torch.allclose(restored, data.latents[:4], atol=1e-4)


def test_timesteps_are_stratified_and_uniform(data, schedule):
    size = 8
    drawn = torch.stack(
        [noised(of(data, [0] * size), schedule, 0, t).timesteps for t in range(300)]
    )
    strata = torch.arange(size) * 1000 // size
    assert ((drawn >= strata) & (drawn < strata + 1000 // size)).all()
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=8)


def test_eval_points_are_fixed_and_cover_samples_and_timesteps(data, schedule):
    def points():
        batches = eval_batches(range(5), lambda rows: of(data, rows), schedule, 50, 16)
        return torch.cat([b.timesteps for b in batches]), torch.cat([b.noisy for b in batches])

    timesteps, noisy = points()
    assert torch.equal(noisy, points()[1])
    assert len(timesteps) == 50
    per_fifth = torch.histc(timesteps.float(), bins=5, min=0, max=1000)
    assert per_fifth.min() >= 9


def test_eval_points_of_two_sizes_are_those_of_one_in_other_batches(data, schedule):
    def points(**sizes):
        made = eval_batches([4, 0, 2], lambda rows: of(data, rows), schedule, 7, 2, **sizes)
        noisy = torch.cat([b.noisy for b in made])
        return [len(b.noisy) for b in made], noisy[torch.cat([b.timesteps for b in made]).argsort()]

    sizes, noisy = points(size_of=lambda row: row > 3)
    assert sizes == [2, 1, 2, 2]  # points 0, 3 and 6 are sample 4's
    assert torch.equal(noisy, points()[1])


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
