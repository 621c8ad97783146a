"""The fused backward: the same weights, with a bucket of gradients alive instead of all of them."""

import pytest
import torch
from helpers import build
from torch import nn

import optim

NAMES = sorted(optim.FAMILY)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(512, 24), nn.Linear(24, 1)
    ).to(dtype)


def train(model, optimizer, steps, seen=None):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
        model(x).square().mean().backward()
        if seen is not None:
            seen.append(sum(p.grad is not None for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fused_and_unfused_weights_are_bitwise_equal(name, dtype, bucket_bytes):
    plain, fused = network(dtype), network(dtype)
    train(plain, build(name, plain.parameters()), 3)
    optimizer = build(name, fused.parameters())
    optim.fuse_backward(optimizer, bucket_bytes)
    train(fused, optimizer, 3)
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_freed_as_soon_as_a_bucket_is_full():
    counts = {}
    for bucket_bytes in (1, 45_000, 64 << 20):
        model = network()
        optimizer = optim.build("adafactor8bit", model.parameters())
        optim.fuse_backward(optimizer, bucket_bytes)
        counts[bucket_bytes] = []
        train(model, optimizer, 2, counts[bucket_bytes])
        assert all(p.grad is None for p in model.parameters())
    assert counts[1] == [0, 0]
    assert counts[64 << 20] == [6, 6]
    assert counts[45_000] == [2, 2]


def test_removing_the_hooks_gives_the_ordinary_loop_back():
    model = network()
    optimizer = optim.build("adamw", model.parameters())
    hooks = optim.fuse_backward(optimizer, 1)
    hooks.remove()
    seen = []
    train(model, optimizer, 1, seen)
    assert seen == [6]


def test_parameters_in_no_group_or_without_gradients_are_refused():
    model = network()
    optimizer = optim.build("adamw", model[0].parameters())
    with pytest.raises(ValueError, match="in no parameter group"):
        optimizer.step_param(model[3].weight)
    with pytest.raises(ValueError, match="has no gradient"):
        optimizer.step_param(model[0].weight)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    model[3].weight.grad = torch.ones_like(model[3].weight)
    optimizer.step_param(model[3].weight)
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        optim.fuse_backward(optimizer, 0)
