"""Parameters, gradients and moments whose memory is unusual."""

import warnings

import pytest
import torch
from helpers import assert_same
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

import optim


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(64, 64), (16,), (2, 8)])
def test_a_gradient_of_another_shape_than_its_parameter_is_refused(shape, backend):
    """For example, a resized embedding that kept its old gradient."""
    p = Parameter(torch.ones(4, 4))
    optimizer = optim.SGD([Parameter(torch.ones(2)), p], backend=backend)
    p.grad = torch.ones(4, 4)
    p.data = torch.ones(shape)
    with pytest.raises(ValueError, match=r"parameter 1 .*its gradient \(4, 4\).*zero_grad"):
        optimizer.step()


def test_a_state_that_is_not_contiguous_is_made_so():
    straight, odd = (Parameter(torch.ones(6, 8)) for _ in range(2))
    optimizers = [optim.AdamW([p]) for p in (straight, odd)]
    for step in range(3):
        for p, optimizer in zip((straight, odd), optimizers, strict=True):
            p.grad = torch.arange(48.0).view(6, 8) * (step + 1)
            optimizer.step()
        state = optimizers[1].state[odd]
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()
    assert torch.equal(straight, odd)


@pytest.mark.parametrize("count", [50, 200, 250])
def test_moments_that_are_moved_between_steps_are_followed(count):
    """As an offloader moves them; it leaves small tensors in place."""
    ordinary, moved = ([Parameter(torch.ones(4)) for _ in range(count)] for _ in range(2))
    first, second = optim.AdamW(ordinary), optim.AdamW(moved)
    for step in range(8):
        for params, optimizer in ((ordinary, first), (moved, second)):
            for p in params:
                p.grad = torch.full((4,), float(step % 3) - 0.5)
            optimizer.step()
        for p in moved:
            for name in ("exp_avg", "exp_avg_sq"):
                moment = second.state[p][name]
                old, moment.data = moment.data, moment.data.clone()
                old.fill_(torch.nan)
    assert_same(ordinary, moved)


def test_a_gradient_whose_signs_are_still_to_be_turned_is_read_right():
    w = Parameter(torch.tensor(1.0))
    z = torch.complex(torch.tensor(1.0), w).conj()
    (z * z).real.backward()
    assert w.grad.is_neg()
    optim.SGD([w], lr=0.1, momentum=0.0).step()
    assert w.item() == pytest.approx(1.2)


def test_tensors_without_memory_of_their_own_are_stepped_by_plain_pytorch():
    p = Parameter(TwoTensor(torch.ones(8, 8), torch.ones(8, 8)))
    p.grad = TwoTensor(torch.ones(8, 8), torch.ones(8, 8))
    with warnings.catch_warnings(record=True):
        optim.SGD([p], lr=0.5, momentum=0.0).step()
    assert torch.equal(p.detach().a, torch.full((8, 8), 0.5))
    q = Parameter(torch.ones(8, 8))
    q.grad = torch._efficientzerotensor(8, 8)
    optim.SGD([q], lr=0.5, momentum=0.0).step()
    assert torch.equal(q, torch.ones(8, 8))
