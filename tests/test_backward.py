"""The fused backward: the same weights, with one bucket of gradients alive instead of all."""

import contextlib
import copy
import threading
from collections import Counter

import pytest
import torch
from helpers import assert_same, build
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

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
    assert counts[1] == [1, 1]  # the last gradient waits for `step()`, even in a full bucket
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


# Gradients that arrive twice, or never ------------------------------------------------------------

LAYER_BYTES = 64 * 64 * 4


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])


def inputs(number):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(number))


def backward(model, number):
    model(inputs(number)).square().mean().backward()


def fused_layers(bucket_layers=3):
    """Four layers: a backward pass steps one bucket and leaves the rest for `step()`."""
    model = layers()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, optim.fuse_backward(optimizer, bucket_layers * LAYER_BYTES)


def steps_of(model, optimizer):
    states = [optimizer.state.get(p, {}) for p in model.parameters()]
    return [int(state.get("step", 0)) for state in states]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("bucket_layers", [1, 3, 9])
def test_after_a_skipped_step_the_next_one_is_the_ordinary_one(bucket_layers, set_to_none):
    """Only what the skipped backward pass had already stepped stays stepped."""
    model, optimizer, _ = fused_layers(bucket_layers)
    backward(model, 0)
    before = steps_of(model, optimizer)
    optimizer.zero_grad(set_to_none)
    moved = copy.deepcopy(model)
    backward(model, 1)
    optimizer.step()
    assert steps_of(model, optimizer) == [n + 1 for n in before]
    assert all(p.grad is None for p in model.parameters())
    if bucket_layers == 9:  # nothing was stepped, as if the pass had not happened
        plain = optim.AdamW(moved.parameters(), lr=1e-2)
        backward(moved, 1)
        plain.step()
        assert_same(model.parameters(), moved.parameters())


def test_after_an_exception_inside_backward_training_goes_on():
    model, optimizer, _ = fused_layers()
    hidden = model[1](model[0](inputs(0)))

    def fail(grad):
        raise RuntimeError("out of memory")

    hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model[3](model[2](hidden)).square().mean().backward()
    optimizer.zero_grad()
    for number in (1, 2):
        backward(model, number)
        optimizer.step()
    assert steps_of(model, optimizer) == [2] * 4


def test_a_step_that_fails_inside_backward_leaves_no_gradient_waiting(monkeypatch):
    def fails(*_):
        raise MemoryError

    model = layers()
    optimizer = optim.AdamW(model.parameters())
    optim.fuse_backward(optimizer, 1)
    monkeypatch.setattr(optimizer, "_step", fails)
    with pytest.raises(MemoryError):
        backward(model, 0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bucket_layers", [1, 3, 9])
def test_two_backward_passes_without_a_step_between_them_are_an_error(bucket_layers):
    model, optimizer, hooks = fused_layers(bucket_layers)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"arrived twice.*zero_grad\(\).*holding\(\)"):
        backward(model, 1)
    with hooks.holding(), pytest.raises(RuntimeError, match="arrived twice"):
        backward(model, 1)
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    assert len(set(steps_of(model, optimizer))) <= 2


def test_gradients_that_wait_for_a_step_are_not_handed_to_another():
    model, optimizer, hooks = fused_layers()
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"wait for step\(\)"), hooks.handing_to(print):
        pass
    optimizer.step()
    seen = []
    for number in (1, 2):
        with hooks.handing_to(lambda *params: seen.extend(params)):
            backward(model, number)
    assert len(seen) == 8
    assert steps_of(model, optimizer) == [1] * 4


def test_gradients_that_come_in_two_threads_are_each_consumed_once():
    """As the gradients of two devices do."""
    model, _, hooks = fused_layers(bucket_layers=2)
    first, second, third, _ = model.parameters()
    consumed, under_way, come = [], threading.Event(), threading.Event()

    def consume(*params):
        consumed.extend(params)
        under_way.set()
        come.wait(0.2)  # torch lets other threads run here too

    def other_device():
        under_way.wait(5)
        hooks._collect(third)
        come.set()

    for p in (first, second, third):
        p.grad = torch.ones_like(p)
    thread = threading.Thread(target=other_device)
    with hooks.handing_to(consume):
        thread.start()
        hooks._collect(first)
        hooks._collect(second)
        thread.join()
        assert Counter(map(id, consumed)) == Counter(map(id, (first, second)))
        assert [p.grad is None for p in (first, second, third)] == [True, True, False]
    assert Counter(map(id, consumed)) == Counter(map(id, (first, second, third)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bucket_layers", [1, 9])
def test_a_parameter_of_two_reentrant_checkpoints_is_not_stepped_twice(bucket_layers):
    layer = nn.Linear(8, 8)
    optimizer = optim.AdamW(layer.parameters())
    optim.fuse_backward(optimizer, bucket_layers * 8 * 8 * 4)

    def loss(reentrant):
        x = torch.ones(2, 8, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x.sum()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(True).backward()
    optimizer.zero_grad()
    before = steps_of(layer, optimizer)
    loss(False).backward()
    optimizer.step()
    assert steps_of(layer, optimizer) == [n + 1 for n in before]


def unfrozen(model, optimizer):
    model[0].weight.requires_grad_(True)


def added(model, optimizer):
    optimizer.add_param_group({"params": [model[0].weight]})


def appended(model, optimizer):
    optimizer.param_groups[0]["params"].append(model[0].weight)


@pytest.mark.parametrize("later", [unfrozen, added, appended])
def test_a_parameter_that_is_trained_later_is_stepped_and_freed_like_the_others(later):
    models = layers(), layers()
    for model, fused in zip(models, (False, True), strict=True):
        model[0].weight.requires_grad_(later is not unfrozen)
        first = 0 if later is unfrozen else 1
        optimizer = optim.SGD(model[first:].parameters(), lr=1e-2)
        if fused:
            optim.fuse_backward(optimizer, 1)
        for number in range(4):
            if number == 1:
                later(model, optimizer)
                model.zero_grad()
            backward(model, number)
            if fused and number > 0 and later is not appended:  # step() finds that one
                assert all(layer.weight.grad is None for layer in model[1:])
                assert {*optimizer.fused_backward._waiting} == {model[0].weight}
            optimizer.step()
            if fused and number > 0:
                assert all(p.grad is None for p in model.parameters())
            optimizer.zero_grad()
    assert_same(models[0].parameters(), models[1].parameters())


def test_fusing_twice_is_refused_until_the_first_is_removed():
    model, optimizer, hooks = fused_layers()
    with pytest.raises(ValueError, match=r"AdamW is already fused.*remove\(\)"):
        optim.fuse_backward(optimizer)
    hooks.remove()
    optim.fuse_backward(copy.deepcopy(optimizer))
    optim.fuse_backward(optimizer, 1)
    backward(model, 0)
    optimizer.step()
    assert steps_of(model, optimizer) == [1] * 4


# Changing gradients after the backward pass -------------------------------------------------------


def scaled_step(model, optimizer, scaler, number, unscale=False):
    scaler.scale(model(inputs(number)).square().mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bucket_layers", [1, 3, 9])
def test_a_grad_scaler_is_refused_at_its_first_step_while_fused(bucket_layers, unscale):
    model, optimizer, hooks = fused_layers(bucket_layers)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"GradScaler.step: this AdamW.*load the weights again"):
        scaled_step(model, optimizer, scaler, 0, unscale)
    optimizer.zero_grad()
    hooks.remove()
    before = steps_of(model, optimizer)
    scaled_step(model, optimizer, torch.amp.GradScaler("cpu"), 1, unscale)
    assert steps_of(model, optimizer) == [n + 1 for n in before]


def test_a_grad_scaler_that_is_disabled_may_step_a_fused_optimizer():
    model, optimizer, _ = fused_layers()
    scaled_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0)
    assert steps_of(model, optimizer) == [1] * 4


def clipped_by_torch(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def left_alone_by_torch(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def clipped_by_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def replaced(model):
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad * 0.5


CHANGES = [clipped_by_torch, left_alone_by_torch, clipped_by_value, replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_were_changed_when_others_had_been_stepped_are_an_error(change):
    model, optimizer, _ = fused_layers()
    backward(model, 0)
    change(model)
    before = copy.deepcopy(model)
    says = r"1 of 4 gradients were changed.*grad_clip.*method.clip=exact, lagged or rms"
    with pytest.raises(RuntimeError, match=says):
        optimizer.step()
    assert_same(model.parameters(), before.parameters())
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert steps_of(model, optimizer) == [1, 2, 2, 2]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("held", [False, True])
def test_gradients_of_which_none_was_stepped_may_be_changed_before_the_step(change, held):
    """All gradients wait, because their bucket is not full or because they are held."""
    models = layers(), layers()
    for model, fused in zip(models, (False, True), strict=True):
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        hooks = optim.fuse_backward(optimizer, (1 if held else 9) * LAYER_BYTES) if fused else None
        for number in range(2):
            with hooks.holding() if hooks and held else contextlib.nullcontext():
                backward(model, number)
            change(model)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(models[0].parameters(), models[1].parameters())


def test_a_closure_that_clips_what_is_left_is_an_error_too():
    model, optimizer, _ = fused_layers()

    def closure():
        backward(model, 0)
        clipped_by_torch(model)

    with pytest.raises(RuntimeError, match="1 of 4 gradients were changed"):
        optimizer.step(closure)


def test_an_optimizer_of_others_is_refused():
    says = r"torch.optim.adamw.AdamW is not an optimizer of this family.*optim.FAMILY"
    with pytest.raises(TypeError, match=says):
        optim.fuse_backward(torch.optim.AdamW(layers().parameters()))


# Several processes --------------------------------------------------------------------------------


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)


def test_several_processes_are_refused_with_the_remedy(request):
    model, optimizer, hooks = fused_layers()
    request.getfixturevalue("two_processes")
    with pytest.raises(ValueError, match=r"2 processes.*Call step\(\) after backward\(\)"):
        backward(model, 0)  # fused before torch.distributed was initialized
    hooks.remove()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        optim.fuse_backward(optimizer)
    optim.fuse_backward(optimizer, summed=True).remove()
    optimizer.zero_grad()
    backward(model, 0)
    optimizer.step()


def test_the_end_of_an_optimizer_is_the_end_of_its_hooks():
    model = layers()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    optim.fuse_backward(optimizer, 1)
    del optimizer
    before = copy.deepcopy(model)
    backward(model, 0)
    assert_same(model.parameters(), before.parameters())
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    second = optim.SGD(model.parameters(), lr=1.0)
    optim.fuse_backward(second, 1)
    backward(model, 0)
    second.step()
    assert not torch.equal(model[0].weight, before[0].weight)


def test_a_parameter_is_stepped_inside_backward_by_one_optimizer():
    model, _, _ = kept = fused_layers()
    other = optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"by another optimizer.*remove\(\)"):
        optim.fuse_backward(other)
    assert other.fused_backward is None
    kept[2].remove()
    optim.fuse_backward(other)


def test_parameters_that_leave_the_groups_lose_their_hooks():
    model, optimizer, _ = fused_layers()
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [model[0].weight]})
    backward(model, 0)
    optimizer.step()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_holding_inside_of_holding_goes_on_holding():
    model, optimizer, hooks = fused_layers()
    with hooks.holding():
        with hooks.holding():
            backward(model, 0)
        backward(model, 1)
        assert all(p.grad is not None for p in model.parameters())
    backward(model, 2)
    optimizer.step()


def test_a_clip_is_seen_even_where_the_last_gradient_fills_a_bucket():
    """A token embedding's gradient comes last and is larger than a bucket."""
    model, optimizer = layers(), None
    optimizer = optim.SGD(model.parameters())
    optim.fuse_backward(optimizer, model[0].weight.nbytes)
    backward(model, 0)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-6) > 0
    with pytest.raises(RuntimeError, match="gradients were changed"):
        optimizer.step()


def test_what_wraps_an_optimizer_is_told_apart():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    with pytest.raises(TypeError, match=r"Wrapper wraps a SGD.*\.optimizer"):
        optim.fuse_backward(Wrapper(optim.SGD(layers().parameters())))


def test_a_weight_that_a_graph_still_needs_is_not_stepped_unseen():
    """The gradient of x needs W's old value, which is gone."""
    weight = nn.Parameter(torch.eye(4))
    x = nn.Parameter(torch.ones(2, 4))
    optimizer = optim.SGD([x, weight], lr=1.0)
    optim.fuse_backward(optimizer, 1)
    # W is used twice, once detached: its gradient is complete before its last use in backward.
    early = nn.functional.linear(x, weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nn.functional.linear(early, weight).sum().backward()


def test_a_handle_that_has_been_removed_does_nothing_more():
    _model, optimizer, first = fused_layers()
    first.remove()
    second = optim.fuse_backward(optimizer, 1)
    first.remove()
    assert optimizer.fused_backward is second
    second.remove()
    assert optimizer.fused_backward is None
    third = optim.fuse_backward(optimizer)
    del optimizer
    third.remove()


def test_a_group_whose_parameters_another_optimizer_steps_is_not_added():
    model, _optimizer, _ = fused_layers()
    other = optim.SGD([nn.Parameter(torch.ones(2))])
    optim.fuse_backward(other)
    with pytest.raises(ValueError, match="is already stepped inside"):
        other.add_param_group({"params": [model[0].weight]})
    assert len(other.param_groups) == 1
    other.step()
