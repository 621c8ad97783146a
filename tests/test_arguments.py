"""Arguments: refusals and their messages."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import assert_same, make_params, run, set_grads
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

import optim
from optim import engine, native, plan
from optim.options import OptionWatch

NAMES = sorted(optim.FAMILY)


BAD = [
    ("adamw", {"lr": -1.0}, ValueError, "lr=-1.0"),
    ("adamw", {"lr": math.nan}, ValueError, "lr=nan"),
    ("adamw", {"betas": (0.9, 1.0)}, ValueError, "betas"),
    ("adamw", {"betas": (0.9,)}, ValueError, "betas"),
    ("adamw", {"eps": 0.0}, ValueError, "eps"),
    ("adamw", {"weight_decay": math.inf}, ValueError, "weight_decay"),
    ("adafactor8bit", {"eps": 1e-8}, ValueError, "2 numbers"),
    ("adafactor8bit", {"clip_threshold": 0}, ValueError, "clip_threshold"),
    ("adafactor8bit", {"beta2": "x"}, ValueError, "beta2"),
    ("lion", {"beta2": 0.9}, TypeError, "did you mean 'betas'"),
    ("sgd", {"nesterov": 1}, ValueError, "true or false"),
    ("sgd", {"rounding": "up"}, ValueError, "'stochastic', 'nearest' or 'kahan'"),
    ("sgd", {"atan2": True}, TypeError, "option of sgd 'atan2'"),
    ("sgd", {"factor_1d": True}, ValueError, "factor_1d=True with storage='fp32'"),
    ("lion_factored", {"factor_1d": True, "storage": "8bit"}, ValueError, "storage='8bit'"),
    ("adafactor", {"factor_1d": True}, TypeError, "option of adafactor 'factor_1d'"),
    ("adamw", {"grams": True, "cautious": True}, ValueError, "grams=True with cautious=True"),
    ("adamw", {"storage": "int4"}, ValueError, "'fp32', 'bf16', '8bit' or 'factored'"),
    ("adamw", {"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
    ("adafactor", {"clip_norm": "last"}, ValueError, "'exact' or 'lagged'"),
    ("adafactor", {"conv_view": "last"}, ValueError, "'flatten' or 'last2'"),
    ("ademamix", {"betas": (0.9, 0.99)}, ValueError, "3 numbers"),
    ("came", {"betas": (0.9, 0.99)}, ValueError, "3 numbers"),
    ("came", {"eps": 1e-30}, ValueError, "2 numbers"),
    ("came8bit", {"betas": (0.0, 0.99, 0.99)}, ValueError, "=0: its steps are divided by how"),
    ("came8bit", {"factor_1d": True}, TypeError, "option of came8bit 'factor_1d'"),
    ("apollo", {"rank": 0}, ValueError, "rank=0 is not possible; it must be an integer >= 1"),
    ("apollo", {"rank": 2.0}, ValueError, "rank=2.0"),
    ("apollo", {"scale": "width"}, ValueError, "it must be a number > 0, or 'auto'"),
    ("apollo_mini", {"scale": 0}, ValueError, "scale=0"),
    ("apollo", {"scaling": "row"}, ValueError, "'channel' or 'tensor'"),
    ("apollo", {"update_gap": 0}, ValueError, "update_gap=0"),
    ("apollo", {"update_gap": 2**64}, ValueError, "an integer >= 1 and < 2"),
    ("apollo", {"projection": "svd"}, ValueError, "'gaussian' or 'sign'"),
    ("adafactor8bit_apollo", {"betas": (0.9, 0.99)}, TypeError, "did you mean 'beta"),
    ("prodigy", {"d0": 0.0}, ValueError, "d0=0.0"),
    ("prodigy", {"d_coef": math.inf}, ValueError, "d_coef=inf"),
    ("prodigy", {"growth_rate": 0.9}, ValueError, "a number >= 1, or inf"),
    ("prodigy", {"growth_rate": math.nan}, ValueError, "growth_rate=nan"),
    ("prodigy", {"slice_p": 0}, ValueError, "slice_p=0"),
    ("prodigy", {"slice_p": 2**63 - 1}, ValueError, "an integer >= 1 and < 2"),
    ("prodigy", {"beta3": 1.0}, ValueError, "beta3=1.0"),
    ("lion_prodigy", {"atan2": True}, TypeError, "option of lion_prodigy 'atan2'"),
    ("sophia", {"rho": 0.0}, ValueError, "rho=0.0"),
    ("sophia", {"hessian_every": 0.5}, ValueError, "hessian_every=0.5"),
    ("adamww", {}, ValueError, "did you mean 'adamw'"),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), BAD)
def test_wrong_arguments_are_refused_by_name(name, options, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")):
        optim.build(name, make_params(), **options)


LATER = [  # (optimizer, an option set between two steps, the error message)
    ("adamw", {"lr": -0.01}, "AdamW: lr=-0.01 is not possible; it must be a finite number >= 0"),
    ("adamw", {"lr": math.nan}, "lr=nan"),
    ("adamw", {"lr": "x"}, "lr='x' is not possible"),
    ("adamw", {"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1.\)"),
    ("adamw", {"lr": torch.ones(2)}, r"lr=tensor\(\[1., 1.\]\)"),
    ("adamw", {"betas": (1.5, 2.0)}, "2 numbers in"),
    ("adamw", {"weight_decay": None}, "weight_decay=None"),
    ("adamw", {"grams": True, "cautious": True}, "grams=True with cautious=True"),
    ("sgd", {"momentum": 1.0}, "momentum=1.0"),
    ("apollo", {"update_gap": 0}, "update_gap=0"),
    ("prodigy", {"d_coef": math.inf}, "d_coef=inf"),
    ("sophia", {"hessian_every": 3}, "hessian_every=10 in one group and 3 in another"),
]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("name", "options", "says"), LATER, ids=str)
def test_an_impossible_value_that_is_set_later_is_refused_before_anything_changes(
    name, options, says, backend
):
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = optim.build(name, groups, backend=backend)
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, list(optimizer.state.values())))
    good = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            run(optimizer, params, [2])
    with pytest.raises(ValueError, match=says):
        optimizer.step_param(params[0])
    assert_same(params, before[0])
    for state, old in zip(optimizer.state.values(), before[1], strict=True):
        assert_same(state.values(), old.values())
    optimizer.param_groups[0].update(good)
    run(optimizer, params, [2])
    assert int(optimizer.state[params[0]]["step"]) == 3


def test_a_rate_in_a_tensor_that_is_written_to_is_looked_at_on_a_cpu():
    params, rate = make_params(), torch.tensor(0.1)
    optimizer = optim.build("adamw", params, lr=rate)
    run(optimizer, params, range(2))
    rate.fill_(-0.1)
    with pytest.raises(ValueError, match="lr="):
        run(optimizer, params, [2])


def test_a_rate_that_a_device_has_is_not_read_at_a_step():
    """A tensor on the meta device cannot be read."""
    watch = OptionWatch("AdamW", optim.AdamW.default_options(), lambda _: None)
    group = optim.AdamW.default_options()
    for rate in (torch.tensor(0.1, device="meta"), torch.ones(1, device="meta")):
        watch.check([group | {"lr": rate}])
    for wrong in (torch.ones(2, device="meta"), torch.tensor(1, device="meta")):
        with pytest.raises(ValueError, match=r"lr=.* must be a finite number"):
            watch.check([group | {"lr": wrong}])


def test_only_what_has_changed_is_checked_again(monkeypatch):
    """Checks must be cheap: a schedule sets the rate at every step."""
    params, checked = make_params(), []
    optimizer = optim.build("apollo", params)
    run(optimizer, params, range(1))
    monkeypatch.setattr("optim.options.check", lambda _, known, values: checked.append(values))
    run(optimizer, params, range(1, 3))
    assert checked == []
    optimizer.param_groups[0].update(lr=0.5)
    run(optimizer, params, range(3, 5))
    assert checked == [{"lr": 0.5}]


@pytest.mark.skipif(native.unavailable() is not None, reason="no native engine")
@pytest.mark.parametrize("name", ["adafactor8bit", "apollo"])
def test_a_share_of_the_parameters_asks_after_the_options_of_its_own_groups_alone(
    name, monkeypatch
):
    """A fused backward with a group for each tensor has thousands of shares and groups."""
    params, asked = make_params(shapes=[(24, 16)] * 20), []
    groups = [{"params": [p]} for p in params]
    optimizer = optim.build(name, groups, rank=4) if name == "apollo" else optim.build(name, groups)
    run(optimizer, params, range(2))
    original, known = plan.group_options, engine.storing
    monkeypatch.setattr(plan, "group_options", lambda *a: asked.append(a) or original(*a))
    monkeypatch.setattr(engine, "storing", lambda group: asked.append(group) or known(group))
    optimizer.step_param(params[3], params[5])
    assert 0 < len(asked) <= 4 * 2  # for two groups, by each of APOLLO's two engines


def test_numbers_of_numpy_are_taken_as_pythons(tmp_path):
    params = make_params()
    for number in (np.float32(0.25), np.float64(0.25), np.float16(0.25)):
        groups = [{"params": params[:2], "lr": number}, {"params": params[2:]}]
        optimizer = optim.build(
            "apollo",
            groups,
            weight_decay=number,
            betas=(number, 0.5),
            rank=np.int64(2),
            seed=np.uint8(3),
        )
        first, second = optimizer.param_groups
        assert (first["lr"], second["rank"], second["seed"]) == (0.25, 2, 3)
        assert first["betas"] == (0.25, 0.5)
        found = {
            type(x) for g in (first, second) for x in (g["lr"], g["weight_decay"], *g["betas"])
        }
        assert found == {float}
        assert type(second["rank"]) is type(second["seed"]) is int
        run(optimizer, params, range(2))
        torch.save(optimizer.state_dict(), tmp_path / "state")
        optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for wrong in ({"lr": np.float32("nan")}, {"rank": np.float64(2.0)}, {"rank": np.bool_(True)}):
        with pytest.raises(ValueError, match="is not possible; it must be"):
            optim.build("apollo", params, **wrong)


@pytest.mark.parametrize("stepped", [False, True])
def test_numbers_of_numpy_that_are_set_later_are_taken_as_pythons(stepped, tmp_path):
    """A schedule that calls np.cos sets them, before a step or before the state is saved."""
    params = make_params()
    optimizer = optim.build("adamw", params)
    run(optimizer, params, range(1))
    (group,) = optimizer.param_groups
    group |= {"lr": np.float64(0.25), "betas": [np.float32(0.5), 0.75], "seed": np.int64(3)}
    if stepped:
        run(optimizer, params, range(1, 2))
        assert type(group["lr"]) is float
    torch.save(optimizer.state_dict(), tmp_path / "state")
    (saved,) = torch.load(tmp_path / "state", weights_only=True)["param_groups"]
    assert [saved[name] for name in ("lr", "betas", "seed")] == [0.25, (0.5, 0.75), 3]


@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_torchs_choice_of_an_engine_is_refused_with_the_familys(option):
    says = f"no option of .* '{option}': the whole family has one fused engine, and backend="
    for make in (optim.AdamW, lambda *args, **kwargs: optim.build("adamw", *args, **kwargs)):
        with pytest.raises(TypeError, match=says):
            make(make_params(), **{option: True})


@pytest.mark.parametrize(
    ("name", "theirs", "says"),
    [
        ("adamw", "stochastic_rounding", "rounding='stochastic' here, the default, or 'nearest'"),
        ("adamw", "kahan_sum", "rounding='kahan'"),
        ("lion", "orthogonal_gradient", "orthograd"),
        ("prodigy", "use_atan2", "atan2"),
        ("adopt", "cautious_wd", "cautious_decay"),
        ("adamw", "nnmf_factor", "storage='factored'"),
        ("prodigy", "state_precision", "storage"),
        ("ademamix", "t_alpha", "warmup_steps"),
        ("came", "eps1", "eps here, a pair"),
        ("apollo", "scale_type", "scaling"),
        ("apollo", "correct_bias", "leave it out"),
        ("lion", "fixed_decay", "always decoupled"),
        ("adamw", "ams_bound", "does not exist here"),
    ],
)
def test_another_packages_word_for_an_option_is_answered_with_ours(name, theirs, says):
    for make in (optim.FAMILY[name], lambda *a, **k: optim.build(name, *a, **k)):
        with pytest.raises(TypeError, match=rf"no option of .* '{theirs}'; .*{says}"):
            make(make_params(), **{theirs: True})


def test_keys_of_others_are_kept_in_a_group_and_come_back_with_its_state(tmp_path):
    others = {"name": "text", "lr_scale": 0.5, "layer_id": 3, "initial_lr": 0.1, "index": "x"}
    params = make_params()
    first = optim.build("apollo", [{"params": params[:2], **others}, {"params": params[2:]}])
    plain = optim.build("apollo", [{"params": make_params()}])
    run(first, params, range(2))
    run(plain, plain.param_groups[0]["params"], range(2))
    assert_same(params, plain.param_groups[0]["params"])
    torch.save(first.state_dict(), tmp_path / "state")
    params = make_params()
    second = optim.build("apollo", [{"params": params[:2], "name": "?"}, {"params": params[2:]}])
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert second.param_groups[0].items() >= others.items()
    assert not second.param_groups[1].keys() & others.keys()


@pytest.mark.parametrize(
    "key", ["weight_deca", "Betas", "LR", "momentum", "rank", "beta1", "maximize", "cautios"]
)
def test_a_key_that_may_be_an_option_is_refused(key):
    """A misspelt option or another optimizer's would silently have no effect."""
    with pytest.raises(TypeError, match=f"there is no option of AdamW '{key}'"):
        optim.build("adamw", [{"params": make_params(), key: 0.5}])


def test_what_schedulers_of_torch_put_into_groups_is_taken_back():
    optimizer = optim.build("adamw", make_params())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, cycle_momentum=False)
    (group,) = optimizer.param_groups
    assert optim.AdamW([dict(group)]).param_groups == [group]


def test_groups_are_checked_like_arguments():
    params = make_params()
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        optim.build("adamw", [{"params": params, "weight_deca": 0.0}])
    with pytest.raises(ValueError, match="lr=-1"):
        optim.build("adamw", [{"params": params, "lr": -1}])
    with pytest.raises(ValueError, match="factor_1d=True with storage='8bit'"):
        optim.build("adamw_factored", [{"params": params, "storage": "8bit"}], factor_1d=True)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("prodigy", "d0", 1e-5), ("lion_prodigy", "slice_p", 1), ("sophia", "hessian_every", 3)],
)
def test_what_all_groups_share_is_refused_where_one_differs(name, option, value):
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:], option: value}]
    with pytest.raises(ValueError, match=rf"{option}={value} in one group .* the same in all"):
        optim.build(name, groups)


@pytest.mark.parametrize(
    ("param", "says"),
    [
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(3, dtype=torch.float64), r"torch.float64.* \(call model\.float\(\) before"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_parameters_of_another_dtype_or_layout_are_refused(param, says):
    with pytest.raises(TypeError, match=f"dense fp32, bf16 and fp16 parameters.*{says}"):
        optim.build("adamw", [Parameter(param)])


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("lr", math.nan, r"lr=nan is not possible"),
        ("betas", 0.9, r"betas=0\.9 is not possible; it must be 2 numbers"),
        ("grams", True, r"cannot have grams=True with cautious=True"),
    ],
)
def test_a_saved_option_that_is_impossible_is_refused_before_anything_changes(key, value, says):
    params = make_params()
    optimizer = optim.AdamW(params, cautious=True)
    run(optimizer, params, range(1))
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    for part in saved["state"].values():
        part["exp_avg"].zero_()
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][key] == before["param_groups"][0][key]
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])


@pytest.mark.parametrize("comes", ["pickled", "replaced", "replaced in a fused backward"])
@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "sophia"])
def test_a_group_without_some_options_has_those_that_the_optimizer_was_built_with(name, comes):
    params = make_params()
    optimizer = optim.build(name, params, weight_decay=0.25)
    run(optimizer, params, range(2))
    group = optimizer.param_groups[0]
    if comes == "pickled":
        for options in (group, optimizer.defaults):
            del options["grad_clip"]  # as if it were new
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer.param_groups = [{"params": params, "lr": 0.5}]
    (group,) = optimizer.param_groups
    if comes == "replaced in a fused backward":
        set_grads(group["params"], 2)
        optimizer.step_param(*group["params"])
    run(optimizer, group["params"], range(3, 5))
    assert group["grad_clip"] is None
    assert group["weight_decay"] == 0.25
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_parameters_without_a_shape_are_refused_until_the_model_has_run_once():
    layer = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"AdamW: .* lazy layer has no shape yet; run the model"):
        optim.AdamW(layer.parameters())
    with torch.no_grad():
        layer(torch.ones(2, 5))
    optimizer = optim.AdamW(layer.parameters())
    run(optimizer, list(layer.parameters()), range(1))


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    params = make_params()
    optimizer = optim.build("adamw", params)
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3, dtype=torch.float64))]})
    assert [group["params"] for group in optimizer.param_groups] == [params]


def test_a_group_that_is_no_dict_is_refused_in_torchs_words():
    says = "^param_group must be a dict, but got <class 'torch.T"
    for cls in (torch.optim.AdamW, optim.AdamW):
        with pytest.raises(TypeError, match=says):
            cls(make_params()).add_param_group(torch.zeros(3))


def overlapping(flat):
    matrix = flat.view(8, 8)
    return [
        (flat, flat),
        (flat[:40], flat[39:]),
        (flat[8:16], matrix),
        (matrix.t(), flat[63:]),
        (flat[:0], flat[:9], matrix[1]),
        (flat.view(1, 4, 4, 4).permute(0, 3, 1, 2), flat[:1]),
    ]


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("added", [False, True])
def test_parameters_that_share_memory_are_refused(which, added):
    params = [Parameter(x) for x in overlapping(torch.zeros(64))[which]]
    says = "AdamW: parameters of shapes .* are views of the same memory"
    if not added:
        with pytest.raises(ValueError, match=says):
            optim.AdamW(params)
        return
    optimizer = optim.AdamW(params[:-1])
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group({"params": params[-1:]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_are_parts_of_one_tensor_are_taken():
    flat, matrix = torch.zeros(64), torch.zeros(8, 8)
    parts = [*flat.split([8, 24, 32]), flat[:0], flat[8:8], *matrix.split(2, dim=1)]
    meta = [torch.zeros(4, device="meta") for _ in range(2)]
    params = [Parameter(x) for x in (*parts, *meta)]
    optimizer = optim.AdamW(params[3:])
    optimizer.add_param_group({"params": params[:3]})
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(params) - 3, 3]
    with FakeTensorMode():  # fake tensors have no memory
        params = [Parameter(torch.zeros(4)) for _ in range(2)]
        assert optim.AdamW(params).param_groups[0]["params"] == params


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse gradients"):
        optim.build("adamw", embedding.parameters()).step()
