"""The option `storage`: every optimizer with its moments in every format."""

import copy

import pytest
import torch
from helpers import SHAPES, assert_same, build, make_params, run
from torch.nn import Parameter

import optim
from optim.codecs import Bf16, Dense, Factored, FactoredSign, SignedFloat8

NAMES = sorted(name for name in optim.FAMILY if "storage" in optim.options_of(name))
STORAGES = ["fp32", "bf16", "8bit", "factored"]
MOMENT = {  # so that there is a first moment
    name: {"beta1": 0.9}
    for name in ("adafactor", "adafactor8bit", "adafactor8bit_apollo", "adalomo")
}


@pytest.mark.parametrize(
    ("name", "base", "storage"),
    [
        ("adamw8bit", "adamw", "8bit"),
        ("adamw_factored", "adamw", "factored"),
        ("ademamix_factored", "ademamix", "factored"),
        ("adopt_factored", "adopt", "factored"),
        ("lion8bit", "lion", "8bit"),
        ("lion_factored", "lion", "factored"),
        ("prodigy_factored", "prodigy", "factored"),
        ("prodigy_factored_schedulefree", "prodigy_schedulefree", "factored"),
    ],
)
def test_a_low_memory_class_is_its_base_with_another_default(name, base, storage):
    assert optim.options_of(name)["storage"][1] == storage
    assert optim.options_of(base)["storage"][1] == "fp32"
    one, two = make_params(torch.bfloat16), make_params(torch.bfloat16)
    run(optim.build(name, one), one, range(4))
    run(optim.build(base, two, storage=storage), two, range(4))
    assert_same(one, two)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_and_resumes_in_every_storage(name, storage):
    params = [Parameter(torch.full(shape, 1.0)) for shape in SHAPES]
    options = MOMENT.get(name, {}) | {"lr": 0.01, "storage": storage}
    optimizer = build(name, params, **options)

    def loss():
        return sum((p * p).sum() for p in params)

    def train(optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    first = loss().item()
    train(optimizer, 20)
    middle, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    train(optimizer, 30)
    assert loss().item() < 0.5 * first
    end = [p.detach().clone() for p in params]
    for p, x in zip(params, middle, strict=True):
        p.data.copy_(x)
    resumed = build(name, params, **MOMENT.get(name, {}))  # the saved storage wins
    resumed.load_state_dict(saved)
    train(resumed, 30)
    assert_same(params, end)


# Distance from the fp32 result, relative to how far that moved.  Lion's updates are signs, as
# are Sophia's before it has any curvature.
TOLERANCE = {"bf16": 0.01, "8bit": 0.08}
LION_TOLERANCE = {"bf16": 0.04, "8bit": 0.16}


@pytest.mark.parametrize("storage", TOLERANCE)
@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "adamw", "ademamix", "adopt", "lion", "adafactor", "adafactor8bit"),
        *("came", "apollo", "adafactor8bit_apollo", "prodigy", "sophia"),
    ],
)
def test_rounded_moments_lead_where_fp32_moments_do(name, storage):
    shapes = [(64, 48), (16, 8, 3, 3), (100,)]
    exact, rounded = make_params(shapes=shapes), make_params(shapes=shapes)
    for params, kind in ((exact, "fp32"), (rounded, storage)):
        options = MOMENT.get(name, {}) | {"storage": kind}
        run(build(name, params, **options), params, range(30))
    tolerance = (LION_TOLERANCE if name in ("lion", "sophia") else TOLERANCE)[storage]
    for a, b, start in zip(exact, rounded, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= tolerance * (a - start).norm()
    assert not torch.equal(exact[0], rounded[0])


@pytest.mark.parametrize(
    ("storage", "size"),
    [("fp32", 4), ("bf16", 2), ("8bit", 1 + 1 / 128), ("factored", 1 / 8 + 4 / 128)],
)
@pytest.mark.parametrize("name", ["sgd", "lion", "adafactor", "adafactor8bit", "came"])
def test_a_moment_takes_this_many_bytes_an_element(name, storage, size):
    params = make_params(shapes=[(256, 256)])
    optimizer = optim.build(name, params, storage=storage, **MOMENT.get(name, {}))
    optimizer.init_state()
    state = optimizer.state[params[0]].items()
    parts = [x for key, x in state if key.split(".")[0] == "exp_avg"]
    assert sum(x.numel() * x.element_size() for x in parts) == size * 256 * 256


def test_adafactors_storage_is_the_first_moments_and_its_means_are_the_classs():
    shape, view, params = (16, 3, 3, 3), (16, 27), make_params(shapes=[(16, 3, 3, 3), (24,)])
    first = {
        "fp32": (Dense(shape), Dense((24,))),
        "bf16": (Bf16(shape, view), Bf16((24,))),
        "8bit": (SignedFloat8(shape, view), SignedFloat8((24,))),
        "factored": (FactoredSign(shape, view), Dense((24,))),
    }
    for name, is_float8 in (("adafactor", False), ("adafactor8bit", True)):
        for storage in STORAGES:
            optimizer = optim.build(name, params, storage=storage, beta1=0.9)
            matrix, vector = (optimizer.codecs(p, optimizer.param_groups[0]) for p in params)
            assert matrix["exp_avg_sq"] == Factored(shape, view, is_float8)
            assert vector["exp_avg_sq"] == Dense((24,))
            assert (matrix["exp_avg"], vector["exp_avg"]) == first[storage]


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4, 1e-6])
def test_8bit_adamw_moves_what_has_small_gradients_beside_large_ones_as_fp32_does(ratio):
    """In separate and in mixed blocks: a weight's step depends on its own gradients only."""
    scale = torch.ones(2, 256)
    scale[0, 128:] = ratio
    scale[1, ::2] = max(ratio, 1e-4)  # smaller ones would move less
    moved = {}
    for name in ("adamw", "adamw8bit"):
        (param,) = make_params(shapes=[(2, 256)])
        start, generator = param.detach().clone(), torch.Generator().manual_seed(0)
        optimizer = optim.build(name, [param], lr=1e-3, weight_decay=0.0)
        largest = 0.0
        for _ in range(100):
            before = param.detach().clone()
            param.grad = torch.randn(2, 256, generator=generator) * scale
            optimizer.step()
            largest = max(largest, (param.detach() - before).abs().max().item())
        change = param.detach() - start
        moved[name] = change[0, 128:].norm().item(), change[1, ::2].norm().item()
        assert largest <= 1.2e-3
    assert moved["adamw8bit"][0] == pytest.approx(moved["adamw"][0], rel=0.05)
    assert moved["adamw8bit"][1] == pytest.approx(moved["adamw"][1], rel=0.05)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_kahan_compensation_keeps_steps_far_below_the_weights_spacing(backend):
    """Half of bf16's spacing at 1 is 0.002; half of the compensation's spacing is 1e-5."""
    param = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = optim.SGD([param], lr=1e-6, momentum=0.0, rounding="kahan", backend=backend)
    for _ in range(2000):
        param.grad = torch.ones_like(param)
        optimizer.step()
    whole = param.detach().float() + optimizer.state[param]["compensation"].float()
    assert whole.mean().item() == pytest.approx(1 - 2e-3, abs=1e-4)
