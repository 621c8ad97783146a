"""Losses: each definition against an independent formula; the effect of weights and masks."""

import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import nn

from trainer.config import choices_of
from trainer.objective import losses
from trainer.objective.batches import Batch

V, EPSILON, FLOW = "v_prediction", "epsilon", "flow_prediction"


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(4, 1)
    return Batch(
        latents=torch.zeros(4, 4, 6, 5),
        noisy=torch.randn(4, 4, 6, 5, generator=generator),
        target=torch.randn(4, 4, 6, 5, generator=generator),
        timesteps=torch.tensor([0, 300, 700, 999]),
        time=torch.tensor([0, 300, 700, 999]),
        prompt=nothing,
        pooled=nothing,
        time_ids=nothing,
    )


@pytest.fixture
def prediction():
    return torch.randn(4, 4, 6, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def value(loss_config, make_schedule, batch, prediction):
    """The loss with these options on a changed batch: value({"name": "huber"}, mask=...) -> 0-d."""

    def compute(options, predicts=EPSILON, **changes):
        made = Batch(**(vars(batch) | changes))
        noise_schedule = make_schedule(prediction_type=predicts)
        return losses.loss(loss_config(**options), noise_schedule, prediction, made)

    return compute


def test_the_mean_squared_error_is_torchs_with_its_gradient(
    loss_config, make_schedule, batch, prediction
):
    ours, theirs = (prediction.clone().requires_grad_() for _ in range(2))
    loss = losses.loss(loss_config(), make_schedule(), ours, batch)
    expected = torch.nn.functional.mse_loss(theirs, batch.target)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_losses_agree_where_errors_are_small(value, prediction):
    near, far = prediction + 0.1, prediction + 2
    assert value({}, target=near).item() == pytest.approx(0.01)
    half = value({"name": "huber", "delta": 0.5}, target=near)
    assert half.item() == pytest.approx(0.005)  # half the square below delta
    linear = value({"name": "huber", "delta": 0.5}, target=far)
    assert linear.item() == pytest.approx(0.5 * (2 - 0.25))


@pytest.mark.parametrize("predicts", [EPSILON, V])
@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_weights_by_snr_are_those_of_the_papers(
    value, make_ddpm, batch, prediction, weighting, predicts
):
    """Restated for the squared error of x, where the papers' derivations begin: that of e is SNR
    times it, and that of v SNR + 1 times."""
    ratio = compute_snr(make_ddpm(), batch.timesteps)
    of_x = {"min_snr": ratio.clamp(max=5), "debiased": ratio.sqrt()}[weighting]
    weights = of_x / (ratio if predicts == EPSILON else ratio + 1)
    squares = (prediction - batch.target).square().mean(dim=(1, 2, 3))
    expected = (weights * squares).mean().item()
    found = value({"weighting": weighting}, predicts).item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_epsilon_and_v_have_the_same_weighted_loss_of_the_same_error(
    loss_config, make_schedule, weighting
):
    """Two models imply the same wrong picture, one by predicting e, one by predicting v."""
    config = loss_config(weighting=weighting)
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = (torch.randn(4, 4, 6, 5, generator=generator) for _ in range(3))
    timesteps = torch.tensor([10, 300, 700, 999])
    found = []
    for predicts in (EPSILON, V):
        noise_schedule = make_schedule(prediction_type=predicts)
        a, s = (
            x[timesteps].view(-1, 1, 1, 1) for x in (noise_schedule.signal, noise_schedule.sigma)
        )
        noisy = a * clean + s * noise

        def output(picture, a=a, s=s, noisy=noisy, predicts=predicts):
            implied = (noisy - a * picture) / s
            return implied if predicts == EPSILON else a * implied - s * picture

        batch = Batch(
            latents=clean,
            noisy=noisy,
            target=output(clean),
            timesteps=timesteps,
            time=timesteps,
            prompt=noisy,
            pooled=None,
            time_ids=None,
        )
        found.append(losses.loss(config, noise_schedule, output(wrong), batch).item())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_weights_of_a_flow_are_those_of_the_same_error_of_the_picture(value, batch, prediction):
    """The error of x is sigma times that of e - x; min-SNR weights its square by min(SNR, 5)."""
    sigma = (batch.timesteps + 1) / 1000
    ratio = ((1 - sigma) / sigma).square()
    squares = (prediction - batch.target).square().mean(dim=(1, 2, 3))
    expected = (ratio.clamp(max=5) * sigma.square() * squares).mean().item()
    assert value({"weighting": "min_snr"}, FLOW).item() == pytest.approx(expected, rel=1e-5)


def test_gamma_of_min_snr_is_where_weights_begin_to_fall(loss_config, make_schedule, make_ddpm):
    config = loss_config(weighting="min_snr", gamma=2.0)
    noise_schedule, timesteps = make_schedule(), torch.arange(1000)
    weights = losses.timestep_weights(config, noise_schedule, timesteps)
    is_noisy = compute_snr(make_ddpm(), timesteps) <= 2
    assert (weights[is_noisy] == 1).all()
    assert (weights[~is_noisy] < 1).all()


@pytest.mark.parametrize("predicts", [V, FLOW])
@pytest.mark.parametrize("options", [{}, {"name": "huber", "schedule": "snr"}])
@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased"])
def test_zero_terminal_snr_gives_finite_losses_and_gradients(
    loss_config, make_schedule, batch, prediction, options, weighting, predicts
):
    noise_schedule = make_schedule(prediction_type=predicts, rescale_betas_zero_snr=True)
    config = loss_config(**options, weighting=weighting)
    prediction.requires_grad_()
    loss = losses.loss(config, noise_schedule, prediction, batch)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_delta_goes_from_one_without_noise_to_delta_in_noise(
    loss_config, make_schedule, make_ddpm, schedule
):
    config = loss_config("huber", schedule=schedule, delta=0.1)
    timesteps = torch.arange(1000)
    deltas = losses.huber_deltas(config, make_schedule(), timesteps)
    if schedule == "exponential":
        expected = torch.tensor([0.1 ** (t / 1000) for t in range(1000)])
    else:
        sigma = compute_snr(make_ddpm(), timesteps).rsqrt()
        expected = 0.9 / (1 + sigma) ** 2 + 0.1
    assert torch.allclose(deltas, expected, rtol=1e-4)
    assert (deltas.diff() < 0).all()
    zero = make_schedule(prediction_type=V, rescale_betas_zero_snr=True)
    assert losses.huber_deltas(config, zero, timesteps)[-1].item() == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_a_scheduled_huber_is_torchs_with_each_samples_delta(
    value, loss_config, make_schedule, batch, prediction, schedule
):
    options = {"name": "huber", "schedule": schedule, "delta": 0.2}
    deltas = losses.huber_deltas(loss_config(**options), make_schedule(), batch.timesteps)
    each = [
        torch.nn.functional.huber_loss(prediction[i], batch.target[i], delta=deltas[i].item())
        for i in range(4)
    ]
    assert value(options).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


LOSSES = [
    *({"name": name} for name in choices_of("loss")),
    {"name": "huber", "schedule": "snr"},
    {"weighting": "min_snr"},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_ones_are_no_weights_and_no_mask(value, options):
    ones = value(options, loss_weights=torch.ones(4), mask=torch.ones(4, 1, 6, 5))
    assert torch.equal(ones, value(options))


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_the_loss_is_the_mean_over_elements_of_factor_times_distance(value, options):
    """Weights and masks are not divided by their sums: the loss is linear in both."""
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0])
    alone = [value(options, loss_weights=torch.eye(4)[i]) for i in range(4)]
    assert value(options).item() == pytest.approx(sum(alone).item(), rel=1e-5)
    weighted = sum(w * x for w, x in zip(weights, alone, strict=True))
    found = value(options, loss_weights=weights)
    assert found.item() == pytest.approx(weighted.item(), rel=1e-5)
    mask = (torch.rand(4, 1, 6, 5, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    inside, outside = value(options, mask=mask), value(options, mask=1 - mask)
    assert (inside + outside).item() == pytest.approx(value(options).item(), rel=1e-5)
    lifted = value(options | {"unmasked_weight": 0.25}, mask=mask)
    assert lifted.item() == pytest.approx((inside + 0.25 * outside).item(), rel=1e-5)


def test_where_the_mask_is_zero_there_is_no_gradient(loss_config, make_schedule, batch, prediction):
    batch.mask = torch.zeros(4, 1, 6, 5)
    batch.mask[..., :3, :] = 1
    prediction.requires_grad_()
    losses.loss(loss_config(), make_schedule(), prediction, batch).backward()
    assert (prediction.grad[..., 3:, :] == 0).all()
    assert (prediction.grad[..., :3, :] != 0).all()


def test_micro_batches_of_one_size_average_to_the_loss_of_the_whole(value, batch, prediction):
    rows = torch.arange(4)
    weights = [value({}, loss_weights=2.0 * (rows // 2 == half)) for half in (0, 1)]
    assert value({}).item() == pytest.approx(sum(weights).item() / 2, rel=1e-6)


class Off(nn.Module):
    """Predicts the known target plus a constant that depends on the timestep."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, batches):
        super().__init__()
        self.known = iter(batches)

    def forward(self, noisy, timesteps, **conditions):
        batch = next(self.known)
        wrong = (1 + timesteps // 250).view(-1, 1, 1, 1)
        return type("Output", (), {"sample": batch.target + wrong})()


def test_evaluation_is_the_plain_squared_error_whole_and_by_quarters(make_schedule, batch):
    weighted = Batch(
        **(vars(batch) | {"loss_weights": torch.zeros(4), "mask": torch.zeros(4, 1, 6, 5)})
    )
    short = Batch(
        **(
            vars(batch)
            | {
                "noisy": batch.noisy[:1],
                "target": batch.target[:1],
                "timesteps": torch.tensor([249]),
                "time": torch.tensor([249]),
            }
        )
    )
    found = losses.evaluate(Off([weighted, short]), make_schedule(), [weighted, short])
    # The errors at timesteps 0, 300, 700, 999 and 249 are 1, 2, 3, 4 and 1.
    assert found == pytest.approx(
        {
            "loss": (1 + 4 + 9 + 16 + 1) / 5,
            "loss_t000_250": 1,
            "loss_t250_500": 4,
            "loss_t500_750": 9,
            "loss_t750_1000": 16,
        }
    )
    found = losses.evaluate(Off([short]), make_schedule(), [short])
    assert found.keys() == {"loss", "loss_t000_250"}
