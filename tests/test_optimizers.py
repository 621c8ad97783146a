"""The arithmetic of every optimizer: against third parties, and at the edges."""

import math

import adv_optm
import pytest
import pytorch_optimizer
import torch
from helpers import SHAPES, make_params, run, set_grads
from torch.nn import Parameter

import optim
from optim.codecs import split

NAMES = sorted(optim.FAMILY)


THIRD_PARTIES = {
    # name: (ours, theirs, shapes, steps to skip in theirs)
    "sgd": (
        {"lr": 0.1, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "sgd nesterov": (
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": (
        {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "lion": (
        {"lr": 1e-2, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.Lion(p, lr=1e-2, weight_decay=0.1, weight_decouple=True),
    ),
    "ademamix": (
        {"lr": 1e-2, "alpha": 3.0, "warmup_steps": 40, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.AdEMAMix(
            p,
            lr=1e-2,
            betas=(0.9, 0.999, 0.9999),
            alpha=3.0,
            t_alpha_beta3=40,
            weight_decay=0.1,
            weight_decouple=True,
        ),
    ),
    "adamw grams": (
        {"lr": 1e-2, "grams": True, "weight_decay": 0.0},
        lambda p: pytorch_optimizer.Grams(p, lr=1e-2, weight_decay=0.0),
    ),
    "adafactor": (
        {
            "lr": 1e-2,
            "beta2": None,
            "relative_step": True,
            "scale_parameter": True,
            "weight_decay": 0.1,
        },
        # torch decays by the unscaled lr, as this family does
        lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(None, 1e-3), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("case", THIRD_PARTIES)
def test_fp32_trajectory_equals_the_third_party(case):
    options, make_other = THIRD_PARTIES[case]
    shapes = [(24, 16), (24,)]  # torch factors convolutions differently
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(case.split()[0], ours, **options), ours, range(60))
    run(make_other(theirs), theirs, range(60))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 2e-5 * (b - start).norm()


def test_adopt_factored_equals_dense_adopt_where_moments_have_rank_one():
    shapes = [(24, 16)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizer = optim.build("adopt_factored", ours, **options)
    state = [torch.zeros(24, 16), torch.zeros(24, 16)]
    row, col = torch.rand(24, 1) + 0.5, torch.rand(1, 16) + 0.5
    for t in range(30):
        g = row * col * math.cos(t + 1)
        ours[0].grad = g.clone()
        optimizer.step()
        # Taniguchi et al. 2024, Alg. 2, written out
        if t == 0:
            state[1] = g.square()
            continue
        n = (g / state[1].sqrt().clamp_min(1e-6)).clamp(-(t**0.25), t**0.25)
        state[0] = 0.9 * state[0] + 0.1 * n
        theirs[0].data -= 1e-2 * state[0]
        state[1] = 0.99 * state[1] + 0.01 * g.square()
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("adopt_factored", adv_optm.Adopt_adv),
        ("adamw_factored", adv_optm.AdamW_adv),
        ("lion_factored", adv_optm.Lion_adv),
    ],
)
def test_factored_moments_follow_the_smmf_cycle_of_adv_optm(name, peer):
    shapes = [(24, 16), (16, 3, 3, 3)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(name, ours, lr=1e-2, weight_decay=0.0), ours, range(40))
    run(peer(theirs, lr=1e-2, weight_decay=0.0, nnmf_factor=True), theirs, range(40))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 1e-3 * (b - start).norm()


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_the_first_adafactor_step_is_as_long_as_lr(beta1):
    for name in ("adafactor", "adafactor8bit"):
        params = make_params(shapes=[(64, 64)])
        start = params[0].detach().clone()
        optimizer = optim.build(name, params, lr=0.01, beta1=beta1, clip_threshold=None)
        run(optimizer, params, range(1))
        assert (params[0] - start).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_clip_threshold_bounds_the_rms_of_an_update():
    params = make_params(shapes=[(32, 32)])
    optimizer = optim.build("adafactor", params, lr=1.0, clip_threshold=0.25)
    run(optimizer, params, range(1))
    moved = params[0] - make_params(shapes=[(32, 32)])[0]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-4)


def test_eight_bit_state_follows_a_tenfold_drop_of_the_gradients():
    """Nearest rounding would leave the stored moment 6x too large for ever."""
    steps, moments = 6000, {}
    scale = torch.ones(64, 128)
    for name in ("adafactor", "adafactor8bit"):
        scale[:32] = 1.0
        param = Parameter(torch.zeros(64, 128))
        optimizer = optim.build(name, [param])
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if step == 1000:
                scale[:32] = 0.1
            param.grad = torch.randn(64, 128, generator=generator) * scale
            optimizer.step()
        codec = optimizer.codecs(param, optimizer.param_groups[0])["exp_avg_sq"]
        moments[name] = codec.decode(split(optimizer.state[param], "exp_avg_sq"))
    ratio = moments["adafactor8bit"] / moments["adafactor"]
    assert ratio[:32].mean().item() == pytest.approx(1, abs=0.1)
    assert ratio[32:].mean().item() == pytest.approx(1, abs=0.1)


def test_a_factored_element_without_gradients_does_not_drift():
    params = make_params(shapes=[(16, 16)])
    start = params[0].detach().clone()
    optimizer = optim.build("adopt_factored", params, weight_decay=0.0)
    for step in range(20):
        set_grads(params, step)
        params[0].grad[3, 5] = 0
        optimizer.step()
    assert params[0][3, 5] == start[3, 5]
    assert (params[0] != start).sum() == 255


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name):
    params = [Parameter(torch.full(shape, 1.0)) for shape in SHAPES]
    optimizer = optim.build(name, params, lr=0.01)

    def loss():
        return sum((p * p).sum() for p in params)

    first = loss().item()
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * first


def test_the_rounding_depends_on_the_seed_and_on_nothing_else():
    runs = []
    for seed in (0, 0, 1):
        params = make_params(torch.bfloat16, [(64, 64)])
        run(optim.build("adafactor8bit", params, seed=seed), params, range(3))
        runs.append(params[0].detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stochastic_rounding_lets_bf16_weights_take_steps_smaller_than_their_spacing():
    moved = {}
    for rounding in ("stochastic", "kahan", "nearest"):
        param = Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = optim.build("sgd", [param], lr=1.0, momentum=0.0, rounding=rounding)
        for _ in range(20):
            param.grad = torch.full_like(param, 2.0**-12)  # a thirty-second of the spacing below 1
            optimizer.step()
        moved[rounding] = 1 - param.float().mean().item()
    assert moved["stochastic"] == pytest.approx(20 * 2.0**-12, rel=0.1)
    assert moved["kahan"] == pytest.approx(20 * 2.0**-12, abs=2.0**-8)
    assert moved["nearest"] == 0


def test_channels_last_and_non_contiguous_weights_are_updated_like_contiguous_ones():
    plain = make_params(shapes=[(16, 8, 3, 3)])
    for layout in (
        plain[0].detach().clone().to(memory_format=torch.channels_last),
        plain[0].detach().clone().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    ):
        twin, other = [Parameter(plain[0].detach().clone())], [Parameter(layout)]
        for params in (twin, other):
            run(optim.build("adafactor8bit", params), params, range(3))
        assert torch.equal(twin[0], other[0])


def test_a_learning_rate_scheduler_and_a_tensor_lr_drive_the_step():
    by_scheduler, by_hand = make_params(), make_params()
    optimizer = optim.build("adamw", by_scheduler, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other = optim.build("adamw", by_hand, lr=torch.tensor(0.1))
    for step in range(3):
        run(optimizer, by_scheduler, [step])
        scheduler.step()
        run(other, by_hand, [step])
        other.param_groups[0]["lr"] = other.param_groups[0]["lr"] * 0.5
    for a, b in zip(by_scheduler, by_hand, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
