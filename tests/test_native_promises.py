"""The native engine's promises besides its results (tests/test_native.py): the same bits on any
threads and CPU, one launch per bucket, no full-size temporary, 64-bit offsets."""

import math
import mmap
import re
import sys
from types import SimpleNamespace

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
    step,
    weights,
)
from helpers import assert_same
from torch.nn import Parameter

import optim
from optim import native, plan, rng
from optim import state as states

sys.path.insert(0, str(REPOSITORY / "scripts"))
from bench import memory

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")

# The same bits on any threads and CPU -------------------------------------------------------------


def trained(name, dtype, shapes=MEDIUM, steps=2, **options):
    """Weights and states after `steps` steps from the same start."""
    generator = torch.Generator().manual_seed(3)
    params = [Parameter(weights(shape, dtype, generator)) for shape in shapes]
    options = {"lr": 0.01} | CONDITIONED.get(name, {}) | options
    optimizer = optim.build(name, params, backend="native", **options)
    for _ in range(steps):
        for act in (estimate, step) if name == "sophia" else (step,):
            for p in params:
                p.grad = gradients(p.shape, dtype, generator)
            act(optimizer)
    return [p.detach() for p in params] + [x for p in params for x in optimizer.state[p].values()]


@pytest.fixture
def with_threads():
    """torch.set_num_threads, restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


VARIANTS = [
    *((name, dtype, {}) for name in NAMES for dtype in (FP32, BF16)),
    *(("adamw8bit", FP16, options) for options in TOGETHER),
    *(("adafactor8bit", BF16, options) for options in TOGETHER),
    ("adafactor", BF16, {"beta1": 0.9, "clip_norm": "lagged", "scale_parameter": True}),
    ("adopt_factored", BF16, {"max_grad_norm": 1e-3, "growth_limit": 1.01, "atan2": True}),
    *(("prodigy", dtype, {"slice_p": 1, "storage": "8bit"}) for dtype in DTYPES),
]


# APOLLO's projection and Muon's orthogonalization use torch's matmul, whose last bits may vary.
THREADED = [variant for variant in VARIANTS if not re.search("apollo|muon", variant[0])]


@pytest.mark.parametrize(("name", "dtype", "options"), THREADED, ids=str)
def test_runs_and_any_number_of_threads_give_the_same_bits(name, dtype, options, with_threads):
    first = trained(name, dtype, **options)
    for count in (1, 2, 3):
        with_threads(count)
        assert_same(first, trained(name, dtype, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [("adafactor8bit", {}), ("adamw_factored", {"cautious": True}), ("came", {"grad_clip": 0.1})],
)
def test_threads_that_are_at_different_tensors_give_the_same_bits(name, options, with_threads):
    """More tiles than run through the passes together; each pass waits for the previous one."""
    shapes = [(1200, 1500), (2048, 1100), (70, 9000), (1100, 700), (640, 640), (9000, 70)]
    first = trained(name, BF16, shapes, **options)
    for count in (2, 3):
        with_threads(count)
        assert_same(first, trained(name, BF16, shapes, **options))


@pytest.mark.parametrize(("name", "dtype", "options"), VARIANTS, ids=str)
def test_every_instruction_set_gives_the_same_bits(name, dtype, options, monkeypatch):
    first = trained(name, dtype, **options)
    for isa in native._native.isas():
        monkeypatch.setenv("OPTIM_ISA", isa)
        assert_same(first, trained(name, dtype, **options))


@pytest.mark.parametrize(("name", "dtype", "options"), VARIANTS[::3], ids=str)
def test_a_tensor_gets_the_same_bits_alone_and_among_others(name, dtype, options, monkeypatch):
    """Without max_grad_norm: it sums over buckets, which differ here, as may its last bit."""
    options = {key: value for key, value in options.items() if key != "max_grad_norm"}
    results = []
    for few in (0, native.FEW_TILES, 1 << 20):
        monkeypatch.setattr(native, "FEW_TILES", few)
        results.append(trained(name, dtype, [*MEDIUM, (64, 1300)], **options))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# Launches -----------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The number of tensors in each launch so far."""
    real, seen = native._native, []

    def launch(address, *rest):
        seen.append(plan.Launch.from_address(address).num_tensors)
        real.launch(address, *rest)

    names = ("grad_sq", "isas", "multiplies_pairs", "project")
    kept = {name: getattr(real, name) for name in names}
    counting = SimpleNamespace(launch=launch, **kept)
    monkeypatch.setattr(native, "_native", counting)
    return seen


def test_a_step_over_many_small_tensors_is_one_launch(launches):
    trained("adamw", FP32, shapes=[(5, 3), (7,), (0,), ()] * 100, steps=2)
    assert launches == [400, 400]


def test_parameters_without_gradients_are_not_launched(launches):
    params = [Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = optim.build("adamw", params, backend="native")
    optimizer.step()
    params[2].grad = torch.ones(3)
    optimizer.step()
    assert launches == [1]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10_000, [8]),
        (1000, [3, 3, 2]),
        (600, [1, 1, 3, 1, 1, 1]),  # the second exceeds the bucket limit
        (1, [1] * 8),
    ],
)
def test_large_steps_are_several_launches_and_bitwise_one(limit, expected, launches, monkeypatch):
    shapes = [(0,), (490, 2), (10,), (430,), (), (499,), (491,), (489,)]
    whole = trained("adamw8bit", BF16, shapes=shapes, steps=1)
    launches.clear()
    monkeypatch.setattr(native, "BUCKET_NUMEL", limit)
    assert_same(whole, trained("adamw8bit", BF16, shapes=shapes, steps=1))
    assert launches == expected


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, [1] * 6),  # each once its gradient is complete; nothing is left for step()
        (45_000, [4, 2]),  # the last layer, then half of the previous, 49 KB layer fills the bucket
        (64 << 20, [6]),  # all in step()
    ],
)
def test_a_bucket_of_the_fused_backward_is_one_launch(bucket_bytes, expected, launches):
    layers = [torch.nn.Linear(8, 24), torch.nn.Linear(24, 512), torch.nn.Linear(512, 1)]
    model = torch.nn.Sequential(*layers)
    optimizer = optim.build("adamw", model.parameters(), backend="native")
    optim.fuse_backward(optimizer, bucket_bytes)
    for _ in range(2):
        launches.clear()
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        assert launches == expected


# Memory and 64 bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw_factored", {}),
        ("adafactor8bit", {}),
        ("adamw8bit", {}),
        ("adopt_factored", {"max_grad_norm": 1.0, "orthograd": True, "cautious": True}),
        ("prodigy_factored", {}),
        ("came8bit", {"growth_limit": 1.01}),
        ("apollo_mini", {}),
        ("sophia", {"storage": "8bit"}),
    ],
)
def test_a_step_needs_no_full_size_temporary(name, options):
    param = Parameter(torch.full((4096, 4096), 0.5, dtype=BF16))
    param.grad = torch.full_like(param, 0.01)
    optimizer = optim.build(name, [param], backend="native", **options)
    optimizer.step()
    peak = memory.peak_temporary(optimizer.step, param.device)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak < 0.1 * param.numel() * param.element_size()


def untouched(shape, dtype):
    """A tensor of zeros whose pages take no memory until written."""
    count = math.prod(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory_map = mmap.mmap(-1, max(count, 1) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory_map, dtype=dtype, count=count).view(shape)


def draws_at(key, elements, salt=0, bits=16):
    """`rng.draws` for some elements of one long row."""
    words = rng.words32(elements // 32 * 16 + elements % 16, key) * 0x16AB7965**salt
    words = words.to(torch.int64)
    shift = (32 - bits) * (elements // 16 % 2)
    return (words >> shift & (1 << bits) - 1).to(torch.int32)


def rounded(x, draws):
    return (x.view(torch.int32) + draws & -65536).view(FP32).to(BF16)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not there")
@pytest.mark.parametrize("storage", ["fp32", "bf16", "8bit"])
def test_elements_beyond_32_bits_are_found_and_drawn_for(storage, monkeypatch):
    """Steps a few tiles of a tensor of 2^33 elements; the rest takes no memory."""
    numel, tile = 2**33 + 700, plan.TILE_ROWS * plan.TILE_COLS
    starts = torch.tensor([0, 2**31, 2**32, 2**33 - tile, 2**33])

    class SomeTiles(plan.Bucket):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.tiles = self.tiles[starts // tile].contiguous()
            self.num_tiles, self.first_tile = len(starts), torch.tensor([0, len(starts)])

    monkeypatch.setattr(plan, "Bucket", SomeTiles)
    param = Parameter(untouched((numel,), BF16))
    param.grad = untouched((numel,), BF16)
    optimizer = optim.build("sgd", [param], lr=0.01, storage=storage, backend="native")
    (group,) = optimizer.param_groups
    blank = states.blank(
        *(param, optimizer.codecs(param, group), False),
        *(torch.device("meta"), torch.device("cpu")),
    )
    optimizer.state[param] = state = {
        key: untouched(x.shape, x.dtype) if x.is_meta else x for key, x in blank.items()
    }
    elements = (starts[:, None] + torch.arange(700)).flatten()
    grad = torch.randn(len(elements), generator=torch.Generator().manual_seed(0)).to(BF16)
    param.grad[elements] = grad
    optimizer.step()

    key, g = rng.mix(0, 0, 1), grad.float()
    moved = rounded(g * -torch.tensor(0.01), draws_at(key, elements))
    assert torch.equal(param.detach()[elements], moved)
    draws = draws_at(key, elements, salt=1)
    if storage == "fp32":
        assert torch.equal(state["exp_avg"][elements], g)
    elif storage == "bf16":
        assert torch.equal(state["exp_avg"][elements], rounded(g, draws))
    else:
        top = state["exp_avg.top"]
        exponent = top[elements // 128].to(torch.int32) + 127
        zero = (exponent - 14) << 23
        bits = (g.abs() + zero.view(FP32)).view(torch.int32)
        draws = draws_at(key, elements, salt=1, bits=20)
        codes = ((bits + draws - zero) >> 20) | (g < 0).int() << 7
        assert torch.equal(state["exp_avg.codes"][elements].int(), codes)
        blocks = [b for part in g.view(-1, 700) for b in part.split(128)]
        tops = top[(starts[:, None] // 128 + torch.arange(6)).flatten()]
        largest = torch.stack([b.abs().max() for b in blocks]).view(torch.int32)
        assert tops.tolist() == (((largest + 0xFFFFF) >> 23) - 127).tolist()
