"""Clipping and accumulation: all modes, bitwise equal with and without the fused backward."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import build
from torch import nn

from trainer.checks import remarks
from trainer.training import clipping, gradients
from trainer.training.guard import Guard

STEPS, SIZE = 4, 6


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(512, 24), nn.Linear(24, 1)
    ).to(dtype)


def pictures(number, size=SIZE):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, 8, 8, generator=generator)


def way(model, optimizer, clip, limit, fused, count=1, last_norm=math.nan):
    config = SimpleNamespace(
        method=SimpleNamespace(clip=clip, max_grad_norm=limit),
        runtime=SimpleNamespace(fused_backward=fused, accumulation=count),
    )
    backward = gradients.make(config, list(model.parameters()), optimizer)
    backward.clip.last_norm = last_norm
    return backward


def step_of(backward, loss_of, shares=(1.0,)):
    """The step of these micro-batches; loss_of: by their place in the step."""
    return backward.run(
        [gradients.Pass(partial(loss_of, n), share) for n, share in enumerate(shares)]
    )


def trained(clip, limit, fused, *, dtype=torch.float32, name="adamw", count=1, spike=None):
    """Train for some steps -> (weights, outcome of each); step `spike` has 1000 times the loss."""
    model = network(dtype)
    optimizer = build(name, model.parameters())
    backward, guard = way(model, optimizer, clip, limit, fused, count), Guard(9)
    outcomes = []
    for step in range(STEPS):

        def loss_of(place, step=step):
            loss = model(pictures(step * count + place).to(dtype)).square().mean()
            return loss * (1000 if step == spike else 1)

        outcome = step_of(backward, loss_of, [1 / count] * count)
        if guard.accepts(step, outcome):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        outcomes.append(outcome)
    return [p.detach() for p in model.parameters()], outcomes


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def norm(tensors):
    return torch.linalg.vector_norm(torch.stack([x.float().norm() for x in tensors])).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("clip", ["exact", "lagged", "rms", "none"])
def test_every_clip_gives_the_same_bits_with_the_fused_backward_and_without(clip, count, dtype):
    off, seen_off = trained(clip, 0.05, False, dtype=dtype, count=count, spike=2)
    on, seen_on = trained(clip, 0.05, True, dtype=dtype, count=count, spike=2)
    assert same(off, on)
    assert [(x.loss, x.grad_norm) for x in seen_off] == [(x.loss, x.grad_norm) for x in seen_on]
    unclipped, _ = trained("none", None, False, dtype=dtype, count=count, spike=2)
    assert same(off, unclipped) == (clip == "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_exact_clip_inside_the_backward_pass_is_the_global_clip_bit_for_bit(dtype):
    everything, _ = trained("global", 0.05, False, dtype=dtype, spike=1)
    assert same(everything, trained("exact", 0.05, True, dtype=dtype, spike=1)[0])
    assert same(everything, trained("exact", 0.05, False, dtype=dtype, spike=1)[0])


def test_the_global_clip_of_fp32_gradients_is_torchs():
    model, reference = network(), network()
    backward = way(model, None, "global", 0.05, fused=False)
    for x in (model, reference):
        loss = x(pictures(0)).square().mean()
        found = (
            step_of(backward, lambda _, loss=loss: loss).grad_norm
            if x is model
            else loss.backward()
        )
        if x is model:
            whole = found
    assert whole == torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05).item()
    assert same([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


def gradients_of(clip, limit, factor=1.0, last_norm=math.nan):
    """The unclipped and the clipped gradients of one step."""
    results = []
    for mode in ("none", clip):
        model = network()
        backward = way(model, None, mode, limit, fused=False, last_norm=last_norm)
        step_of(backward, lambda _, model=model: model(pictures(0)).square().mean() * factor)
        results.append([p.grad for p in model.parameters()])
    return results


@pytest.mark.parametrize("clip", ["global", "exact"])
def test_a_gradient_is_clipped_as_soon_as_it_is_longer_than_the_bound(clip):
    whole = norm(gradients_of(clip, 1e9)[0])
    for share in (0.99, 0.7, 0.4):
        _, after = gradients_of(clip, share * whole)
        assert norm(after) == pytest.approx(share * whole, rel=1e-5)
    assert same(*gradients_of(clip, 1.01 * whole))


def test_the_rms_clip_bounds_each_tensor_by_its_share_and_the_whole_with_it():
    before, after = gradients_of("rms", 0.05, factor=100)
    total = sum(g.numel() for g in before)
    for g, clipped in zip(before, after, strict=True):
        bound = 0.05 / total**0.5
        rms = clipped.norm() / clipped.numel() ** 0.5
        assert rms == pytest.approx(min(bound, (g.norm() / g.numel() ** 0.5).item()), rel=1e-4)
    assert norm(after) <= 0.05 * (1 + 1e-5)


def test_the_lagged_clip_scales_by_the_norm_of_the_step_before():
    before, after = gradients_of("lagged", 0.05, last_norm=2.0)
    for g, clipped in zip(before, after, strict=True):
        assert torch.allclose(clipped, g * (0.05 / 2.0), rtol=1e-5)
    unbounded, same_again = gradients_of("lagged", 0.05, last_norm=0.04)
    assert same(unbounded, same_again)


def test_the_lagged_clip_measures_the_first_step_itself():
    _, after = gradients_of("lagged", 0.05)
    assert norm(after) == pytest.approx(0.05, rel=1e-4)


def test_a_spike_reaches_the_lagged_clip_one_step_late():
    _, outcomes = trained("lagged", 0.05, True, name="sgd", spike=1)
    assert outcomes[1].grad_norm > 100 * outcomes[0].grad_norm


@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_make_the_gradient_of_the_mean_over_all_samples(fused):
    """Also for micro-batches of different sizes, if their shares are given."""
    sizes = (2, 4, 6)
    model, reference = network(), network()
    kept = []
    optimizer = build("sgd", model.parameters())
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: kept.append((p, p.grad.clone())))
    backward = way(model, optimizer, "none", None, fused, count=3)
    outcome = step_of(
        backward,
        lambda place: model(pictures(place, sizes[place])).square().mean(),
        [s / 12 for s in sizes],
    )
    loss = reference(torch.cat([pictures(i, s) for i, s in enumerate(sizes)])).square().mean()
    loss.backward()
    found = dict(kept)  # the last backward pass has complete gradients
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(found[p], q.grad, rtol=1e-4, atol=1e-7)
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    assert outcome.grad_norm == pytest.approx(norm([q.grad for q in reference.parameters()]), 1e-5)


def test_the_fused_backward_keeps_gradients_until_the_last_micro_batch_and_then_frees_them():
    model = network()
    optimizer = build("adafactor8bit", model.parameters())
    backward, alive = way(model, optimizer, "none", None, True, count=2), []

    def loss_of(place):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        return model(pictures(place)).square().mean()

    before = [p.detach().clone() for p in model.parameters()]
    step_of(backward, loss_of, [0.5, 0.5])
    assert alive == [0, 6]
    assert sum(p.grad is not None for p in model.parameters()) < 6
    assert not same(before, [p.detach() for p in model.parameters()])


class Halves(nn.Module):
    """Each micro-batch uses a different half."""

    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def loss(self, place):
        return self.halves[place](torch.ones(2, 4)).square().sum()


def test_what_only_an_earlier_micro_batch_reached_is_measured_clipped_and_stepped():
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Halves()
        optimizer = build("sgd", model.parameters())
        backward = way(model, optimizer, "lagged", 0.05, fused, count=2, last_norm=1.0)
        outcome = step_of(backward, model.loss, [0.5, 0.5])
        optimizer.step()
        results.append(([p.detach() for p in model.parameters()], outcome.grad_norm))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("clip", ["exact", "lagged"])
def test_a_gradient_that_is_not_finite_is_found_before_anything_is_stepped_by_a_first_pass(clip):
    model = network()
    optimizer = build("sgd", model.parameters())
    backward = way(model, optimizer, clip, 1.0, fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    first = model[0].weight.flatten()[0]

    def loss_of(_):
        """Finite, but the derivative of the root is not."""
        return model(pictures(0)).square().mean() + (first - first.detach()).sqrt()

    outcome = step_of(backward, loss_of)
    assert math.isfinite(outcome.loss)
    assert not math.isfinite(outcome.grad_norm)
    assert not outcome.partially_applied
    assert not Guard(9).accepts(0, outcome)
    assert same(before, [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters())
    assert math.isnan(backward.clip.last_norm)


def test_the_norm_of_bf16_gradients_is_that_of_their_values_in_fp32():
    g = torch.full((3000, 3000), 1.0).bfloat16()
    assert clipping.norm_of(g).item() == pytest.approx(3000.0, rel=1e-6)
    assert clipping.norm_of(g).dtype == torch.float32


WARNED = [
    (["method.clip=exact"], "adafactor8bit bounds the RMS"),
    (["method.clip=rms", "optim=lion"], "optim=lion uses the sign"),
    (["method.clip=lagged", "optim=adamw", "optim.atan2=true"], "optim=adamw has atan2"),
    (["method.clip=lagged", "optim=sophia"], "optim=sophia clips each element"),
    (["method.clip=none", "optim=sophia"], None),
    (["method.clip=none", "experiment=low_memory", "optim=adamw"], "adamw does not bound"),
    (["optim=adamw", "optim.grad_clip=1"], "clips them again by optim.grad_clip"),
    (["method.clip=none", "method.max_grad_norm=2"], "used with a method.clip other than none"),
    (["method.clip=none"], None),
    (
        ["runtime.accumulation=2", "runtime.fused_backward=true", "method.clip=none"],
        "runtime.accumulation=2 keeps the gradients",
    ),
    (["optim=adamw", "method.clip=exact"], None),
    ([], None),
]


@pytest.mark.parametrize(("options", "says"), WARNED, ids=lambda x: str(x))
def test_a_clip_beside_another_is_pointed_out_once(composed, options, says):
    found = remarks.of_config(composed(*options))
    assert len(found) == (says is not None)
    assert says is None or says in found[0]
