"""An optimizer's state: its size, and saving, loading and copying it."""

import copy
import io
import json
import pickle
from pathlib import Path

import bitsandbytes
import pytest
import torch
from helpers import assert_same, make_params, run, set_grads
from torch.nn import Parameter

import optim

NAMES = sorted(optim.FAMILY)
DTYPES = [torch.float32, torch.bfloat16]

EXTRA = {  # options that enable a path that is off by default
    "sgd": {"nesterov": True},
    "adafactor": {
        "beta1": 0.9,
        "relative_step": True,
        "scale_parameter": True,
        "conv_view": "last2",
    },
    "prodigy": {"d0": 1e-3, "growth_rate": 1.5, "bias_correction": True, "slice_p": 2},
    "adafactor8bit": {"beta1": 0.9, "beta2": None, "clip_norm": "lagged", "growth_limit": 1.1},
    "came": {"growth_limit": 1.1, "storage": "bf16"},
    "apollo": {"rank": 4, "update_gap": 3, "residual": True, "storage": "8bit"},
    "apollo_mini": {"update_gap": 3, "projection": "sign"},
    "adafactor8bit_apollo": {"rank": 4, "update_gap": 5, "beta1": 0.9, "scaling": "tensor"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bitwise_identical(name, dtype):
    straight, stopped = make_params(dtype), make_params(dtype)
    options = EXTRA.get(name, {})
    run(optim.build(name, straight, **options), straight, range(8))

    first = optim.build(name, stopped, **options)
    run(first, stopped, range(4))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optim.build(name, stopped, lr=0.123)  # the saved options win
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, stopped, range(4, 8))
    assert_same(straight, stopped)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_on_like_the_original(name, copier):
    params = make_params()
    optimizer = optim.build(name, params, **EXTRA.get(name, {}))
    run(optimizer, params, range(3))
    twin_params, twin = copier((params, optimizer))
    run(optimizer, params, range(3, 6))
    run(twin, twin_params, range(3, 6))
    assert_same(params, twin_params)


@pytest.mark.parametrize(
    ("name", "options", "megabytes"),
    [
        ("adafactor8bit", {}, 10),
        ("adafactor", {}, 19),
        ("adamw_factored", {}, 355),
        ("adamw_factored", {"factor_1d": True}, 342),
        ("adopt_factored", {}, 355),
        ("adopt_factored", {"factor_1d": True}, 342),
        ("ademamix_factored", {}, 692),
        ("ademamix_factored", {"factor_1d": True}, 674),
        ("adopt_factored_ademamix", {"factor_1d": True}, 674),
        ("adamw_factored_schedulefree", {}, 2605),
        ("prodigy_factored_schedulefree", {}, 3540),
        ("lion_factored", {}, 340),
        ("adamw8bit", {}, 5250),
        ("muon8bit", {}, 2590),
        ("muon_factored", {}, 345),
        ("adafactor", {"conv_view": "last2"}, 978),
        ("came8bit", {}, 2621),
        ("apollo", {"storage": "8bit"}, 1131),
        ("apollo", {"storage": "factored"}, 102),
        ("apollo_mini", {}, 16),
        ("apollo_mini", {"storage": "8bit"}, 8),
        ("adafactor8bit_apollo", {}, 9),
        ("prodigy_factored", {}, 1300),
        ("lion_prodigy", {"storage": "factored"}, 1280),
        ("sophia", {"storage": "factored"}, 355),
    ],
)
def test_state_on_the_sdxl_unet_fits(name, options, megabytes):
    """The state of the UNet's shapes is really allocated; the weights all share one number."""
    shapes = json.loads((Path(__file__).parent / "data/sdxl_unet_shapes.json").read_text())
    number = torch.zeros((), dtype=torch.bfloat16)
    params = [Parameter(number.expand(shape)) for _, shape in shapes]
    assert sum(p.numel() for p in params) == 2_567_463_684
    optimizer = optim.build(name, params, **options)
    optimizer.init_state()
    allocated = sum(
        x.untyped_storage().nbytes() for s in optimizer.state.values() for x in s.values()
    )
    assert allocated == optimizer.state_bytes()
    assert allocated <= megabytes * 1e6


@pytest.mark.parametrize("name", NAMES)
def test_loading_neither_casts_nor_aliases(name):
    params = make_params(torch.bfloat16)
    optimizer = optim.build(name, params, **EXTRA.get(name, {}))
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    twin = optim.build(name, params)
    twin.load_state_dict(saved)
    for index, p in enumerate(params):
        for key, value in twin.state[p].items():
            assert value.dtype == saved["state"][index][key].dtype
            assert torch.equal(value, saved["state"][index][key])
            assert value.numel() == 0 or value.data_ptr() != saved["state"][index][key].data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_loading_needs_no_memory_for_a_second_state(name):
    params = make_params()
    optimizer = optim.build(name, params, **EXTRA.get(name, {}))
    optimizer.init_state()
    twin = optim.build(name, params, **EXTRA.get(name, {}))
    run(twin, params, range(2))
    places = [{k: x.data_ptr() for k, x in optimizer.state[p].items()} for p in params]
    optimizer.load_state_dict(twin.state_dict())
    assert places == [{k: x.data_ptr() for k, x in optimizer.state[p].items()} for p in params]


def test_loading_the_optimizers_own_state_copies_what_it_reads():
    """Two parameters of one shape swap their states; neither is overwritten before it is read."""
    params = make_params(shapes=[(4, 3), (4, 3)])
    optimizer = optim.build("adamw", params)
    run(optimizer, params, range(2))
    own = optimizer.state_dict()
    before = copy.deepcopy(own["state"])
    own["state"] = {0: own["state"][1], 1: own["state"][0]}
    optimizer.load_state_dict(own)
    for index in (0, 1):
        for key, x in optimizer.state[params[index]].items():
            assert torch.equal(x, before[1 - index][key])
            assert x.data_ptr() != own["state"][index][key].data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_optimizers_own_state_is_loaded(name):
    """Some share moment names, shapes and options with another, but mean something else by them."""
    states = {}
    for each in NAMES:
        params = make_params()
        optimizer = optim.build(each, params)
        run(optimizer, params, range(1))
        states[each] = optimizer.state_dict()
    loader = optim.build(name, make_params())
    for owner, state in states.items():
        if owner == name:
            loader.load_state_dict(state)
        else:
            says = rf"state of {optim.FAMILY[owner].__name__}(, which| with storage)"
            with pytest.raises(ValueError, match=says):
                loader.load_state_dict(state)


class MyAdam(optim.AdamW):
    """A typical user-written subclass."""

    def __init__(self, params, lr=3e-4, **others):
        super().__init__(params, lr=lr, **others)


class MyLion(optim.Lion8bit):
    """A subclass with fixed options."""

    def __init__(self, params):
        super().__init__(params, lr=0.25, seed=3)


ALIKE = [  # optimizers that can continue from each other's state
    (optim.AdamW8bit, lambda params: optim.AdamW(params, storage="8bit")),
    (optim.LionFactored, lambda params: optim.Lion8bit(params, storage="factored")),
    (optim.ProdigyFactored, lambda params: optim.Prodigy(params, storage="factored")),
    (optim.AdamW, MyAdam),
    (lambda params: MyAdam(params, storage="8bit"), optim.AdamW8bit),
    (MyLion, optim.Lion8bit),
]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("cls", [MyAdam, MyLion])
def test_a_subclass_with_a_constructor_of_its_own_is_its_base_with_other_options(cls, copier):
    ours, theirs = make_params(), make_params()
    optimizer = cls(ours)
    options = {"lr": 3e-4} if cls is MyAdam else {"lr": 0.25, "seed": 3}
    run(optimizer, ours, range(2))
    base = cls.__base__(theirs, **options)
    run(base, theirs, range(2))
    assert optimizer.defaults == base.defaults
    ours, optimizer = copier((ours, optimizer))
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "weight_decay": 0.0})
    run(optimizer, ours, range(2, 4))
    run(base, theirs, range(2, 4))
    assert_same(ours, theirs)
    with pytest.raises(TypeError, match=f"no option of {cls.__name__} 'weight_deca'"):
        optimizer.add_param_group({"params": make_params(), "weight_deca": 1})


@pytest.mark.parametrize("which", range(len(ALIKE)))
def test_a_class_and_its_like_go_on_from_each_others_state(which):
    for first, second in (ALIKE[which], ALIKE[which][::-1]):
        straight, stopped = make_params(torch.bfloat16), make_params(torch.bfloat16)
        run(first(straight), straight, range(5))
        optimizer = first(stopped)
        run(optimizer, stopped, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = second(stopped)
        optimizer.load_state_dict(saved)
        run(optimizer, stopped, range(2, 5))
        assert_same(straight, stopped)


def test_a_state_of_before_classes_shared_theirs_is_its_own_classs():
    saved = optim.AdamW8bit(make_params()).state_dict()
    for group in saved["param_groups"]:
        del group["family"]
    optim.AdamW8bit(make_params()).load_state_dict(saved)
    with pytest.raises(ValueError, match="state of AdamW8bit, which cannot be loaded into AdamW"):
        optim.AdamW(make_params(), storage="8bit").load_state_dict(saved)


WAYS = [  # (name, option, its value in the saved state, its value now, message)
    ("prodigy", "dtype", torch.float32, torch.bfloat16, "for torch.bfloat16 weights, slice_p=11"),
    ("prodigy", "dtype", torch.bfloat16, torch.float32, "for torch.float32 weights, slice_p=11"),
    ("adafactor", "beta1", None, 0.9, "'exp_avg' is missing .* storage='fp32', beta1=0.9"),
    ("adafactor", "beta1", 0.9, None, "'exp_avg' is .* should be absent .* beta1=None"),
    ("adamw", "storage", "fp32", "bf16", "'exp_avg' is .*float32.*bfloat16.* storage='bf16'"),
    ("lion", "rounding", "kahan", "nearest", "'compensation' is .* rounding='nearest'"),
    ("adamw", "growth_limit", None, 1.1, "'update_norm' is missing .*growth_limit=1.1"),
    ("apollo", "rank", 4, 2, "'exp_avg' is .*rank=2"),
]


@pytest.mark.parametrize(("name", "option", "first", "second", "says"), WAYS, ids=str)
def test_a_state_that_another_dtype_or_option_made_is_refused_with_what_is_wanted(
    name, option, first, second, says
):
    dtypes, options = (torch.bfloat16, torch.bfloat16), ({option: first}, {option: second})
    if option == "dtype":
        dtypes, options = (first, second), ({}, {})
    saved = []
    for dtype, each in zip(dtypes, options, strict=True):
        params = make_params(dtype)
        optimizer = optim.build(name, params, **each)
        run(optimizer, params, range(1))
        saved.append(optimizer.state_dict())
    mixed = saved[0] | {"param_groups": saved[1]["param_groups"]}
    says += f".* {optim.FAMILY[name].__name__} made it with another dtype or option: go back to"
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(mixed)


STRANGERS = [
    (torch.optim.AdamW, r"torch.optim.Adam or AdamW"),
    (torch.optim.SGD, r"torch.optim.SGD"),
    (torch.optim.NAdam, r"torch.optim.NAdam"),
    (torch.optim.Adafactor, r"torch.optim.Adafactor"),
    (torch.optim.Rprop, r"torch.optim.Rprop"),
    (bitsandbytes.optim.AdamW8bit, "bitsandbytes"),
    (bitsandbytes.optim.AdamW, "bitsandbytes"),
]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("cls", "whose"), STRANGERS)
def test_a_state_of_another_package_is_named_and_changes_nothing(cls, whose, stepped):
    params = make_params(shapes=[(128, 64)])
    theirs = cls(params, lr=0.1)
    if stepped:
        run(theirs, params, range(1))
    optimizer = optim.build("adamw", make_params(shapes=[(128, 64)]))
    with pytest.raises(ValueError, match=rf"state of {whose}, which cannot be loaded into AdamW: "):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_loading_shares_no_option_with_what_was_loaded(name):
    """Such as a tensor learning rate, or a list in a group."""
    rate = torch.tensor(0.5)
    first, twin = (optim.build(name, make_params(), lr=rate) for _ in range(2))
    saved = first.state_dict()
    saved["param_groups"][0]["tags"] = ["of the caller"]
    twin.load_state_dict(saved)
    twin.param_groups[0]["lr"].fill_(0.25)
    twin.param_groups[0]["tags"].append("of the twin")
    assert first.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] == 0.5
    assert saved["param_groups"][0]["tags"] == ["of the caller"]


def test_hooks_around_loading_are_called_as_torch_does():
    """A hook may change the dict it gets or return another; the caller's dict stays unchanged."""

    def load(cls):
        params = make_params()
        optimizer = cls(params)
        run(optimizer, params, range(1))
        given, seen = optimizer.state_dict(), []
        groups = [group | {"lr": 0.5} for group in given["param_groups"]]
        optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(sorted(s)[0]))
        optimizer.register_load_state_dict_pre_hook(lambda o, s: s.update(param_groups=groups))
        optimizer.register_load_state_dict_pre_hook(lambda o, s: s | {"more": 1})
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
        optimizer.load_state_dict(given)
        return seen, sorted(given), given["param_groups"][0]["lr"]

    assert load(optim.AdamW) == load(torch.optim.AdamW)
    assert load(optim.AdamW)[0] == ["param_groups", 0.5]


def unnamed(state_dict):
    """The state dict without the class's name."""
    for group in state_dict["param_groups"]:
        del group["optimizer"]
    return state_dict


def test_a_state_of_before_an_option_existed_is_taken_with_the_option_as_it_is():
    params = make_params()
    optimizer = optim.build("adafactor8bit", params, clip_threshold=0.5)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["clip_threshold"]
    fresh = optim.build("adafactor8bit", make_params(), clip_threshold=0.25, lr=3.0)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["clip_threshold"] == 0.25
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.clear(), "not a state of Adafactor8bit: it has no state and no param_groups"),
        (lambda s: s.pop("param_groups"), "it has no param_groups"),
        (lambda s: s["param_groups"][0].update(state_version=1), "state version"),
        (lambda s: s["param_groups"][0]["params"].pop(), "parameter groups of"),
        (lambda s: unnamed(s)["param_groups"][0].pop("clip_threshold"), "lack clip_threshold"),
        (lambda s: s["state"][0].pop("exp_avg_sq.row.codes"), "exp_avg_sq.row.codes"),
        (lambda s: s["state"][0].update(step=torch.zeros(2)), "step"),
        (lambda s: s["state"][6].update(step=torch.zeros(2)), "step"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, says):
    params = make_params()
    optimizer = optim.build("adafactor8bit", params)
    run(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    spoiled = copy.deepcopy(before)
    spoil(spoiled)
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(spoiled)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index in before["state"]:
        for key, value in before["state"][index].items():
            assert torch.equal(after["state"][index][key], value)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "sophia"])
def test_reading_the_state_of_a_parameter_without_gradients_changes_nothing(name):
    results = []
    for reads in (False, True):
        params = make_params()
        optimizer = optim.build(name, params)
        if reads:
            assert not optimizer.state[params[-1]]  # torch's state is a defaultdict
        for step in range(3):
            set_grads(params, step)
            params[-1].grad = None
            if name == "sophia":
                assert optimizer.wants_hessian() == (step == 0)
            optimizer.step()
        assert optimizer.nonfinite_count() == 0
        results.append(params)
    assert_same(*results)
