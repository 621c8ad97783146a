"""Features: their effect on a step, unaffected moments, and bad gradient elements."""

import math

import pytest
import torch
from helpers import assert_same, build, make_params, run, set_grads
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
from optim import features
from optim.share import Share

NAMES = sorted(optim.FAMILY)
BAD = [math.nan, math.inf, -math.inf, 1e30]


def one_step(name, param, grad, **options):
    """Step a copy of `param` once -> (its change, its state)."""
    copy = Parameter(param.clone())
    copy.grad = grad.clone()
    optimizer = optim.build(name, [copy], lr=1.0, weight_decay=0.0, **options)
    optimizer.step()
    return copy.detach() - param, optimizer.state[copy]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 16, generator=generator) for _ in range(2)]


def test_orthograd_removes_the_component_along_the_weights_and_keeps_the_norm(pair):
    w, g = pair
    moved, _ = one_step("sgd", w, g, momentum=0.0, orthograd=True)
    assert abs((moved * w).sum() / (moved.norm() * w.norm())) < 1e-6
    assert moved.norm().item() == pytest.approx(g.norm().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-6])
def test_orthograd_does_not_blow_up_the_noise_of_a_parallel_gradient(pair, scale):
    w, _ = pair
    moved, _ = one_step("sgd", w, w * scale, momentum=0.0, orthograd=True)
    assert moved.abs().max() <= 1e-6 * abs(scale)


def test_grad_clip_bounds_the_norm_of_each_tensor_and_leaves_short_gradients(pair):
    w, g = pair
    for norm, expected in ((0.5, 0.5), (1e9, g.norm().item())):
        moved, _ = one_step("sgd", w, g, momentum=0.0, grad_clip=norm)
        assert moved.norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("largest", [0.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_max_grad_norm_is_torchs_clip_before_the_step(largest, dtype):
    ours, theirs = make_params(dtype), make_params(dtype)
    one, two = (
        optim.build(
            "sgd",
            [{"params": params[:3]}, {"params": params[3:], "momentum": 0.5}],
            rounding="nearest",
            max_grad_norm=limit,
        )
        for params, limit in ((ours, largest), (theirs, None))
    )
    for step in range(5):
        set_grads(ours, step)
        set_grads(theirs, step)
        for p in theirs:  # torch would round clipped gradients to the weights' dtype
            p.data, p.grad = p.data.float(), p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(theirs, largest)
        assert norm > 0.5
        one.step()
        two.step()
        for p in theirs:
            p.data = p.data.to(dtype)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def test_max_grad_norm_is_each_groups_limit_on_the_norm_of_all():
    params = [Parameter(torch.zeros(4)) for _ in range(3)]
    groups = [{"params": [params[i]], "max_grad_norm": n} for i, n in enumerate((1.0, 2.0, None))]
    optimizer = optim.build("sgd", groups, lr=1.0, momentum=0.0)
    for p, size in zip(params, (1.5, 2.0, 0.0), strict=True):
        p.grad = torch.full((4,), size)  # norms 3, 4 and 0: 5 in total
    params[2].grad[:2] = torch.tensor([math.nan, 1e30])  # counts as 0
    optimizer.step()
    moved = [-p.norm().item() for p in params]
    assert moved == pytest.approx([-3 / 5, -4 * 2 / 5, 0.0])


def test_max_grad_norm_is_refused_where_gradients_come_one_by_one():
    params = make_params(shapes=[(4,), (3,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 1.0}]
    optimizer = optim.build("adamw", groups)
    with pytest.raises(ValueError, match=r"fuse_backward: max_grad_norm .* use grad_clip"):
        optim.fuse_backward(optimizer)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"step_param: max_grad_norm .* use grad_clip"):
        optimizer.step_param(params[0])
    assert_same(params, make_params(shapes=[(4,), (3,)]))


def test_growth_limit_bounds_growth_and_is_not_locked_by_a_zero_gradient():
    param = Parameter(torch.zeros(8))
    optimizer = optim.build("sgd", [param], lr=1.0, momentum=0.0, growth_limit=1.5)
    norms = []
    for size in (1.0, 10.0, 10.0, 0.1, 10.0, 0.0, 7.0):
        before = param.detach().clone()
        param.grad = torch.full((8,), size / math.sqrt(8))
        optimizer.step()
        norms.append((param.detach() - before).norm().item())
    assert norms == pytest.approx([1.0, 1.5, 2.25, 0.1, 0.15, 0.0, 7.0], rel=1e-4)


def test_growth_limit_comes_before_adafactors_clip(pair):
    w, g = pair
    moved, state = one_step("adafactor", w, g, growth_limit=1.01, clip_threshold=0.5)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-4)
    assert state["update_norm"].item() > 0.5 * math.sqrt(w.numel()) * 1.5


@pytest.mark.parametrize("name", ["adamw", "lion", "adopt", "sgd", "sophia"])
@pytest.mark.parametrize("feature", ["cautious", "grams"])
def test_cautious_and_grams_act_on_the_update_and_never_on_the_moments(name, feature):
    plain, featured = (make_params(shapes=[(16, 16)]) for _ in range(2))
    one, two = optim.build(name, plain), optim.build(name, featured, **{feature: True})
    for step in range(4):
        set_grads(plain, step)
        set_grads(featured, step)
        before = featured[0].detach().clone()
        one.step()
        two.step()
        if step and feature == "grams":
            moved = before * (1 - two.defaults["lr"] * two.defaults["weight_decay"]) - featured[0]
            against = (moved * featured[0].grad < -1e-9).sum()
            assert against == 0
    assert not torch.equal(plain[0], featured[0])
    for key, value in one.state[plain[0]].items():
        assert torch.equal(value, two.state[featured[0]][key]), key


def test_cautious_keeps_the_size_of_the_update_on_average(pair):
    _, g = pair
    h = type("H", (), {"grams": False, "cautious": True})
    u = torch.where(torch.arange(16) < 4, g, -g)  # a quarter of the signs agree
    kept = features.aligned(h, u, g)
    assert torch.equal(kept[:, 4:], torch.zeros(32, 12))
    assert torch.allclose(kept[:, :4], 4 * g[:, :4])


def test_cautious_decay_leaves_weights_that_the_update_grows():
    w, g = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    param = Parameter(w.clone())
    param.grad = g
    optim.build("sgd", [param], lr=0.1, momentum=0.0, weight_decay=0.5, cautious_decay=True).step()
    shrunk = torch.tensor([True, False, False, True])
    assert torch.allclose(param, w - 0.1 * g - torch.where(shrunk, 0.05 * w, 0.0))


def test_atan2_is_bounded_and_adams_first_step_is_one_lr(pair):
    w, g = pair
    for scale in (1e-12, 1.0, 1e10):
        moved, _ = one_step("adamw", w * 0, g * scale, atan2=True)
        assert torch.allclose(moved, -g.sign(), atol=1e-5)


def test_kahan_follows_fp32_where_nearest_rounding_stalls():
    ends = {}
    for dtype, rounding in [
        (torch.float32, "nearest"),
        (torch.bfloat16, "kahan"),
        (torch.bfloat16, "nearest"),
    ]:
        params = make_params(dtype, [(64, 64)])
        params[0].data = params[0].data * 0 + 1
        run(optim.build("adamw", params, lr=1e-4, rounding=rounding), params, range(50))
        ends[dtype, rounding] = params[0].detach().float()
    exact = ends[torch.float32, "nearest"]
    error = {k: (v - exact).abs().mean().item() for k, v in ends.items()}
    assert error[torch.bfloat16, "kahan"] < 2.0**-8
    assert torch.equal(ends[torch.bfloat16, "nearest"], torch.ones(64, 64)), "it did not stall"


def test_refused_features_are_refused_by_name():
    with pytest.raises(TypeError, match="'growth_limit'"):
        optim.build("lion", make_params(), growth_limit=1.01)
    with pytest.raises(TypeError, match="Lion cannot have growth_limit: the norm of a sign"):
        optim.Lion(make_params(), growth_limit=1.01)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient_element_changes_neither_its_weight_nor_other_training(name, bad):
    """Its weight stays, the rest trains as if that element had no gradient, and it is counted."""
    params = make_params(shapes=[(12, 8), (9,)])
    optimizer = build(name, params)
    run(optimizer, params, range(3))
    set_grads(params, 3)
    for p in params:
        p.grad.view(-1)[4] = bad
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert p.view(-1)[4] == old.view(-1)[4]
        assert p.isfinite().all()
        assert (p != old).sum() == p.numel() - 1
    assert optimizer.nonfinite_count() == 2
    for state in optimizer.state.values():
        assert all(x.isfinite().all() for x in state.values())
    run(optimizer, params, range(4, 6))
    assert all((p != old).all() for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("name", ["adamw", "lion", "adopt", "sgd", "ademamix", "prodigy", "sophia"])
def test_a_bad_element_keeps_its_moments_bitwise(name):
    params = make_params(shapes=[(12, 8)])
    optimizer = optim.build(name, params)
    run(optimizer, params, range(3))
    before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    set_grads(params, 3)
    params[0].grad[2, 3] = math.nan
    optimizer.step()
    for key, old in before.items():
        if key.startswith("exp_avg"):
            new = optimizer.state[params[0]][key]
            assert new[2, 3] == old[2, 3]
            assert (new != old).sum() == new.numel() - 1


def test_on_nonfinite_raise_raises_before_anything_changes():
    params = make_params(shapes=[(4,), (12, 8)])
    optimizer = optim.build("adafactor8bit", params, on_nonfinite="raise")
    run(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    steps = [int(optimizer.state[p]["step"]) for p in params]
    set_grads(params, 2)
    params[1].grad[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"1 of 96 gradient elements of parameter 1"):
        optimizer.step()
    assert_same(params, before)
    assert [int(optimizer.state[p]["step"]) for p in params] == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_nonfinite_raise_waits_for_the_gradients_once_and_copies_none(dtype):
    params = make_params(dtype, [(600, 500), (0,), (), (400, 300)])
    optimizer = optim.build("sgd", params, on_nonfinite="raise")
    set_grads(params, 0)
    grad = params[3].grad = params[3].grad.t().contiguous().t()
    reads, sizes = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            reads.extend([1] if function is torch.ops.aten._local_scalar_dense.default else [])
            sizes.extend(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))
            return made

    share = Share(optimizer._places())
    with Watch():
        optimizer._raise_on_nonfinite(share)
    assert len(reads) == 1
    assert max(sizes) <= 2 * len(params)
    for value in BAD[: 3 if dtype == torch.float16 else 4]:
        grad[7, 5] = value
        with pytest.raises(FloatingPointError, match=r"1 of 120000 .* of parameter 3"):
            optimizer._raise_on_nonfinite(share)
    grad[7, 5] = -1.0 if dtype == torch.float16 else -features.LARGEST_GRAD
    optimizer._raise_on_nonfinite(share)


def test_on_nonfinite_raise_is_refused_where_gradients_come_one_by_one():
    params = make_params(shapes=[(4,), (3,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "on_nonfinite": "raise"}]
    optimizer = optim.build("adamw", groups)
    with pytest.raises(
        ValueError, match=r"fuse_backward: on_nonfinite='raise' .* use on_nonfinite='skip'"
    ):
        optim.fuse_backward(optimizer)
    set_grads(params, 0)
    with pytest.raises(
        ValueError, match=r"step_param: on_nonfinite='raise' .* use on_nonfinite='skip'"
    ):
        optimizer.step_param(params[0])
    assert_same(params, make_params(shapes=[(4,), (3,)]))


@pytest.mark.parametrize("scale", [1e-22, 1e-20, 1e-18, 1e-12, 1.0, 1e6, 1e13])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_and_huge_gradients_with_dead_rows_and_columns_stay_finite(name, scale):
    generator = torch.Generator().manual_seed(0)
    params = make_params(shapes=[(8, 8), (16, 3, 3, 3), (8,)])
    optimizer = build(name, params)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * scale * 0.1**step
            p.grad[0] = 0
            if p.ndim > 1:
                p.grad[:, 1] = 0
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert all(x.isfinite().all() for s in optimizer.state.values() for x in s.values())


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"betas": (0.0, 0.99, 0.999)}])
def test_ademamix_takes_the_ends_of_its_ranges(options):
    params = make_params()
    run(optim.build("ademamix", params, warmup_steps=5, **options), params, range(3))
    assert all(p.isfinite().all() for p in params)
