"""The native engine caches addresses, but notices every change to weights, groups and state between
two steps."""

import copy
import subprocess
import sys
import weakref

import pytest
import torch
from helpers import assert_same, make_params, run, set_grad, set_grads
from torch.nn import Parameter

import optim
from optim import engine, native

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")
SHAPES = [(24, 16), (16, 3, 3, 3), (24,)]
NAMES = [
    *("adamw", "adamw8bit", "adopt_factored", "adafactor8bit"),
    *("apollo_mini", "sophia"),
]
pytestmark = pytest.mark.usefixtures("no_wishes")


def build(name="sgd", **options):
    return optim.build(name, make_params(shapes=SHAPES), **options)


def poison(x):
    """Overwrite memory that must not be used any more."""
    return x.detach().fill_(127 if x.dtype in (torch.int8, torch.uint8) else 9000)


def moved_weights(optimizer, params):
    for p in params:
        old, p.data = p.data, p.data.clone() * 2
        yield poison(old)


def cast_weights(optimizer, params):
    for p in params:
        old, p.data = p.data, p.data.to(torch.bfloat16)
        p.grad = None
        yield poison(old)


def transposed_weights(optimizer, params):
    for p in params:
        if p.ndim == 2:
            old, p.data = p.data, p.data.clone().t().contiguous().t()
            yield poison(old)


def replaced_tensors(optimizer, params):
    """Like code that moves states between devices."""
    for state in optimizer.state.values():
        for key, old in list(state.items()):
            state[key] = old.clone()
            yield poison(old)


def replaced_data(optimizer, params):
    for state in optimizer.state.values():
        for x in state.values():
            old, x.data = x.data, x.data.clone()
            yield poison(old)


def replaced_states(optimizer, params):
    for p in params:
        old = optimizer.state[p]
        optimizer.state[p] = {key: x.clone() for key, x in old.items()}
        yield [poison(x) for x in old.values()]


def cleared_states(optimizer, params):
    yield from (poison(x) for state in optimizer.state.values() for x in state.values())
    optimizer.state.clear()


def reloaded(optimizer, params):
    yield [state for state in optimizer.state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def reloaded_in_another_layout(optimizer, params):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for key, x in state.items():
            if x.ndim == 2:
                state[key] = x.t().contiguous().t()
    optimizer.load_state_dict(saved)
    yield None


def other_options(optimizer, params):
    (group,) = optimizer.param_groups
    group |= {"lr": 0.3, "weight_decay": 0.5, "seed": 4, "cautious": True, "grad_clip": 0.1}
    if "betas" in group:
        group["betas"] = (0.5, 0.6)
    yield None


def tensor_rate(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    yield None


def new_group(optimizer, params):
    added = [Parameter(torch.full((7, 3), 0.5)), Parameter(torch.full((2, 2), 0.5))]
    optimizer.add_param_group({"params": added, "lr": 0.2})
    params += added
    yield None


def reordered(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()
    yield None


def appended(optimizer, params):
    params.append(Parameter(torch.full((7, 3), 0.5)))
    optimizer.param_groups[0]["params"].append(params[-1])
    yield None


def replaced_parameter(optimizer, params):
    """By one of another shape: the old `params[0]` keeps its state but is no longer stepped."""
    params[0] = optimizer.param_groups[0]["params"][0] = Parameter(torch.full((50, 60), 0.5))
    yield None


def split_groups(optimizer, params):
    (group,) = optimizer.param_groups
    rest = {**group, "params": group["params"][1:], "lr": 0.2}
    group["params"] = group["params"][:1]
    optimizer.param_groups.append(rest)
    yield None


def dropped_group(optimizer, params):
    """Drop the first, empty group: the others are renumbered, their parameters are not."""
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": [], "lr": 77.0})
    set_grads(params, 50)
    optimizer.step()
    del optimizer.param_groups[0]
    yield None


SURGERY = [
    moved_weights,
    cast_weights,
    transposed_weights,
    replaced_tensors,
    replaced_data,
    replaced_states,
    cleared_states,
    reloaded,
    reloaded_in_another_layout,
    other_options,
    tensor_rate,
    new_group,
    reordered,
    appended,
    replaced_parameter,
    split_groups,
    dropped_group,
]


@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("surgery", SURGERY)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_done_between_two_steps_is_seen(name, surgery, chosen):
    """Results match a fresh copy on plain PyTorch, which has cached nothing."""

    def prepared(backend):
        params = make_params(shapes=SHAPES)
        optimizer = optim.build(name, params, lr=0.01, weight_decay=0.1, backend=backend)
        run(optimizer, params, range(2))
        return params, optimizer, list(surgery(optimizer, params))

    wanted, fresh = copy.deepcopy(prepared("torch")[:2])
    params, optimizer, _kept = prepared(chosen)  # keep its memory from being reused
    run(fresh, wanted, range(2, 4))
    run(optimizer, params, range(2, 4))
    assert all(x.isfinite().all() for x in wanted)
    off = [(a.float() - b.float()).abs().max().item() for a, b in zip(wanted, params, strict=True)]
    assert max(off) <= (0.02 if surgery is cast_weights else 2e-4), off


@needs_native
@pytest.mark.parametrize("asked", [1, 2, 5])
def test_a_state_that_was_moved_is_seen_by_asking_few_tensors_of_many(asked, monkeypatch):
    """After any number of steps, whichever tensors are checked next."""
    monkeypatch.setattr(engine, "_ASKED", asked)
    for steps in range(1, 8):
        results = []
        for chosen in ("torch", "native"):
            params = make_params(shapes=SHAPES)
            optimizer = optim.build("adamw_factored", params, lr=0.01, backend=chosen)
            run(optimizer, params, range(steps))
            _kept = list(replaced_data(optimizer, params))
            run(optimizer, params, range(steps, steps + 2))
            results.append(params)
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 2e-4


@needs_native
def test_an_option_that_needs_state_which_is_not_there_is_an_error():
    """In a new process: following a null address would crash this one."""
    code = """
import torch, optim
for name, *befores, change in [
    ("adafactor", {"growth_limit": 1.01}),
    ("adafactor", {"clip_norm": "lagged"}),
    ("adafactor", {"clip_threshold": None, "clip_norm": "lagged"}, {"clip_threshold": 1.0}),
    ("adafactor", {"beta1": 0.9}),
    ("adamw", {"storage": "8bit"}),
]:
    for backend in ("torch", "native"):
        p = torch.nn.Parameter(torch.ones(3, 5))
        p.grad = torch.ones(3, 5)
        before = befores[0] if befores else {}
        optimizer = optim.build(name, [p], backend=backend, **before)
        optimizer.step()
        optimizer.param_groups[0].update(change)
        try:
            optimizer.step()
        except (KeyError, ValueError):
            pass
        else:
            print(name, backend, "steps with", change)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    "change", [{"rank": 6}, {"rank": 1}, {"growth_limit": 1.01}, {"storage": "bf16"}], ids=str
)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_native)])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_stepped(chosen, which, change):
    """Even by APOLLO, whose step has separate parts for projections, weights and other tensors."""
    params = make_params(shapes=SHAPES)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = optim.build("apollo", groups, rank=4, growth_limit=None, backend=chosen)
    run(optimizer, params, range(1))
    before = copy.deepcopy((params, [optimizer.state[p] for p in params]))
    optimizer.param_groups[which].update(change)
    wrong = [r"0 \(24, 16\)", r"1 \(16, 3, 3, 3\)"][which]
    with pytest.raises(ValueError, match=f"state of parameter {wrong} does not fit Apollo"):
        run(optimizer, params, range(1, 2))
    assert_same(before[0], params)
    for old, param in zip(before[1], params, strict=True):
        assert_same(old.values(), optimizer.state[param].values())


@needs_native
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("sgd", {"momentum": 0.9}, {"momentum": 0.0}), ("adafactor", {"beta1": 0.9}, {"beta1": None})],
)
def test_a_moment_that_is_no_longer_kept_is_no_longer_written(name, before, after):
    """It may be freed.  A factored moment changes when it is read and written again."""
    params = make_params(shapes=[(24, 16), (16, 3, 3, 3)])
    optimizer = optim.build(name, params, backend="native", storage="factored", **before)
    run(optimizer, params, range(2))
    old = [optimizer.state[p]["exp_avg.row"] for p in params]
    as_they_were = [x.clone() for x in old]
    optimizer.state.clear()
    optimizer.param_groups[0].update(after)
    run(optimizer, params, range(2, 4))
    assert_same(old, as_they_were)
    assert not any("exp_avg.row" in state for state in optimizer.state.values())


@needs_native
def test_a_state_on_another_device_than_its_parameter_is_refused_with_the_remedy():
    """In a new process: the native engine would follow an address of another device."""
    names = ("adamw", "adafactor8bit", "apollo_mini")
    code = f"""
import torch, optim
for name in {names!r}:
    p = torch.nn.Parameter(torch.ones(24, 16))
    p.grad = torch.ones(24, 16)
    optimizer = optim.build(name, [p], backend="native")
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.state[p] = {{name: x.to("meta") for name, x in optimizer.state[p].items()}}
    try:
        optimizer.step()
    except ValueError as error:
        print(error)
    optimizer.load_state_dict(saved)
    optimizer.step()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for line in lines:
        assert "parameter 0 (24, 16) is on cpu" in line
        assert "on meta; optimizer.load_state_dict" in line


@needs_native
@pytest.mark.parametrize(
    ("name", "options"),
    [("sgd", {"momentum": 0.8}), ("adamw", {"betas": (0.8, 0.9)}), ("adafactor", {"beta1": 0.8})],
)
def test_a_schedule_of_an_options_value_makes_no_new_launches(name, options, monkeypatch):
    start = {"beta1": 0.9} if name == "adafactor" else {}
    optimizer = build(name, backend="native", **start)
    params = optimizer.param_groups[0]["params"]
    run(optimizer, params, range(1))
    monkeypatch.setattr(engine, "Work", None)  # making one fails
    optimizer.param_groups[0].update(options)
    run(optimizer, params, range(1, 2))


@needs_native
def test_weights_of_another_size_than_their_state_are_refused():
    for chosen in ("torch", "native"):
        optimizer = build(backend=chosen)
        params = optimizer.param_groups[0]["params"]
        run(optimizer, params, range(1))
        params[0].data = torch.ones(3, 5)
        params[0].grad = torch.ones(3, 5)
        with pytest.raises((ValueError, RuntimeError)):
            optimizer.step()


@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_native)])
def test_weights_of_another_shape_than_their_factors_are_refused(chosen):
    param = Parameter(torch.ones(30, 20))
    optimizer = optim.build("adafactor", [param], backend=chosen)
    run(optimizer, [param], range(1))
    param.data = torch.ones(20, 30)
    with pytest.raises((ValueError, RuntimeError)):
        run(optimizer, [param], range(1, 2))


@needs_native
def test_sets_of_parameters_are_prepared_once_whatever_the_dtype_of_gradients(monkeypatch):
    """Like the buckets of a fused backward."""
    params = [Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optim.build("adafactor8bit", params, backend="native")
    for _ in range(2):
        for p in params:
            optimizer.step_param(p)
        monkeypatch.setattr(engine, "Work", None)  # making one fails


@needs_native
def test_what_is_prepared_for_sets_of_parameters_that_vary_stays_bounded():
    """A recurring set is prepared only once."""
    params = [Parameter(torch.ones(4)) for _ in range(20)]
    optimizer = optim.build("sgd", params, backend="native")
    made = set()
    for step in range(1, 200):
        for i, p in enumerate(params):
            p.grad = torch.ones(4) if (step >> i % 8) & 1 or step % 2 else None
        for p in params if step % 2 else []:
            p.grad = torch.ones(4)
        optimizer.step()
        (only,) = optimizer._dispatch.engines.values()
        if step % 2:
            made.add(id(only._work[tuple(range(20))]))
    assert sum(map(len, only._work)) <= 8 * len(params)
    assert len(made) == 1


@needs_native
def test_a_state_that_comes_back_is_found_again_by_every_set_of_parameters():
    results = []
    for chosen in ("torch", "native"):
        params = make_params(shapes=SHAPES)
        optimizer = optim.build("adamw", params, backend=chosen, lr=0.1)
        run(optimizer, params, range(1))
        first = optimizer.state[params[0]]
        other = {key: x.clone() for key, x in first.items()}
        for state in (other, first):
            optimizer.state[params[0]] = state
            if state is other:
                optimizer.step_param(params[0])  # a different set from that of `step`
            else:
                optimizer.step()
        results.append([*params, *first.values(), *other.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_the_default_device_is_not_where_the_engine_keeps_its_tables(name):
    results = []
    for device in ("cpu", "meta"):
        params = make_params(shapes=SHAPES)
        optimizer = optim.build(name, params, backend="native")
        for step in range(2):
            set_grads(params, step)
            with torch.device(device):
                optimizer.step()
        results.append(params)
    assert_same(*results)


def test_gradients_of_another_dtype_in_between_are_read_as_what_they_are():
    """`step` and `step_param` share the engine's cached data of a parameter."""
    results = []
    for chosen in ("native", "torch"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 40).to(torch.bfloat16))
        q = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = optim.AdamW([p, q], backend=chosen)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            set_grad(p, torch.linspace(1, 2, 40).to(dtype))
            q.grad = torch.ones_like(q)
            if dtype == torch.float32:
                optimizer.step_param(p)
            else:
                optimizer.step()
        results.append(optimizer.state[p]["exp_avg"])
    torch.testing.assert_close(*results)


@needs_native
def test_a_step_keeps_no_gradient_alive():
    optimizer = build(backend="native")
    params = optimizer.param_groups[0]["params"]
    run(optimizer, params, range(2))
    gradient = weakref.ref(params[0].grad)
    assert gradient() is not None
    params[0].grad = None
    assert gradient() is None
