"""Sophia: its estimate is the Gauss-Newton diagonal of the loss; when and how it is made."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from helpers import assert_same, make_params, run, set_grads
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim import gpu
from trainer.objective import batches, losses, noise
from trainer.streams import Stream
from trainer.training import curvature, gradients
from trainer.training.clipping import Clip


class Pointwise(nn.Module):
    """A UNet that is linear in its weights: (B, 4, h, w), each pixel times a (4, 4) matrix."""

    def __init__(self):
        super().__init__()
        self.matrix = Parameter(torch.zeros(4, 4))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, noisy, timesteps, **conditions):
        return SimpleNamespace(sample=torch.einsum("oc,bchw->bohw", self.matrix, noisy))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 5, 2, generator=generator) * torch.arange(1, 5).view(1, 4, 1, 1)
    nothing = torch.zeros(3, 1)
    return batches.Batch(
        latents=torch.zeros_like(noisy),
        noisy=noisy,
        target=torch.randn(3, 4, 5, 2, generator=generator),
        timesteps=torch.zeros(3, dtype=torch.int64),
        time=torch.zeros(3, dtype=torch.int64),
        prompt=nothing,
        pooled=nothing,
        time_ids=nothing,
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_trainers_estimates_average_to_the_hessian_of_the_loss(
    batch, loss_config, make_schedule, weighted
):
    """For a linear model, whose Gauss-Newton matrix is its Hessian; with and without weights of
    samples, timesteps and positions."""
    config, noise_schedule = loss_config(), make_schedule()
    if weighted:
        config.weighting, batch.timesteps = "min_snr", torch.tensor([0, 400, 999])
        batch.loss_weights = torch.tensor([4.0, 0.0, 1.0])
        batch.mask = torch.ones(3, 1, 5, 2)
        batch.mask[:, :, 2:] = 0
    unet, draws = Pointwise(), 1500
    optimizer = optim.Sophia(unet.parameters(), betas=(0.9, 0.0))  # keeps the last estimate only
    backward = gradients.GatheredBackward([], Clip("none", 1.0, []))
    total = torch.zeros(4, 4)

    def predict():
        return batches.predict(unet, batch), losses.factor(config, noise_schedule, batch)

    for step in range(draws):
        curvature.estimate(optimizer, backward, predict, seed=0, step=step)
        total += optimizer.state[unet.matrix]["hessian"]

    def loss(matrix):
        prediction = torch.einsum("oc,bchw->bohw", matrix, batch.noisy)
        return losses.loss(config, noise_schedule, prediction, batch)

    hessian = torch.autograd.functional.hessian(loss, unet.matrix.detach())
    diagonal = hessian.view(16, 16).diagonal().view(4, 4)
    ratio = total / draws / diagonal
    assert ratio.mean().item() == pytest.approx(1, abs=0.03)  # four standard deviations
    assert (ratio - 1).abs().max() < 0.17
    assert torch.equal(unet.matrix, torch.zeros(4, 4))


def test_a_weighted_loss_wants_noise_over_the_root_of_its_weights():
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(6, 5, generator=generator), torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 9.0])
    w, draws = Parameter(torch.zeros(5)), 4000
    optimizer, total = optim.Sophia([w], betas=(0.9, 0.0)), torch.zeros(5)
    for _ in range(draws):
        prediction = x @ w
        noise = torch.randn(6, generator=generator) / c.sqrt()
        (c * (prediction - prediction.detach() - noise).square()).mean().backward()
        optimizer.update_hessian(6 / 2)
        total += optimizer.state[w]["hessian"]
    exact = 2 / 6 * (c[:, None] * x.square()).sum(dim=0)
    assert torch.allclose(total / draws, exact, rtol=0.1)


def test_noise_of_an_estimate_depends_on_its_counters_and_is_not_the_batchs():
    like = torch.zeros(4, 2, 2)
    first, again = (curvature.bartlett_noise(like, 3, 0, 7) for _ in range(2))
    assert torch.equal(first, again)
    others = [
        curvature.bartlett_noise(like, 3, 1, 7),
        curvature.bartlett_noise(like, 3, 0, 8),
        torch.stack([noise.normal(like.shape, Stream.NOISE, 0, 7, i) for i in range(3)]),
        first.roll(1, dims=0),
    ]
    assert all(not torch.equal(first, other) for other in others)


def test_an_element_whose_error_counts_more_has_that_many_times_the_curvature():
    weight, factor = Parameter(torch.zeros(1, 2, 3, 1)), torch.tensor([4.0, 0.25, 1.0])
    estimates = []
    for counts in (None, factor.view(1, 1, 3, 1)):
        optimizer = optim.Sophia([weight])
        backward = gradients.GatheredBackward([weight], Clip("none", 1.0, [weight]))
        curvature.estimate(optimizer, backward, lambda counts=counts: (weight * 1, counts), 0, 0)
        estimates.append(optimizer.state[weight]["hessian"])
    assert (estimates[0] > 0).all()
    torch.testing.assert_close(estimates[1], estimates[0] * factor.view(1, 1, 3, 1))


def test_the_trajectory_is_sophia_h_of_pytorch_optimizer_given_the_same_curvature():
    """clip(m / max(h, eps), p) with p = rho is rho times our clip(m / max(rho h, rho eps), 1)."""
    shapes, rho, scale = [(24, 16), (24,)], 0.04, 3.0
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    optimizer = optim.build("sophia", ours, lr=1e-2, rho=rho, eps=rho * 1e-3, weight_decay=0.1)
    peer = pytorch_optimizer.SophiaH(
        theirs,
        lr=1e-2 / rho,
        betas=(0.965, 0.99),
        p=rho,
        eps=1e-3,
        weight_decay=0.1 * rho,
        update_period=10**9,
    )
    peer.zero_hessian(peer.param_groups, peer.state)
    clipped = 0
    for step in range(60):
        hessian = None
        if step % 10 == 0:
            assert optimizer.wants_hessian()
            set_grads(ours, 1000 + step)
            hessian = [scale * p.grad.square() for p in ours]
            optimizer.update_hessian(scale)
        set_grads(ours, step)
        set_grads(theirs, step)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        peer.step(hessian=hessian)
        for p, old in zip(ours, before, strict=True):
            moved = p - old * (1 - 1e-2 * 0.1)
            assert moved.abs().max() <= 1e-2 * 1.001
            clipped += int((moved.abs() > 0.999e-2).sum())
    assert 0 < clipped < 60 * (24 * 16 + 24)
    for p, q, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (p - q).norm() <= 3e-5 * (q - start).norm()


def test_an_estimate_is_due_before_the_first_step_and_every_so_many():
    params = make_params()
    optimizer = optim.build("sophia", params, hessian_every=3)
    due = []
    for step in range(8):
        due.append(optimizer.wants_hessian())
        run(optimizer, params, [step])
    assert due == [True, False, False, True, False, False, True, False]
    twin = optim.build("sophia", params)
    twin.load_state_dict(optimizer.state_dict())
    assert not twin.wants_hessian()
    run(twin, params, [8])
    assert twin.wants_hessian()


def blind_steps(optimizer, params, steps):
    """The warnings issued in these steps."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(optimizer, params, steps)
    return [str(each.message) for each in said if each.category is optim.IdleOption]


@pytest.mark.parametrize("storage", ["fp32", "8bit", "factored"])
def test_a_loop_without_any_estimate_is_told_once(storage):
    params = make_params(shapes=[(12, 8), (9,)])
    optimizer = optim.build("sophia", params, hessian_every=3, storage=storage)
    assert blind_steps(optimizer, params, range(2)) == []
    (said,) = blind_steps(optimizer, params, range(2, 20))
    assert "3 steps were made without one" in said
    assert "hessian_every=3" in said
    assert "update_hessian()" in said


@pytest.mark.parametrize("storage", ["fp32", "8bit", "factored"])
@pytest.mark.parametrize("due", [0, 2])
def test_a_loop_with_an_estimate_is_told_nothing_nor_is_one_that_goes_on_from_it(due, storage):
    params = make_params(shapes=[(12, 8), (9,)])
    optimizer = optim.build("sophia", params, hessian_every=3, storage=storage)
    assert blind_steps(optimizer, params, range(due)) == []
    set_grads(params, 100)
    optimizer.update_hessian(2.0)
    twin = optim.build("sophia", params, hessian_every=3, storage=storage)
    run(optimizer, params, [due])
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin, copy.deepcopy(optimizer)):
        own = each.param_groups[0]["params"]
        assert blind_steps(each, own, range(9)) == []


def test_an_estimate_moves_no_weight_skips_bad_elements_and_clears_the_gradients():
    params = make_params(torch.bfloat16, [(12, 8), (9,)])
    optimizer = optim.build("sophia", params)
    run(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    averages = [optimizer.state[p]["exp_avg"].clone() for p in params]
    set_grads(params, 2)
    params[0].grad[1, 1] = math.nan
    optimizer.update_hessian(2.0)
    assert_same(params, before)
    assert_same([optimizer.state[p]["exp_avg"] for p in params], averages)
    assert all(p.grad is None for p in params)
    assert optimizer.nonfinite_count() == 1
    hessian = optimizer.state[params[0]]["hessian"]
    assert hessian[1, 1] == 0
    assert (hessian > 0).sum() == 12 * 8 - 1
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call backward\(\)"):
        optimizer.update_hessian(2.0)


def test_an_estimate_raises_before_anything_changes_where_steps_do():
    params = make_params(shapes=[(4,), (12, 8)])
    optimizer = optim.build("sophia", params, on_nonfinite="raise")
    run(optimizer, params, range(2))
    before = copy.deepcopy(list(optimizer.state.values()))
    set_grads(params, 2)
    params[1].grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"1 of 96 gradient elements of parameter 1"):
        optimizer.update_hessian(2.0)
    for old, new in zip(before, optimizer.state.values(), strict=True):
        assert_same(old.values(), new.values())
    assert all(p.grad is not None for p in params)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_estimate_refuses_a_state_that_does_not_fit_before_anything_changes(backend):
    params = make_params(shapes=[(4,), (12, 8)])
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = optim.build("sophia", groups, backend=backend)
    run(optimizer, params, range(2))
    before = copy.deepcopy(list(optimizer.state.values()))
    optimizer.param_groups[1]["storage"] = "bf16"
    set_grads(params, 2)
    with pytest.raises(ValueError, match=r"state of parameter 1 \(12, 8\) does not fit Sophia"):
        optimizer.update_hessian(2.0)
    for old, new in zip(before, optimizer.state.values(), strict=True):
        assert_same(old.values(), new.values())


@pytest.mark.parametrize("scale", [-2.0, 0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    params = make_params(shapes=[(4,)])
    optimizer = optim.build("sophia", params)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=f"scale={scale} is not possible; it must be a number > 0"):
        optimizer.update_hessian(scale)
    assert params[0] not in optimizer.state


def test_an_estimate_with_an_impossible_option_is_refused():
    params = make_params(shapes=[(4,)])
    optimizer = optim.build("sophia", params)
    optimizer.param_groups[0]["betas"] = (0.9, 2.0)
    set_grads(params, 0)
    with pytest.raises(ValueError, match="betas"):
        optimizer.update_hessian(1.0)
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 64 << 20])
@pytest.mark.parametrize("storage", ["fp32", "8bit", "factored"])
def test_an_estimate_inside_the_fused_backward_is_bitwise_the_same(storage, bucket_bytes):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 8)).to(torch.bfloat16)
        optimizer = optim.build("sophia", model.parameters(), storage=storage, hessian_every=2)
        hooks = optim.fuse_backward(optimizer, bucket_bytes) if fused else None
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            x = torch.randn(16, 12, generator=generator).to(torch.bfloat16)
            noise = torch.randn(16, 8, generator=generator).to(torch.bfloat16)
            if optimizer.wants_hessian():
                assert step % 2 == 0
                prediction = model(x)
                sampled = F.mse_loss(prediction, prediction.detach() + noise)
                if hooks:
                    with hooks.handing_to(lambda *params: optimizer.update_hessian(64, params)):  # noqa: B023
                        sampled.backward()
                else:
                    sampled.backward()
                    optimizer.update_hessian(64)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([*model.parameters()])
        assert all((optimizer.state[p]["step"] == 6).all() for p in model.parameters())
    assert_same(*weights)


def test_curvature_that_is_known_shortens_steps_where_it_is_large():
    """In a bowl steep in one direction and flat in the other, only the flat step is clipped."""
    p = Parameter(torch.ones(2))
    optimizer = optim.Sophia([p], lr=0.1, betas=(0.0, 0.0), rho=1.0, weight_decay=0.0)
    p.grad = torch.tensor([10.0, 0.1])  # its square is the curvature
    optimizer.update_hessian(1.0)
    p.grad = torch.tensor([10.0, 0.1])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([1 - 0.1 * 0.1, 1 - 0.1]))


class NoReading(TorchDispatchMode):
    """Forbids reading a number on the host, which would wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return function(*args, **kwargs or {})


def test_when_an_estimate_is_due_is_asked_of_no_device_at_every_step():
    params = make_params()
    optimizer = optim.build("sophia", params, hessian_every=3)
    run(optimizer, params, range(2))
    with pytest.raises(AssertionError, match="a number is read"), NoReading():
        optimizer.wants_hessian()
    assert not optimizer.wants_hessian()
    for step in range(2, 6):
        run(optimizer, params, [step])
        optimizer.zero_grad()
        optimizer.step()  # no gradients, so no step
        with NoReading():
            assert optimizer.wants_hessian() == (step in (2, 5))


def test_after_a_capture_the_steps_of_a_graphs_replays_are_counted(monkeypatch):
    params = make_params()
    optimizer = optim.build("sophia", params, hessian_every=3)
    run(optimizer, params, [0])
    assert not optimizer.wants_hessian()
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "capturing", lambda: True)
        run(optimizer, params, [1])  # a GPU would only record this
    due = []
    for _ in range(4):
        due.append(optimizer.wants_hessian())
        for state in optimizer.state.values():
            state["step"] += 1  # as a replay does
    assert due == [False, True, False, False]
