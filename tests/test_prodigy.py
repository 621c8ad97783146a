"""Prodigy: d equals prodigyopt's, and all parameters always share one d."""

import copy
import io
import itertools
import math
import pickle
import random

import prodigyopt
import pytest
import torch
from helpers import PRODIGIES, assert_same, build, make_params, run, set_grads
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import optim

SHAPES = [(24, 16), (16, 3, 3, 3), (24,)]


def descend(params, step):
    """Gradients of a noisy bowl around 1, at these weights."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator)
        p.grad = (2 * (p.detach().float() - 1) + 0.1 * noise).to(p.dtype)


def find(optimizer, params, steps):
    for step in steps:
        descend(params, step)
        optimizer.step()


def d_of(optimizer):
    return optimizer.param_groups[0]["d"].item()


@pytest.mark.parametrize("warmup", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias_correction": True},
        {"safeguard_warmup": True},
        {"growth_rate": 1.1, "d_coef": 2.0},
        {"slice_p": 3, "beta3": 0.9, "betas": (0.8, 0.99)},
        {"weight_decay": 0.1, "lr": 0.5, "d0": 1e-3},
    ],
    ids=str,
)
def test_d_is_prodigyopts_at_every_step(options, warmup):
    compare_with_prodigyopt(options, warmup, waits=0)


@pytest.mark.parametrize("options", [{}, {"safeguard_warmup": True}], ids=str)
def test_d_is_prodigyopts_after_steps_at_rate_zero(options):
    compare_with_prodigyopt(options, warmup=8, waits=5)


def compare_with_prodigyopt(options, warmup, waits):
    """eps is so small that it does not matter which d multiplies it; lr is 0 for `waits` steps."""
    ours, theirs = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    options = {"slice_p": 1, "weight_decay": 0.0, "eps": 1e-12, "lr": 1.0} | options
    peer = prodigyopt.Prodigy(theirs, **options)
    if "use_bias_correction" in options:
        options["bias_correction"] = options.pop("use_bias_correction")
    optimizer = optim.build("prodigy", ours, **options)
    largest = 0.0
    for step in range(60):
        for which in (optimizer, peer):
            scale = min(1.0, (step + 1) / warmup) if step >= waits else 0.0
            which.param_groups[0]["lr"] = options["lr"] * scale
        descend(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        peer.step()
        assert d_of(optimizer) == pytest.approx(peer.param_groups[0]["d"], rel=1e-5), step
        largest = max(largest, d_of(optimizer))
    assert largest > 100 * options.get("d0", 1e-6)
    for p, q, start in zip(ours, theirs, make_params(shapes=SHAPES), strict=True):
        assert (p - q).norm() <= 1e-5 * (q - start).norm()


def test_lion_prodigy_is_its_equations():
    """Lion on d g with steps of d lr, and Prodigy's d, in fp64."""
    params = [Parameter(make_params(shapes=[(40,)])[0].detach() * 1e-3)]  # moves without rounding
    options = {"lr": 0.7, "weight_decay": 0.1, "slice_p": 1, "d0": 1e-4, "d_coef": 1.5}
    optimizer = optim.build("lion_prodigy", params, **options)
    x = params[0].detach().double()
    x0, m, s, r, d, d0 = x.clone(), 0 * x, 0 * x, 0.0, 1e-4, 1e-4
    beta3 = math.sqrt(0.99)
    for step in range(40):
        descend(params, step)
        g = params[0].grad.double()
        optimizer.step()
        u = (0.9 * m + 0.1 * d * g).sign()
        m = 0.99 * m + 0.01 * d * g
        r = beta3 * r + d / d0 * d * 0.7 * (g @ (x0 - x)).item()
        s = beta3 * s + d / d0 * d * 0.7 * g
        x = x - d * 0.7 * (0.1 * x + u)
        d = max(d, 1.5 * r / s.abs().sum().item())
        assert d_of(optimizer) == pytest.approx(d, rel=1e-5)
        assert torch.allclose(params[0].double(), x, atol=1e-5)
    assert d > 100 * d0


def test_a_step_uses_the_d_of_the_steps_before():
    params = make_params(shapes=[(40,)])
    optimizer = optim.build("lion_prodigy", params, d0=1e-3, weight_decay=0.0)
    for step in range(12):
        before, d = params[0].detach().clone(), d_of(optimizer)
        find(optimizer, params, [step])
        assert torch.allclose((params[0] - before).abs(), torch.full((40,), d), rtol=1e-3)
    assert d_of(optimizer) > 10 * 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRODIGIES)
def test_parameters_stepped_one_by_one_in_any_order_give_the_same_bits(name, dtype):
    together, alone = make_params(dtype), make_params(dtype)
    one, two = (
        optim.build(name, [{"params": p[:3]}, {"params": p[3:], "lr": 0.5}], d0=1e-3)
        for p in (together, alone)
    )
    order = random.Random(0)
    for step in range(20):
        descend(together, step)
        descend(alone, step)
        one.step()
        shuffled = order.sample(alone, len(alone))
        for p in shuffled[:5]:
            two.step_param(p)
            p.grad = None
        two.step()
        assert d_of(one) == d_of(two)
    assert_same(together, alone)
    assert d_of(one) > 2e-3


def copied(optimizer, params, way):
    """The optimizer and its parameters after a copy, a pickling, or a save and load."""
    if way == "deepcopy":
        return copy.deepcopy((optimizer, params))
    if way == "pickle":
        return pickle.loads(pickle.dumps((optimizer, params)))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [Parameter(p.detach().clone()) for p in params]
    twin = optim.build("prodigy", [{"params": twins[:2]}, {"params": twins[2:]}], d0=0.5)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin, twins


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict"])
def test_d_travels_with_the_state_is_shared_by_all_groups_and_by_no_copy(way):
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = optim.build("prodigy", groups, growth_rate=1.5)
    find(optimizer, params, range(8))
    twin, twins = copied(optimizer, params, way)
    d = d_of(optimizer)
    assert d > 1e-6
    for name in ("d", "d_max"):
        first, second = (group[name] for group in twin.param_groups)
        assert first is second
        assert torch.equal(first, optimizer.param_groups[0][name])
    find(optimizer, params, range(8, 20))
    assert d_of(optimizer) > d
    assert d_of(twin) == d
    find(twin, twins, range(8, 20))
    assert d_of(twin) == d_of(optimizer)
    assert_same(params, twins)


def test_a_state_without_d_is_refused_and_changes_nothing():
    params = make_params()
    optimizer = optim.build("prodigy", params)
    find(optimizer, params, range(8))
    before, spoiled = d_of(optimizer), copy.deepcopy(optimizer.state_dict())
    del spoiled["param_groups"][0]["d"]
    with pytest.raises(ValueError, match="its groups lack d"):
        optimizer.load_state_dict(spoiled)
    assert d_of(optimizer) == before


def test_the_number_of_threads_changes_no_bit_of_d():
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = make_params(shapes=[(700, 501), (64, 32, 3, 3)])
        optimizer = optim.build("prodigy", params, slice_p=1)
        find(optimizer, params, range(3))
        found.append((d_of(optimizer), *(optimizer.state[p]["numerator"] for p in params)))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0][0] > 1e-6


class NoReading(TorchDispatchMode):
    """Forbids reading a floating-point number on the host, which would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            assert not args[0].is_floating_point(), "a number is read on the host"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", PRODIGIES)
def test_no_step_reads_d_or_its_sums_on_the_host(name):
    params = make_params(torch.bfloat16)
    optimizer = optim.build(name, params)
    for step in range(3):
        descend(params, step)
        with NoReading():
            optimizer.step()
    with pytest.raises(AssertionError, match="read on the host"), NoReading():
        d_of(optimizer)


def test_the_gradient_sum_decays_in_bf16_as_in_fp32():
    """By less than half a bf16 spacing per step: rounded to nearest, it would never change."""
    for dtype in (torch.float32, torch.bfloat16):
        param = Parameter(torch.zeros(4096, dtype=dtype))
        optimizer = optim.build("prodigy", [param], slice_p=1)
        sums = []
        for step in range(600):
            param.grad = torch.full_like(param, float(step < 5))
            optimizer.step()
            sums.append(optimizer.state[param]["grad_sum"].float().sum().item())
        assert optimizer.state[param]["grad_sum"].dtype == dtype
        assert sums[-1] / sums[4] == pytest.approx(0.999 ** (595 / 2), rel=0.02)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", PRODIGIES)
def test_fp16_weights_find_the_d_of_fp32_ones(name, backend):
    """A step of d0 = 1e-6 is far below the spacing of fp16 weights around 1."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        params = make_params(dtype, SHAPES)
        optimizer = optim.build(name, params, backend=backend)
        find(optimizer, params, range(300))
        found[dtype] = d_of(optimizer)
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.05)
    assert found[torch.float16] > 1e-3


def test_every_slice_pth_element_is_kept_in_the_weights_dtype():
    for dtype, size in ((torch.float32, 8), (torch.bfloat16, 4), (torch.float16, 4)):
        param = Parameter(torch.randn(10, 10).to(dtype))
        start = param.detach().clone()
        optimizer = optim.build("prodigy_factored", [param], slice_p=7, d0=1e-2)
        find(optimizer, [param], range(3))
        kept = {k: optimizer.state[param][k] for k in ("start", "grad_sum")}
        assert torch.equal(kept["start"], start.flatten()[::7])
        assert sum(x.numel() * x.element_size() for x in kept.values()) == size * 15


def test_unusable_gradient_elements_add_nothing_to_the_sums():
    """They count as zero, and their own gradient sum does not even decay."""
    states = []
    for value in (0.0, math.nan, math.inf):
        params = make_params(shapes=[(30,)])
        optimizer = optim.build("prodigy", params, slice_p=1, d0=1e-2)
        find(optimizer, params, range(4))
        old = optimizer.state[params[0]]["grad_sum"].clone()
        descend(params, 4)
        params[0].grad[7] = value
        optimizer.step()
        states.append(optimizer.state[params[0]])
        assert d_of(optimizer) > 1e-2
        assert (states[-1]["grad_sum"][7] == old[7]) == (value != 0)
    zero, nan, inf = states
    assert zero["numerator"] == nan["numerator"] == inf["numerator"]
    assert nan["denominator"] == inf["denominator"]
    assert zero["denominator"].item() == pytest.approx(nan["denominator"].item(), rel=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRODIGIES)
def test_a_gradient_without_a_usable_element_changes_none_of_the_sums(name, dtype, backend):
    params = make_params(dtype)
    optimizer = build(name, params, slice_p=2, backend=backend)
    run(optimizer, params, range(4))
    before, d = copy.deepcopy([optimizer.state[p] for p in params]), d_of(optimizer)
    for p, value in zip(params, itertools.cycle((math.nan, math.inf, -math.inf))):
        p.grad.fill_(value)
    optimizer.step()
    assert d_of(optimizer) == d
    for old, p in zip(before, params, strict=True):
        for key in {"start", "grad_sum", "numerator", "denominator", "weight_sum"} & old.keys():
            assert torch.equal(optimizer.state[p][key], old[key]), key


def test_a_loaded_state_does_not_wait_for_an_estimate_of_what_it_replaced():
    """Half a round, then a load: d stays as loaded until there is a new gradient."""
    params = make_params(shapes=[(64,)])
    optimizer = optim.build("prodigy", params, slice_p=1, d0=1e-3, growth_rate=1.1)
    empty = copy.deepcopy(optimizer.state_dict())
    find(optimizer, params, range(5))
    saved, d = copy.deepcopy(optimizer.state_dict()), d_of(optimizer)
    for state, expected in ((saved, d), (empty, 1e-3)):
        descend(params, 5)
        optimizer.step_param(*params)
        params[0].grad = None
        optimizer.load_state_dict(state)
        optimizer.step()
        assert d_of(optimizer) == expected


def test_a_groups_lr_scales_its_share_and_at_zero_it_stays():
    shares = {}
    for lr in (1.0, 0.25, 0.0):
        params = make_params(shapes=[(30,), (20,)])
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr}]
        optimizer = optim.build("prodigy", groups, slice_p=1, growth_rate=1.0)
        run(optimizer, params, range(3))
        shares[lr] = [optimizer.state[p]["denominator"].item() for p in params]
    assert shares[1.0][0] == shares[0.25][0] == shares[0.0][0]
    assert shares[0.25][1] == pytest.approx(0.25 * shares[1.0][1])
    assert shares[0.0][1] == 0
    assert torch.equal(params[1], make_params(shapes=[(30,), (20,)])[1])


def test_a_warm_up_from_zero_and_a_step_without_gradients_leave_d_alone():
    params = make_params()
    optimizer = optim.build("prodigy", params, growth_rate=1.1)
    optimizer.param_groups[0]["lr"] = 0.0
    find(optimizer, params, range(2))
    assert d_of(optimizer) == 1e-6
    optimizer.param_groups[0]["lr"] = 1.0
    find(optimizer, params, range(2, 12))
    d = d_of(optimizer)
    assert 1e-6 < d < optimizer.param_groups[0]["d_max"].item()
    for pause in (0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = pause
        find(optimizer, params, range(12, 14))
        assert d_of(optimizer) == d
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.zero_grad()
    optimizer.step()
    assert d_of(optimizer) == d
    set_grads(params, 0)
    optimizer.step()
    assert d_of(optimizer) > d


def test_a_group_added_later_takes_part_in_the_one_d():
    params = make_params()
    optimizer = optim.build("prodigy", params[:2])
    find(optimizer, params[:2], range(8))
    optimizer.add_param_group({"params": params[2:]})
    first, second = (group["d"] for group in optimizer.param_groups)
    assert first is second
    assert d_of(optimizer) > 1e-6


def test_another_slice_p_than_the_states_is_refused():
    params = make_params(shapes=[(40,)])
    optimizer = optim.build("prodigy", params, slice_p=5)
    find(optimizer, params, range(2))
    optimizer.param_groups[0]["slice_p"] = 2
    with pytest.raises(ValueError, match=r"'grad_sum' is .*\(8,\).* should be .*\(20,\)"):
        find(optimizer, params, range(1))


@pytest.mark.parametrize("name", PRODIGIES)
def test_groups_of_another_optimizer_begin_with_a_d_of_their_own(name):
    params = make_params(shapes=SHAPES)
    first = build(name, [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}])
    find(first, params, range(5))
    before = d_of(first)
    second = type(first)(first.param_groups)
    assert [group["weight_decay"] for group in second.param_groups] == [0.01, 0.5]
    assert {group["d"].item() for group in second.param_groups} == {1e-2}
    find(second, params, range(5))
    assert d_of(first) == before != d_of(second)
