"""Schedule-Free: the average that is evaluated and saved, how it is kept in few bytes, and the two
sets of weights in a run."""

from copy import deepcopy

import pytest
import schedulefree
import torch
from helpers import (
    PRODIGIES,
    QUICK,
    SCHEDULE_FREE,
    assert_same,
    assert_same_weights,
    make_params,
    rows,
    run,
    run_export,
    set_grads,
    weights,
)
from safetensors.torch import load_file

import optim
from optim.codecs import SignedFloat8, split
from trainer.checks import remarks
from trainer.errors import UserError
from trainer.formats import origin
from trainer.run import run as train
from trainer.training import optimizers, switching

SHAPES = [(12, 9), (8, 4, 3, 3), (7,)]
PEER, PLUS = "peer/schedulefree_adamw", "peer/prodigy_plus_schedulefree"


def stepped(name="adamw_schedulefree", steps=8, **options):
    params = make_params(shapes=SHAPES)
    optimizer = optim.build(name, params, lr=1e-2, **{"weight_decay": 0.0} | options)
    run(optimizer, params, range(steps))
    return params, optimizer


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_average_is_that_of_schedulefree(decay, backend):
    """Defazio et al.'s own package, with a constant rate."""
    params, optimizer = stepped(steps=40, weight_decay=decay, backend=backend)
    theirs = make_params(shapes=SHAPES)
    other = schedulefree.AdamWScheduleFree(theirs, lr=1e-2, weight_decay=decay)
    other.train()
    run(other, theirs, range(40))
    before = [p.detach().clone() for p in params]
    for each in (optimizer, other):
        each.eval()
    for p, q, old in zip(params, theirs, before, strict=True):
        assert torch.allclose(p, q, atol=1e-5)
        assert not torch.allclose(p, old, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_average_is_the_mean_of_what_adamw_steps_without_momentum(name):
    """z = y - gap, and x, which `eval` puts into the model, is the mean of all z, each weighed by
    the square of the d that was found; as closely as the gap's storage allows."""
    params = make_params(shapes=SHAPES)
    rate = {"lr": 1e-2} if name not in PRODIGIES else {"lr": 1.0, "d0": 1e-2}
    optimizer = optim.build(name, params, weight_decay=0.0, **rate)
    (group,) = optimizer.param_groups
    mean, total = [torch.zeros_like(p) for p in params], 0.0
    for step in range(10):
        weight = float(group.get("d", 1.0)) ** 2
        total += weight
        run(optimizer, params, [step])
        for p, x in zip(params, mean, strict=True):
            codec = optimizer.moments(p, group)["gap"]
            z = p.detach() - codec.decode(split(optimizer.state[p], "gap"))
            x.lerp_(z, weight / total)
    optimizer.eval()
    for p, x in zip(params, mean, strict=True):
        precise = name in ("adamw_schedulefree", "prodigy_schedulefree")
        assert torch.allclose(p, x, atol=1e-6 if precise else 2e-3)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_prodigy_schedulefree_is_its_papers_equations(backend):
    """Schedule-Free's Alg. 1 with x, y and z in fp64, steps of d lr and weights (d lr)^2, and
    Prodigy's d from y."""
    param = torch.nn.Parameter(make_params(shapes=[(40,)])[0].detach() * 1e-3)
    options = {"lr": 0.7, "weight_decay": 0.1, "slice_p": 1, "d0": 1e-4, "d_coef": 1.5}
    optimizer = optim.build("prodigy_schedulefree", [param], backend=backend, **options)
    y = param.detach().double()
    start, x, z, v, s = y, y, y, 0 * y, 0 * y
    d, d0, r, total, beta3 = 1e-4, 1e-4, 0.0, 0.0, 0.999**0.5
    for t in range(1, 41):
        noise = torch.randn(40, generator=torch.Generator().manual_seed(t))
        param.grad = 2 * (param.detach() - 1) + 0.1 * noise
        g, rate = param.grad.double(), 0.7 * d
        optimizer.step()
        r = beta3 * r + d / d0 * rate * (g @ (start - y)).item()
        s = beta3 * s + d / d0 * rate * g
        v = 0.999 * v + 0.001 * g**2
        z = z - rate * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + 0.1 * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        y = 0.1 * z + 0.9 * x
        d = max(d, 1.5 * r / s.abs().sum().item())
        assert optimizer.param_groups[0]["d"].item() == pytest.approx(d, rel=1e-5)
        assert torch.allclose(param.double(), y, atol=1e-5)
    assert d > 100 * d0
    optimizer.eval()
    assert torch.allclose(param.double(), x, atol=1e-5)


@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("loss", ["regression", "logistic"])
def test_the_rate_that_is_found_is_nearly_as_good_as_the_best(loss, steps):
    """Convex losses with noisy gradients: `adamw_schedulefree` at the best of six rates."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    best = min(convex(loss, steps, "adamw_schedulefree", lr=rate) for rate in rates)
    assert convex(loss, steps, "prodigy_schedulefree", slice_p=1) < 3 * best


def convex(loss, steps, name, **options):
    """The mean squared error of what the average predicts."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, generator=generator)
    scale = torch.logspace(0, -1, 64)
    points = torch.randn(2048, 64, generator=generator) * scale
    weight = torch.nn.Parameter(torch.zeros(64))
    optimizer = optim.build(name, [weight], weight_decay=0.0, **options)

    def slope(at, x):
        if loss == "regression":
            return x @ (at - target)
        return (x @ at).sigmoid() - (x @ target).sigmoid()

    for _ in range(steps):
        x = points[torch.randint(2048, (8,), generator=generator)]
        noise = torch.randn(8, generator=generator) * 0.5
        weight.grad = (slope(weight.detach(), x) + noise) @ x / 8
        optimizer.step()
    optimizer.eval()
    return float(slope(weight.detach(), points).square().mean())


def test_factored_storage_keeps_the_gap_in_eight_bits():
    params, optimizer = stepped("adamw_factored_schedulefree")
    codec = optimizer.moments(params[0], optimizer.param_groups[0])["gap"]
    assert isinstance(codec, SignedFloat8)
    assert optimizer.state[params[0]]["exp_avg_sq.row"].shape == (12,)


def test_a_step_needs_the_weights_of_the_gradient_and_switching_twice_is_once():
    params, optimizer = stepped()
    before = [p.detach().clone() for p in params]
    optimizer.eval()
    average = [p.detach().clone() for p in params]
    optimizer.eval()
    assert_same(params, average)
    set_grads(params, 9)
    for act in (optimizer.step, lambda: optimizer.step_param(params[0])):
        with pytest.raises(RuntimeError, match=r"AdamWScheduleFree: .* call the optimizer's train"):
            act()
    assert_same(params, average)
    optimizer.train()
    for p, old in zip(params, before, strict=True):
        assert torch.allclose(p, old, atol=1e-6)
    optimizer.step()


def test_a_state_saved_with_the_average_in_the_model_goes_on_from_there():
    """As Hugging Face's Trainer saves: after an evaluation."""
    params, optimizer = stepped()
    optimizer.eval()
    saved = deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = optim.build("adamw_schedulefree", copies, lr=1e-2, weight_decay=0.0)
    other.load_state_dict(saved)
    for each in (optimizer, other):
        each.train()
    run(optimizer, params, range(8, 11))
    run(other, copies, range(8, 11))
    assert_same(params, copies)


def test_a_state_saved_while_training_is_loaded_into_an_optimizer_that_was_evaluated():
    params, optimizer = stepped(steps=0)
    saved = deepcopy(optimizer.state_dict())
    run(optimizer, params, range(3))
    optimizer.eval()
    optimizer.load_state_dict(saved)
    run(optimizer, params, [3])  # and not: call train() first


def test_weight_decay_does_not_draw_the_average_away_from_the_weights():
    """It is a step of z: if it moved x too, x would leave y by ever more."""
    target = torch.full((8, 8), 1.0)
    param = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = optim.build("adamw_schedulefree", [param], lr=1e-2, weight_decay=0.1)
    for _ in range(2000):
        param.grad = param.detach() - target
        optimizer.step()
    trained = param.detach().clone()
    optimizer.eval()
    assert torch.allclose(param, trained, atol=0.02)


def test_the_first_decay_must_be_above_zero():
    with pytest.raises(ValueError, match=r"betas\[0\]=0.*average is not known"):
        optim.build("adamw_schedulefree", make_params(shapes=SHAPES), betas=(0.0, 0.9))


def test_a_rate_of_zero_moves_nothing():
    params, optimizer = stepped(steps=3)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    gaps = [optimizer.state[p]["gap"].clone() for p in params]
    run(optimizer, params, [3])
    assert_same(params, before)
    assert_same(gaps, [optimizer.state[p]["gap"] for p in params])


@pytest.mark.parametrize(
    ("choice", "extra"),
    [
        ("adamw_factored_schedulefree", []),
        ("prodigy_factored_schedulefree", ["optim.d0=1e-3"]),
        (PEER, []),
    ],
)
def test_a_run_evaluates_draws_saves_and_exports_the_average_and_trains_on_as_before(
    quick, composed, tmp_path, capsys, choice, extra
):
    """An evaluation in between changes no weight, and a resumed run is the same bit for bit; the
    result, and an export of the checkpoint, are the average."""
    options = [f"optim={choice}", *extra, "schedule=constant", "method.export=[single_file]"]
    plain = quick("plain", *options)
    often = quick("often", *options, "log.eval_every=1", "runtime.save_every=2")
    half = often / "checkpoints/step-000002"
    train(composed(*QUICK, *options, f"resume={half}"), tmp_path / "resumed")
    for folder in (often, tmp_path / "resumed"):
        assert_same_weights(weights(plain, 4), weights(folder, 4))
        assert rows(folder)[-1]["eval/loss"] == rows(plain)[-1]["eval/loss"]

    average = load_file(plain / "checkpoints/step-000004/average.safetensors")
    name = "unet.conv_in.weight"
    assert not torch.equal(average[name], weights(plain, 4)[name])
    (result,) = plain.glob("*.safetensors")
    result = origin.at(str(result)).weights("unet")
    assert torch.equal(result["conv_in.weight"].read(), average[name])
    target = tmp_path / "exported"
    assert run_export(capsys, plain / "checkpoints/step-000004", target)[0] == 0
    exported = origin.at(str(target)).weights("unet")["conv_in.weight"].read()
    assert torch.equal(exported, average[name])


@pytest.mark.parametrize("choice", ["adamw8bit_schedulefree", "prodigy_schedulefree", PEER, PLUS])
def test_an_average_of_averages_is_refused(composed, choice):
    made = composed(f"optim={choice}", "ema=fp32")
    with pytest.raises(UserError, match=r"averages the weights itself.*leave ema out"):
        optimizers.refuse_second_average(made.optim, made.method)
    for words in (["optim=adamw"], [f"optim={PLUS}", "+optim.options.use_schedulefree=false"]):
        plain = composed(*words, "ema=fp32")
        optimizers.refuse_second_average(plain.optim, plain.method)


def test_a_schedule_that_lowers_the_rate_beside_an_average_gets_a_remark(composed):
    params = make_params(shapes=SHAPES)
    for choice, schedule, count in (
        ("adamw_schedulefree", "cosine", 1),
        ("adamw_schedulefree", "constant", 0),
        ("adamw", "cosine", 0),
    ):
        made = composed(f"optim={choice}", f"schedule={schedule}")
        found = remarks.of_average(made, optim.build(choice, params))
        assert [text.startswith(f"optim={choice} averages") for text in found] == [True] * count


def test_weights_are_as_before_when_an_average_was_put_in_half_way():
    params, optimizer = stepped()
    before = [p.detach().clone() for p in params]

    def fails():
        with torch.no_grad():
            params[0].zero_()
        raise torch.OutOfMemoryError("no room")

    optimizer.eval = fails
    with pytest.raises(torch.OutOfMemoryError), switching.evaluated(optimizer, params):
        raise AssertionError("evaluated")
    assert_same(params, before)
    run(optimizer, params, [8])


def test_eight_bits_cost_the_average_some_precision_and_bf16_none():
    """Regression with noisy gradients at a constant rate, where the average's error is mostly
    noise: what docs/optimizers.md says of long runs."""
    errors = {
        storage: noisy("adamw_schedulefree", lr=1e-2, storage=storage)
        for storage in ("fp32", "bf16", "8bit")
    }
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.05)
    assert 1.2 < errors["8bit"] / errors["fp32"] < 2


def test_eight_bits_cost_more_at_the_rate_that_prodigy_finds():
    exact, half = (noisy("prodigy_schedulefree", storage=x) for x in ("fp32", "bf16"))
    assert half == pytest.approx(exact, rel=0.05)
    assert 3 < noisy("prodigy_factored_schedulefree") / exact < 7


def noisy(name, steps=5000, **options):
    """The average's squared error in the loss's metric."""
    generator = torch.Generator().manual_seed(0)
    scale, target = torch.logspace(0, -1, 64), torch.randn(32, 64, generator=generator) * 0.3
    param = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = optim.build(name, [param], weight_decay=0.0, **options)
    for _ in range(steps):
        x = torch.randn(4, 64, generator=generator) * scale
        noise = torch.randn(4, 32, generator=generator) * 0.5
        param.grad = (x @ (param.detach() - target).T - noise).T @ x / 4
        optimizer.step()
    optimizer.eval()
    return float(((param.detach() - target) * scale).square().sum())
