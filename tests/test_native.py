"""The native engine against its specification, `optim/reference.py`: each takes single steps from
the same state with the same gradients, so that rounding errors do not add up."""

import copy
import math
import re
import sys

import pytest
import torch
from conftest import REPOSITORY
from engine_cases import (
    BF16,
    CONDITIONED,
    DTYPES,
    FP16,
    FP32,
    MEDIUM,
    NAMES,
    TOGETHER,
    estimate,
    gradients,
    rotated,
    step,
    weights,
)
from helpers import PRODIGIES, set_grad
from torch.nn import Parameter

import optim
from optim import gpu, native, plan

sys.path.insert(0, str(REPOSITORY / "scripts"))
from bench.checks import PRODUCTS_SLACK
from bench.tolerances import param_misses, spacing

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")

STORAGES = ["fp32", "bf16", "8bit", "factored"]

# (7, 1429) has no near-square view, so it is padded to (97, 104), with 19 elements in the last row.
SMALL = [(24, 40), (33, 3, 3, 3), (37,), (), (0,), (1, 5), (7, 1429), (5, 0)]
LARGE = [
    (2, 160001),  # (564, 568): padded, several tiles in each dimension
    (1, 10007),  # a prime: (97, 104)
    (64, 1300),
    (3, 5, 2, 7, 11),
    *MEDIUM,
]


# The comparison -----------------------------------------------------------------------------------


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_misses(reference, engine, act=step):
    """Step both from the reference's weights and state -> descriptions of differences."""
    assert (reference.backend, engine.backend) == ("torch", "native")
    params, twins = params_of(reference), params_of(engine)
    before = [p.detach().clone() for p in params]
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    engine.load_state_dict(copy.deepcopy(reference.state_dict()))
    act(reference)
    act(engine)
    # Sums of products, which may cancel, are rounded differently in chunks and as a whole.
    slack = PRODUCTS_SLACK if type(reference).rule.__name__ in plan.PROJECTED else 1.0
    lines = []
    for p, q, old in zip(params, twins, before, strict=True):
        lines += param_misses(p, q, old, reference.state[p], engine.state[q], slack)
    return lines


BAD = [math.nan, math.inf, -math.inf, 1e30]


def spoil(g, step):
    """Put unusable elements into a gradient, at different places in each step."""
    if g.numel() > 4 * len(BAD):
        for i, value in enumerate(BAD, start=1):
            at = step + i * (g.numel() - 4) // (len(BAD) + 1)
            g.view(-1)[at] = torch.tensor(value)  # a number beyond fp16 is an error of old torch


def compare(name, shapes, dtype, groups=({},), steps=3, grad_dtype=None, scale=0.01, **options):
    """Assert that at each of some steps the engine does the same as the reference.

    Shapes are distributed over the groups; every other step has unusable gradient elements.
    """
    options = {"lr": 0.01, "weight_decay": 0.1} | CONDITIONED.get(name, {}) | options
    generator = torch.Generator().manual_seed(0)
    tensors = [weights(shape, dtype, generator) for shape in shapes]

    def build(backend):
        made = [Parameter(w.clone()) for w in tensors]
        dealt = [{"params": made[i :: len(groups)]} | g for i, g in enumerate(groups)]
        return optim.build(name, dealt, backend=backend, **options)

    reference, engine = build("torch"), build("native")
    for number in range(steps):
        for act in (estimate, step) if name == "sophia" else (step,):
            for p, q in zip(params_of(reference), params_of(engine), strict=True):
                g = gradients(p.shape, grad_dtype or dtype, generator, scale)
                if number % 2 == 0:
                    spoil(g, number)
                set_grad(p, g)
                set_grad(q, g.clone())
            misses = step_misses(reference, engine, act)
            assert misses == [], f"{act.__name__} {number + 1}"


# One step -----------------------------------------------------------------------------------------

# What a rule computes does not depend on how its weights are read and written, so the dtypes take
# turns: every rule meets every dtype, every feature and every storage, and they meet each other.
FEATURES = {
    "growth_limit": {"growth_limit": 1.01},
    "grad_clip": {"grad_clip": 1e-3},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "orthograd": {"orthograd": True},
    "cautious": {"cautious": True},
    "grams": {"grams": True},
    "cautious_decay": {"cautious_decay": True},
}
ROUNDING = {  # has no effect on fp32 (`TOGETHER` has it there)
    "nearest": {"rounding": "nearest"},
    "kahan": {"rounding": "kahan"},
    "seed": {"seed": -(2**40) - 3},
}
# Rule-specific options, with a row for each optimizer that has them.
OPTIONS = [
    ("sgd", {"nesterov": True}),
    ("sgd", {"nesterov": True, "storage": "factored"}),
    ("sgd", {"momentum": 0.0}),
    ("sgd", {"weight_decay": 0.0, "lr": 0.0}),
    ("sgd", {"factor_1d": True, "storage": "factored"}),
    ("adamw", {"atan2": True}),
    ("adamw", {"betas": (0.0, 0.5), "eps": 1e-3}),
    ("adamw8bit", {"atan2": True}),
    ("adamw_factored", {"atan2": True}),
    ("adamw_factored", {"factor_1d": True}),
    ("ademamix", {"warmup_steps": 7}),
    ("ademamix", {"alpha": 0.0, "betas": (0.0, 0.9, 0.99), "warmup_steps": 2}),
    ("ademamix_factored", {"atan2": True, "warmup_steps": 7, "factor_1d": True}),
    ("adopt", {"atan2": True}),
    ("adopt", {"betas": (0.5, 0.9), "eps": 1e-2}),
    ("adopt_factored", {"atan2": True, "factor_1d": True}),
    ("adopt_factored_ademamix", {"warmup_steps": 2}),
    ("lion", {"betas": (0.0, 0.5)}),
    ("lion_factored", {"factor_1d": True}),
    *(
        (name, options)
        for name in ("prodigy", "lion_prodigy")
        for options in (
            {"slice_p": 1, "beta3": 0.5},
            {"slice_p": 600, "lr": 0.3},
            {"safeguard_warmup": True, "d0": 1e-6, "storage": "bf16"},
            {"lr": 0.0},
            {"growth_rate": 1.1, "betas": (0.0, 0.5)},
        )
    ),
    ("prodigy", {"bias_correction": True, "eps": 1e-3}),
    ("prodigy", {"atan2": True, "slice_p": 3}),
    ("prodigy_factored", {"factor_1d": True}),
    ("prodigy_schedulefree", {"slice_p": 3, "betas": (0.5, 0.9), "eps": 1e-3}),
    ("prodigy_schedulefree", {"safeguard_warmup": True, "lr": 0.3, "beta3": 0.5}),
    ("prodigy_schedulefree", {"lr": 0.0}),
    ("prodigy_factored_schedulefree", {"factor_1d": True, "growth_rate": 1.1}),
    *(
        (name, options)
        for name in ("came", "came8bit")
        for options in (
            {"betas": (0.5, 0.9, 0.9), "eps": (1e-6, 1e-3)},
            {"clip_threshold": None, "growth_limit": 1.01},
            {"clip_threshold": 0.01},
        )
    ),
    ("apollo", {"scaling": "tensor", "projection": "sign", "scale": 3.0}),
    ("apollo", {"atan2": True, "update_gap": 2, "growth_limit": None}),
    ("apollo", {"residual": True}),
    ("apollo", {"rank": 1, "storage": "factored", "factor_1d": True, "scaling": "tensor"}),
    ("apollo_mini", {"scale": 128, "storage": "8bit"}),
    ("adafactor8bit_apollo", {"beta1": 0.9, "clip_threshold": 0.01}),
    ("adafactor8bit_apollo", {"rank": 1, "beta2": None, "scaling": "tensor"}),
    ("adafactor8bit_apollo", {"beta1": 0.9, "storage": "factored", "clip_threshold": None}),
    ("sophia", {"betas": (0.5, 0.5), "rho": 1e4, "eps": 1e-3}),
    ("sophia", {"factor_1d": True, "storage": "factored"}),
    ("sophia", {"orthograd": True, "grad_clip": 1e-3}),  # not applied to curvature estimates
    *(
        (name, options)
        for name in ("adafactor", "adafactor8bit")
        for options in (
            {"beta1": 0.9},
            {"clip_norm": "lagged"},
            {"clip_norm": "lagged", "beta1": 0.9, "growth_limit": 1.01, "clip_threshold": 0.3},
            {"clip_threshold": None},
            {"clip_threshold": 0.01},
            {"relative_step": True, "scale_parameter": True, "lr": 0.9},
            {"scale_parameter": True, "grad_clip": 1e-3},
            {"beta2": None},
            {"beta2": None, "beta2_decay": -0.5, "eps": (1e-6, 0.5), "scale_parameter": True},
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "feature", "dtype"),
    [*rotated(NAMES, FEATURES, DTYPES), *rotated(NAMES, ROUNDING, [BF16, FP16])],
    ids=str,
)
def test_a_step_with_a_feature_is_the_references(name, feature, dtype):
    if feature in optim.FAMILY[name].refuses:
        pytest.skip("refused")
    compare(name, SMALL, dtype, **(FEATURES | ROUNDING)[feature])


# One of those that differ only in default storage.
OF_A_RULE = [
    *("sgd", "adamw", "ademamix", "adopt", "adopt_factored_ademamix", "lion", "adafactor"),
    *("sophia", "prodigy", "lion_prodigy", "came", "came8bit", "apollo", "adamw_schedulefree"),
    "prodigy_schedulefree",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # a rule may have loops of its own for some
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", OF_A_RULE)
def test_a_step_with_any_storage_is_the_references(name, storage, dtype):
    options = {"beta1": 0.9} if name == "adafactor" else {}
    compare(name, LARGE, dtype, storage=storage, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_adafactor8bit_steps_like_the_reference_with_any_first_moment(storage, dtype):
    compare("adafactor8bit", MEDIUM, dtype, storage=storage, beta1=0.9)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [(*row, DTYPES[i % 3]) for i, row in enumerate(OPTIONS)],
    ids=str,
)
def test_a_step_with_a_rules_own_option_is_the_references(name, options, dtype):
    compare(name, SMALL, dtype, **options)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("options", TOGETHER, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "adamw8bit", "adopt_factored", "ademamix", "adafactor8bit", "prodigy_factored"),
        *("came8bit", "adafactor8bit_apollo"),
    ],
)
def test_features_act_together_as_in_the_reference(name, options, dtype):
    compare(name, [*SMALL, (130, 700)], dtype, **options)


@pytest.mark.parametrize("name", ["adamw", "adafactor8bit", "adopt_factored"])
def test_every_group_has_its_own_options(name):
    groups = (
        {"lr": 0.5, "max_grad_norm": 1e-2, "seed": 5},
        {"weight_decay": 0.0, "grad_clip": 1e-3, "cautious": True},
        {"lr": 0.0, "orthograd": True, "rounding": "kahan", "storage": "bf16"},
    )
    compare(name, SMALL[:3] * 3, BF16, groups)


@pytest.mark.parametrize("grad_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["adamw_factored", "adamw8bit", "adafactor8bit", "sgd"])
def test_a_gradient_may_have_another_dtype_than_its_weights(name, dtype, grad_dtype):
    compare(name, SMALL[:4], dtype, grad_dtype=grad_dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1.0, 1e6, 1e13])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_any_size_step_like_the_reference(name, scale):
    options = {"slice_p": 1} if name in PRODIGIES else {}  # sums of few terms may all cancel
    if "apollo" in name and scale == 1e-30:  # its squared updates underflow fp32
        options = {"growth_limit": None}
    compare(name, SMALL[:3], FP32, scale=scale, **options)


NARROW = ["adafactor", "adafactor8bit", "adalomo", "came", "came8bit", "adamw_factored"]


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        *rotated(NARROW, [{}, {"orthograd": True}, {"cautious": True}], DTYPES),
        *((name, {"rounding": "kahan"}, dtype) for name in NARROW for dtype in (BF16, FP16)),
    ],
    ids=str,
)
def test_rows_of_a_few_elements_step_like_the_reference(name, options, dtype):
    """Several of them are in a vector (`csrc/engine/lines.h`); some strips end within one."""
    compare(name, [(130, 5), (700, 4), (65, 16), (67, 33), (9, 3)], dtype, **options)


# Layouts and edges --------------------------------------------------------------------------------


def shifted(x):
    """The same elements at an unaligned address."""
    flat = torch.empty(x.numel() + 3, dtype=x.dtype)[3:]
    return flat.view(x.shape).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "unaligned": shifted,
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "adopt_factored"])
def test_any_memory_layout_of_weights_and_gradients_gives_the_same_bits(name, of_weight, of_grad):
    generator = torch.Generator().manual_seed(0)
    start = weights((9, 7, 5, 3), BF16, generator)
    plain, laid = Parameter(start.clone()), Parameter(LAYOUTS[of_weight](start.clone()))
    one, two = (
        optim.build(name, [p], lr=0.01, rounding="kahan", backend="native") for p in (plain, laid)
    )
    strides, address = laid.stride(), laid.data_ptr()
    for _ in range(3):
        plain.grad = gradients(start.shape, BF16, generator)
        laid.grad = LAYOUTS[of_grad](plain.grad.clone())
        one.step()
        two.step()
    assert (laid.stride(), laid.data_ptr()) == (strides, address)
    assert torch.equal(plain, laid)
    for key, value in one.state[plain].items():
        assert torch.equal(value, two.state[laid][key]), key


def test_an_expanded_gradient_is_read_as_what_it_stands_for():
    param = Parameter(torch.zeros(5, 7))
    param.sum().backward()
    param.grad = torch.ones(()).expand(5, 7)
    optim.build("sgd", [param], lr=0.5, momentum=0.0, backend="native").step()
    assert torch.equal(param, torch.full((5, 7), -0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw", "ademamix", "adopt", "lion", "sophia"])
def test_an_unusable_element_leaves_its_weight_and_its_moments_bit_for_bit(name, dtype):
    generator = torch.Generator().manual_seed(0)
    param = Parameter(weights((21, 35), dtype, generator))
    optimizer = optim.build(name, [param], weight_decay=0.1, backend="native")
    for number in range(4):
        old = param.detach().clone()
        before = {k: x.clone() for k, x in optimizer.state[param].items()}
        param.grad = gradients(param.shape, dtype, generator) + 0.01
        spoil(param.grad, number)
        bad = ~(param.grad.float().abs() <= 2.0**48)
        optimizer.step()
        if number:
            assert torch.equal(param[bad], old[bad])
            moments = [k for k in before if k.startswith("exp_avg")]
            assert moments
            for key in moments:
                assert torch.equal(optimizer.state[param][key][bad], before[key][bad]), key
        assert param.isfinite().all()
    assert optimizer.nonfinite_count() == 4 * len(BAD)


def test_two_to_the_48_is_the_largest_usable_element():
    edge = torch.tensor(2.0**48)
    grad = torch.stack([edge, -edge, edge.nextafter(edge * 2), -edge.nextafter(edge * 2), edge / 2])
    for backend in ("torch", "native"):
        param = Parameter(torch.zeros(5))
        param.grad = grad.clone()
        optimizer = optim.build("sgd", [param], lr=1.0, momentum=0.0, backend=backend)
        optimizer.step()
        assert optimizer.nonfinite_count() == 2
        assert param.tolist() == [-(2.0**48), 2.0**48, 0.0, 0.0, -(2.0**47)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_element_is_zero_in_the_global_norm_and_seen_by_raise(dtype):
    """Also in fp16, where 2^48 is infinite."""
    moved = []
    for backend in ("torch", "native"):
        param = Parameter(torch.zeros(4, dtype=dtype))
        param.grad = torch.tensor([3.0, math.inf, 4.0, math.nan], dtype=dtype)
        options = {"lr": 1.0, "momentum": 0.0, "max_grad_norm": 2.5, "rounding": "nearest"}
        optim.build("sgd", [param], backend=backend, **options).step()
        moved.append(param.tolist())
        with pytest.raises(FloatingPointError, match="2 of 4"):
            optim.build("sgd", [param], backend=backend, on_nonfinite="raise").step()
    assert moved == [[-1.5, 0.0, -2.0, 0.0]] * 2


@pytest.mark.parametrize("agreeing", [0, 2, 50])
def test_cautious_scales_up_a_few_agreeing_elements_by_a_thousand_at_most(agreeing):
    ends = []
    for backend in ("torch", "native"):
        param = Parameter(torch.zeros(4096))
        optimizer = optim.build("sgd", [param], lr=1.0, cautious=True, backend=backend)
        for against in (1.0, -0.01):
            param.grad = torch.full((4096,), against)
            param.grad[:agreeing] = 1.0
            optimizer.step()
        ends.append(param.detach() + 1)
    assert torch.allclose(*ends, rtol=1e-6)
    moved = -ends[1][:agreeing] / 1.9
    assert torch.allclose(moved, torch.full((agreeing,), min(4096 / max(agreeing, 1), 1000.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("decay", [0.0, 2.0**-10])  # 2^-10 moves the largest bf16 towards the next
def test_weights_are_written_as_torch_rounds_them(dtype, rounding, decay):
    """At the ends of a dtype's range, where fp16 overflows, and for subnormals."""
    kind = torch.finfo(dtype)
    ends = torch.tensor([kind.max, kind.tiny, kind.tiny * kind.eps * 5, 1.0])
    ends = torch.cat([ends, -ends]).to(dtype).repeat_interleave(64)
    grad = torch.linspace(-1.5, 1.5, 64).repeat(8) * spacing(ends).float()
    moved = []
    for backend in ("torch", "native"):
        param = Parameter(ends.clone())
        set_grad(param, grad.clamp(-(2.0**48), 2.0**48))
        options = {"lr": 1.0, "momentum": 0.0, "rounding": rounding, "weight_decay": decay}
        optim.build("sgd", [param], backend=backend, **options).step()
        moved.append(param.detach())
    assert torch.equal(*moved)


def test_flags_are_the_same_bits_on_both_sides():
    header = (REPOSITORY / "csrc/core/types.h").read_text()
    found = re.findall(
        r"^    k(\w+) = 1 << (\d+),", header.partition("enum Flag ")[2], re.MULTILINE
    )
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name, _ in found]
    assert names == list(plan.FLAGS)
    assert [int(bit) for _, bit in found] == list(range(len(found)))


def test_passes_over_tiles_are_asked_for_by_the_same_flags_on_both_sides():
    """`_PASSES` in `optim/gpu.py`, used to launch on a GPU, match the conditions in C++."""
    header = (REPOSITORY / "csrc/engine/tensor.h").read_text()
    asked = {
        name: {re.sub(r"(?<!^)(?=[A-Z])", "_", flag[1:]).lower() for flag in flags.split(" | ")}
        for name, flags in re.findall(r"wants_(\w+)\(const Hyper.*has\(h, ([^)]*)\); \}", header)
    }
    asked["measure"] = asked.pop("measure_of_grad") | asked.pop("measure_of_weight")
    assert asked == {name: set(flags) for name, flags, _ in gpu._PASSES if flags}
