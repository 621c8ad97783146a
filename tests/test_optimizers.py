"""Every optimizer of the family: against third parties, through save and load, at the edges."""

import copy
import inspect
import io
import json
import math
import pickle
from pathlib import Path

import adv_optm
import pytest
import pytorch_optimizer
import torch
from torch.nn import Parameter

import optim
from optim.codecs import split

NAMES = sorted(optim.FAMILY)
SHAPES = [(24, 16), (16, 3, 3, 3), (24,), (7, 5, 2), (), (0,), (101, 1)]
DTYPES = [torch.float32, torch.bfloat16]
EXTRA = {  # options that switch on a path which the defaults leave off
    "sgd": {"nesterov": True},
    "adafactor": {"beta1": 0.9, "relative_step": True, "scale_parameter": True},
    "adafactor8bit": {"beta1": 0.9, "beta2": None},
}


def make_params(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# --- the arithmetic, against implementations of others -----------------------------------------

THIRD_PARTIES = {
    # name: (ours, theirs, shapes, steps to skip in theirs)
    "sgd": (
        {"lr": 0.1, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "sgd nesterov": (
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "adamw": (
        {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "lion": (
        {"lr": 1e-2, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.Lion(p, lr=1e-2, weight_decay=0.1, weight_decouple=True),
    ),
    "ademamix": (
        {"lr": 1e-2, "alpha": 3.0, "warmup_steps": 40, "weight_decay": 0.1},
        lambda p: pytorch_optimizer.AdEMAMix(
            p,
            lr=1e-2,
            betas=(0.9, 0.999, 0.9999),
            alpha=3.0,
            t_alpha_beta3=40,
            weight_decay=0.1,
            weight_decouple=True,
        ),
    ),
    "adamw grams": (
        {"lr": 1e-2, "grams": True, "weight_decay": 0.0},
        lambda p: pytorch_optimizer.Grams(p, lr=1e-2, weight_decay=0.0),
    ),
    "adafactor": (
        {
            "lr": 1e-2,
            "beta2": None,
            "relative_step": True,
            "scale_parameter": True,
            "weight_decay": 0.1,
        },
        # torch decays by the unscaled lr, as this family does
        lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(None, 1e-3), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("case", THIRD_PARTIES)
def test_fp32_trajectory_equals_the_third_party(case):
    options, make_other = THIRD_PARTIES[case]
    shapes = [(24, 16), (24,)]  # torch factors convolutions differently
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(case.split()[0], ours, **options), ours, range(60))
    run(make_other(theirs), theirs, range(60))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 2e-5 * (b - start).norm()


def test_adopt_factored_equals_dense_adopt_where_moments_have_rank_one():
    shapes = [(24, 16)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizer = optim.build("adopt_factored", ours, **options)
    state = [torch.zeros(24, 16), torch.zeros(24, 16)]
    row, col = torch.rand(24, 1) + 0.5, torch.rand(1, 16) + 0.5
    for t in range(30):
        g = row * col * math.cos(t + 1)
        ours[0].grad = g.clone()
        optimizer.step()
        # Taniguchi et al. 2024, Alg. 2, written out
        if t == 0:
            state[1] = g.square()
            continue
        n = (g / state[1].sqrt().clamp_min(1e-6)).clamp(-(t**0.25), t**0.25)
        state[0] = 0.9 * state[0] + 0.1 * n
        theirs[0].data -= 1e-2 * state[0]
        state[1] = 0.99 * state[1] + 0.01 * g.square()
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("adopt_factored", adv_optm.Adopt_adv),
        ("adamw_factored", adv_optm.AdamW_adv),
        ("lion_factored", adv_optm.Lion_adv),
    ],
)
def test_factored_moments_follow_the_smmf_cycle_of_adv_optm(name, peer):
    shapes = [(24, 16), (16, 3, 3, 3)]
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.build(name, ours, lr=1e-2, weight_decay=0.0), ours, range(40))
    run(peer(theirs, lr=1e-2, weight_decay=0.0, nnmf_factor=True), theirs, range(40))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 1e-3 * (b - start).norm()


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_the_first_adafactor_step_is_as_long_as_lr(beta1):
    for name in ("adafactor", "adafactor8bit"):
        params = make_params(shapes=[(64, 64)])
        start = params[0].detach().clone()
        optimizer = optim.build(name, params, lr=0.01, beta1=beta1, clip_threshold=None)
        run(optimizer, params, range(1))
        assert (params[0] - start).square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_clip_threshold_bounds_the_rms_of_an_update():
    params = make_params(shapes=[(32, 32)])
    optimizer = optim.build("adafactor", params, lr=1.0, clip_threshold=0.25)
    run(optimizer, params, range(1))
    moved = params[0] - make_params(shapes=[(32, 32)])[0]
    assert moved.square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-4)


def test_eight_bit_state_follows_a_tenfold_drop_of_the_gradients():
    """Nearest rounding would leave the stored moment 6x too large for ever."""
    steps, moments = 6000, {}
    scale = torch.ones(64, 128)
    for name in ("adafactor", "adafactor8bit"):
        scale[:32] = 1.0
        param = Parameter(torch.zeros(64, 128))
        optimizer = optim.build(name, [param])
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if step == 1000:
                scale[:32] = 0.1
            param.grad = torch.randn(64, 128, generator=generator) * scale
            optimizer.step()
        codec = optimizer.codecs(param, optimizer.param_groups[0])["exp_avg_sq"]
        moments[name] = codec.decode(split(optimizer.state[param], "exp_avg_sq"))
    ratio = moments["adafactor8bit"] / moments["adafactor"]
    assert ratio[:32].mean().item() == pytest.approx(1, abs=0.1)
    assert ratio[32:].mean().item() == pytest.approx(1, abs=0.1)


def test_a_factored_element_without_gradients_does_not_drift():
    params = make_params(shapes=[(16, 16)])
    start = params[0].detach().clone()
    optimizer = optim.build("adopt_factored", params, weight_decay=0.0)
    for step in range(20):
        set_grads(params, step)
        params[0].grad[3, 5] = 0
        optimizer.step()
    assert params[0][3, 5] == start[3, 5]
    assert (params[0] != start).sum() == 255


# --- every optimizer: descends, repeats, resumes -----------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name):
    params = [Parameter(torch.full(shape, 1.0)) for shape in SHAPES]
    optimizer = optim.build(name, params, lr=0.01)

    def loss():
        return sum((p * p).sum() for p in params)

    first = loss().item()
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * first


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


def test_the_rounding_depends_on_the_seed_and_on_nothing_else():
    runs = []
    for seed in (0, 0, 1):
        params = make_params(torch.bfloat16, [(64, 64)])
        run(optim.build("adafactor8bit", params, seed=seed), params, range(3))
        runs.append(params[0].detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_stochastic_rounding_lets_bf16_weights_take_steps_smaller_than_their_spacing():
    moved = {}
    for rounding in ("stochastic", "kahan", "nearest"):
        param = Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = optim.build("sgd", [param], lr=1.0, momentum=0.0, rounding=rounding)
        for _ in range(20):
            param.grad = torch.full_like(param, 2.0**-12)  # a thirty-second of the spacing below 1
            optimizer.step()
        moved[rounding] = 1 - param.float().mean().item()
    assert moved["stochastic"] == pytest.approx(20 * 2.0**-12, rel=0.1)
    assert moved["kahan"] == pytest.approx(20 * 2.0**-12, abs=2.0**-8)
    assert moved["nearest"] == 0


def test_channels_last_and_non_contiguous_weights_are_updated_like_contiguous_ones():
    plain = make_params(shapes=[(16, 8, 3, 3)])
    for layout in (
        plain[0].detach().clone().to(memory_format=torch.channels_last),
        plain[0].detach().clone().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    ):
        twin, other = [Parameter(plain[0].detach().clone())], [Parameter(layout)]
        for params in (twin, other):
            run(optim.build("adafactor8bit", params), params, range(3))
        assert torch.equal(twin[0], other[0])


def test_a_learning_rate_scheduler_and_a_tensor_lr_drive_the_step():
    by_scheduler, by_hand = make_params(), make_params()
    optimizer = optim.build("adamw", by_scheduler, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other = optim.build("adamw", by_hand, lr=torch.tensor(0.1))
    for step in range(3):
        run(optimizer, by_scheduler, [step])
        scheduler.step()
        run(other, by_hand, [step])
        other.param_groups[0]["lr"] = other.param_groups[0]["lr"] * 0.5
    for a, b in zip(by_scheduler, by_hand, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


# --- state: bytes and loading --------------------------------------------------------------------


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
        ("lion_factored", {}, 340),
        ("adamw8bit", {}, 5250),
    ],
)
def test_state_on_the_sdxl_unet_fits(name, options, megabytes):
    """Allocated for real on the shapes of the UNet; the weights themselves share one number."""
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


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("state_version"), "state version"),
        (lambda s: s["param_groups"][0]["params"].pop(), "parameter groups of"),
        (lambda s: s["param_groups"][0].pop("clip_threshold"), "clip_threshold"),
        (lambda s: s["state"][0].pop("exp_avg_sq.row.codes"), "exp_avg_sq.row.codes"),
        (lambda s: s["state"][0].update(step=torch.zeros(2)), "step"),
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


# --- arguments -----------------------------------------------------------------------------------

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
    ("sgd", {"factor_1d": True}, TypeError, "option of sgd 'factor_1d'"),
    ("ademamix", {"betas": (0.9, 0.99)}, ValueError, "3 numbers"),
    ("adamww", {}, ValueError, "did you mean 'adamw'"),
]


@pytest.mark.parametrize(("name", "options", "error", "says"), BAD)
def test_wrong_arguments_are_refused_by_name(name, options, error, says):
    with pytest.raises(error, match=says.replace("(", r"\(")):
        optim.build(name, make_params(), **options)


def test_groups_are_checked_like_arguments():
    params = make_params()
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        optim.build("adamw", [{"params": params, "weight_deca": 0.0}])
    with pytest.raises(ValueError, match="lr=-1"):
        optim.build("adamw", [{"params": params, "lr": -1}])


@pytest.mark.parametrize(
    "param",
    [torch.zeros(3, dtype=torch.complex64), torch.eye(3).to_sparse()],
    ids=["complex", "sparse"],
)
def test_parameters_that_are_not_dense_and_real_are_refused(param):
    with pytest.raises(TypeError, match="dense floating-point"):
        optim.build("adamw", [Parameter(param)])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse gradients"):
        optim.build("adamw", embedding.parameters()).step()


def test_build_and_the_class_have_the_same_defaults():
    for name, cls in optim.FAMILY.items():
        built, direct = optim.build(name, make_params()), cls(make_params())
        assert built.defaults == direct.defaults
        assert set(built.defaults) == set(optim.options_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name):
    cls = optim.FAMILY[name]
    sources = [*inspect.getmro(cls)[:2], optim.Features]
    documentation = " ".join(source.__doc__ or "" for source in sources)
    for option in optim.options_of(name):
        assert f"{option}:" in documentation, f"{name}: {option}"
