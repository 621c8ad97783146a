"""Edge cases of every optimizer's arithmetic; `test_parity.py` has the ordinary ones."""

import math

import pytest
import torch
from helpers import SHAPES, build, make_params, run, set_grads
from torch.nn import Parameter

import optim
from optim.codecs import split

NAMES = sorted(optim.FAMILY)


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
        # Taniguchi et al. 2024, Alg. 2
        if t == 0:
            state[1] = g.square()
            continue
        n = (g / state[1].sqrt().clamp_min(1e-6)).clamp(-(t**0.25), t**0.25)
        state[0] = 0.9 * state[0] + 0.1 * n
        theirs[0].data -= 1e-2 * state[0]
        state[1] = 0.99 * state[1] + 0.01 * g.square()
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_the_first_adafactor_step_is_as_long_as_lr(beta1):
    for name in ("adafactor", "adafactor8bit"):
        params = make_params(shapes=[(64, 64)])
        start = params[0].detach().clone()
        optimizer = optim.build(name, params, lr=0.01, beta1=beta1, clip_threshold=None)
        run(optimizer, params, range(1))
        assert (params[0] - start).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_cames_first_update_is_eleven_lr_in_a_matrix_and_a_tenth_in_a_vector():
    """Luo et al. 2023, Alg. 2, has no bias correction: (1 - b1) / (b1 sqrt(1 - b3)), and 1 - b1."""
    shapes = [(64, 64), (4096,)]
    params = make_params(shapes=shapes)
    optimizer = optim.build("came", params, lr=0.01, growth_limit=1.01)
    run(optimizer, params, range(1))
    for p, start, size in zip(params, make_params(shapes=shapes), (0.111, 0.001), strict=True):
        assert (p - start).square().mean().sqrt().item() == pytest.approx(size, rel=0.1)
        limited = optimizer.state[p]["update_norm"].item()  # the limit applies to the whole update
        assert limited == pytest.approx((p - start).norm().item() / 0.01, rel=1e-4)


def test_came_divides_by_the_factors_of_its_instability():
    """Luo et al. 2023, Alg. 2, over two steps, with eps added where the means are used."""
    params, eps = make_params(shapes=[(6, 4, 2, 1)]), (0.1, 0.05)
    w = params[0].detach().reshape(6, 8).clone()
    optimizer = optim.build("came", params, lr=0.01, eps=eps, betas=(0.8, 0.9, 0.95))
    v, m, s = torch.zeros(6, 8), torch.zeros(6, 8), torch.zeros(6, 8)

    def factored(x, eps):
        row, col = x.mean(1) + eps, x.mean(0) + eps
        return torch.outer(row, col) / row.mean()

    for step in range(2):
        run(optimizer, params, [step])
        g = params[0].grad.reshape(6, 8)
        v = 0.9 * v + 0.1 * g.square()
        u = g / factored(v, eps[0]).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = 0.8 * m + 0.2 * u
        s = 0.95 * s + 0.05 * (u - m).square()
        w = w - 0.01 * m / factored(s, eps[1]).sqrt()
    assert torch.allclose(params[0].reshape(6, 8), w, atol=1e-6)


@pytest.mark.parametrize("atan2", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_says_that_it_bounds_its_updates_moves_no_further_by_a_larger_gradient(name, atan2):
    """The gradient grows 1e4 times, which SGD would follow; ADOPT's first step moves nothing."""
    options = {"atan2": True} if atan2 and "atan2" in optim.options_of(name) else {}
    params = make_params(shapes=[(24, 16)])
    optimizer = build(name, params, **options)
    lengths = []
    for size in (1, 1, 1e4):
        before = params[0].detach().clone()
        set_grads(params, 0)
        params[0].grad *= size
        optimizer.step()
        lengths.append((params[0] - before).norm().item())
    is_bounded = optimizer.bounds_updates(optimizer.param_groups[0]) is not None
    assert lengths[2] < 12 * lengths[1] or not is_bounded


def test_clip_threshold_bounds_the_rms_of_an_update():
    params = make_params(shapes=[(32, 32)])
    optimizer = optim.build("adafactor", params, lr=1.0, clip_threshold=0.25)
    run(optimizer, params, range(1))
    moved = params[0] - make_params(shapes=[(32, 32)])[0]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("shape", [(32, 16), (40,)], ids=str)
def test_a_lagged_clip_takes_the_rms_of_the_step_before(shape):
    """An exact clip uses the current step's RMS; a lagged one does not clip the first step."""
    lengths = {}
    for clip in ({"clip_threshold": None}, {}, {"clip_norm": "lagged"}):
        params = make_params(shapes=[shape])
        optimizer = optim.build("adafactor", params, lr=1.0, **{"clip_threshold": 0.4} | clip)
        lengths[str(clip)] = []
        for step in range(6):
            before = params[0].detach().clone()
            set_grads(params, step)
            params[0].grad *= 0.1 + step % 3
            optimizer.step()
            lengths[str(clip)].append((params[0] - before).square().mean().sqrt().item())
    free, exact, lagged = lengths.values()
    assert min(free) < 0.4 < max(free)
    assert exact == pytest.approx([min(x, 0.4) for x in free], rel=1e-4)
    known = [0.4, *free[:-1]]
    assert lagged == pytest.approx(
        [x * min(1, 0.4 / y) for x, y in zip(free, known, strict=True)], rel=1e-4
    )


def test_the_rms_that_a_lagged_clip_keeps_is_after_the_growth_limiter_and_before_the_clip():
    params = make_params(shapes=[(32, 16)])
    optimizer = optim.build(
        "adafactor", params, clip_norm="lagged", clip_threshold=0.1, growth_limit=1.01
    )
    run(optimizer, params, range(3))
    state = optimizer.state[params[0]]
    assert state["update_rms"] * math.sqrt(512) == pytest.approx(state["update_norm"].item())
    assert state["update_rms"] > 0.5
    unclipped = optim.build("adafactor", params, clip_norm="lagged", clip_threshold=None)
    assert "update_rms" not in unclipped.codecs(params[0], unclipped.param_groups[0])


def test_adafactors_eps_is_added_to_each_factor_where_it_divides():
    """Shazeer & Stern 2018, Alg. 4, with eps added where the means are used."""
    params, eps = make_params(shapes=[(8, 6), (5,)]), 0.3
    start = [p.detach().clone() for p in params]
    optimizer = optim.build("adafactor", params, lr=1.0, eps=(eps, 1e-3), clip_threshold=None)
    run(optimizer, params, [0])
    matrix, vector = params[0].grad, params[1].grad
    row, col = matrix.square().mean(1), matrix.square().mean(0)
    v = torch.outer(row + eps, col + eps) / (row.mean() + eps)
    assert torch.allclose(start[0] - params[0], matrix / v.sqrt(), rtol=1e-4)
    assert torch.allclose(start[1] - params[1], vector / (vector.square() + eps).sqrt(), rtol=1e-4)
    state = optimizer.state[params[0]]
    assert torch.allclose(state["exp_avg_sq.row"], row * 1e-3, rtol=1e-4)  # but not to the average


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("adamw8bit", {"betas": (0.9, 0.997)}, (64, 64)),
        ("adafactor8bit", {"beta2": 0.997}, (512, 16)),
    ],
)
def test_eight_bit_state_follows_a_tenfold_drop_of_half_the_gradients(name, options, shape):
    """Within 5 % of the fp32 average after five time constants.  Rounded to nearest, it would stay
    37 and 7 times too large forever."""
    param, exact = Parameter(torch.zeros(shape)), torch.zeros(shape)
    optimizer = optim.build(name, [param], **options)
    generator, size = torch.Generator().manual_seed(0), torch.ones(shape)
    for step in range(2000):
        if step == 333:
            size[: shape[0] // 2] = 0.1
        param.grad = torch.randn(shape, generator=generator) * size
        exact.lerp_(param.grad.square(), 0.003)
        optimizer.step()
    codec = optimizer.codecs(param, optimizer.param_groups[0])["exp_avg_sq"]
    stored = codec.decode(split(optimizer.state[param], "exp_avg_sq"))
    for half in (slice(None, shape[0] // 2), slice(shape[0] // 2, None)):
        assert stored[half].mean().item() == pytest.approx(exact[half].mean().item(), rel=0.05)


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
    optimizer = build(name, params, lr=0.01)

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
