"""APOLLO's GPU kernels, compiled for this machine's CPU: compared with the CPU's loops; and what
they promise."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from cuda_host import Host, on_host
from helpers import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim import native, plan, portion, projected_cuda
from optim.projection import channels, projection

sys.path.insert(0, str(REPOSITORY / "scripts"))
from bench.cases import BF16, CASES, FP16, FP32, Case, make, set_grads
from bench.checks import PRODUCTS_SLACK
from bench.tolerances import blur_of, param_misses

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason="it is not built"),
    pytest.mark.slow,
]
CPU = torch.device("cpu")
SOME = [
    Case("apollo", BF16, {}),
    Case("apollo", BF16, {"rank": 16, "scaling": "tensor", "projection": "sign"}),
    Case("apollo", FP32, {"rank": 16, "orthograd": True}),
]
# The same for gradients of every dtype, with few and with many rows.
UNUSABLE = [
    Case("apollo", dtype, {"rank": rank, "storage": "fp32", "projection": kind})
    for dtype in (BF16, FP16, FP32)
    for rank, kind in ((1, "sign"), (4, "gaussian"), (16, "gaussian"))
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("kernels"))


def engine_of(optimizer):
    return optimizer._dispatch.engine(CPU)


def compare(case, one, two, before, step):
    """Assert that both made the same step within tolerances, then copy the first to the second."""
    (params, optimizer), (twins, twin) = one, two
    found = []
    for index, (p, q, old) in enumerate(zip(params, twins, before, strict=True)):
        blur = blur_of(index, optimizer.param_groups[0], p, step + 1)
        states = optimizer.state[p], twin.state[q]
        found += param_misses(p, q, old, *states, PRODUCTS_SLACK, blur)
        q.data.copy_(p)
        for key, x in states[0].items():
            states[1][key].copy_(x)
    assert not found, (case, step, found)


def step_both(one, two, host, step, spoil=lambda grad: None):
    """Step the CPU's way and the GPU's -> the weights before."""
    before = [p.detach().clone() for p in one[0]]
    for params, _ in (one, two):
        set_grads(params, step)
        spoil(params[0].grad)
    one[1].step()
    with on_host(host):
        two[1].step()
    return before


def stepped(host, count, shape):
    """A rank-4 APOLLO after its first step, over `count` parameters."""
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(count)]
    optimizer = optim.build("apollo", params, rank=4)
    set_grads(params, 0)
    with on_host(host):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", [case for case in CASES if case.is_projected()], ids=str)
def test_a_step_is_the_cpus_step(case, host):
    one, two = make(case), make(case)
    for step in range(3):
        before = step_both(one, two, host, step)
        compare(case, one, two, before, step)
    assert isinstance(engine_of(two[1]), projected_cuda.CudaProjectedEngine)


@pytest.mark.parametrize("kind", ["gaussian", "sign"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_kernels_draws_are_those_of_python_in_the_dtype_of_gradients(dtype, kind, host):
    rank = 20
    params = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((701, 710), (33, 3, 3, 3))]
    assert rank * 701 > plan.DRAWS
    optimizer = optim.build(
        "apollo", params, rank=rank, projection=kind, update_gap=2, seed=5, storage="bf16"
    )
    seen = []
    for t in (1, 2, 3):
        set_grads(params, t)
        with on_host(host):
            optimizer.step()
        (work,) = engine_of(optimizer)._works.values()
        (one,) = work.portions
        assert len(one.places) == 2
        for (index, group, param), p in zip(one.places, one.p, strict=True):
            h = SimpleNamespace(**group | {"index": index, "t": t})
            wanted = projection(h, len(channels(param)), CPU) * rank**0.5
            assert p.dtype == dtype
            assert torch.allclose(p.float(), wanted, rtol=1e-6, atol=0)
        seen.append(one.p[0].clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("case", UNUSABLE, ids=str)
def test_unusable_elements_count_as_zero_and_a_channel_of_them_keeps_its_moments(case, host):
    def spoil(grad):  # in columns, which are the channels of (70, 1100)
        grad[3, 700] = torch.nan
        grad[:, 701] = torch.nan
        grad[4, 702], grad[5, 703] = torch.inf, -torch.inf
        grad[:, 1099] = 1e30  # infinite in fp16
        grad[6, 704] = 1e30
        grad[7, 705], grad[8, 705] = 1e30, -1e30

    one, two = make(case), make(case)
    compare(case, one, two, step_both(one, two, host, 0), 0)
    old = {k: x.clone() for k, x in two[1].state[two[0][0]].items()}
    for step in (1, 2):
        before = step_both(one, two, host, step, spoil)
        compare(case, one, two, before, step)
    assert two[1].nonfinite_count() == one[1].nonfinite_count() == 2 * (2 * 70 + 6)
    for key in ("exp_avg", "exp_avg_sq"):
        kept = (two[1].state[two[0][0]][key] == old[key]).all(dim=0)
        assert kept.nonzero().flatten().tolist() == [701, 1099]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_portions_do_not_change_the_result_nor_does_stepping_one_by_one(case, host, monkeypatch):
    runs = [make(case) for _ in range(3)]
    for way, (params, optimizer) in enumerate(runs):
        monkeypatch.setitem(portion.SCRATCH_BYTES, "cpu", 1 if way == 1 else 256 << 20)
        with on_host(host):
            for step in range(3):
                set_grads(params, step)
                if way == 2:
                    for param in reversed(params):
                        optimizer.step_param(param)
                else:
                    optimizer.step()
    works = [list(engine_of(optimizer)._works.values()) for _, optimizer in runs]
    num_portions = [sum(len(work.portions) for work in each) for each in works]
    assert num_portions[1] > num_portions[0]
    for params, optimizer in runs[1:]:
        assert_same(runs[0][0], params)
        for p, q in zip(runs[0][0], params, strict=True):
            one, two = runs[0][1].state[p], optimizer.state[q]
            assert all(torch.equal(x, two[key]) for key, x in one.items())


def test_groups_of_several_kinds_are_stepped_each_in_its_way(host):
    shapes = [(24, 40), (40, 24), (24, 40), (8,), (24, 40)]  # (8,) is not projected
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
        groups = [
            {"params": params[:2], "rank": 12, "projection": "sign"},
            {"params": params[2:4], "rank": 3, "scaling": "tensor", "lr": 0.02},
            {"params": params[4:], "rank": 12, "grad_clip": 0.3, "update_gap": 1},
        ]
        runs.append((params, optim.build("apollo", groups, growth_limit=None)))
    for step in range(3):
        step_both(*runs, host, step)
    work = next(iter(engine_of(runs[1][1])._works.values()))
    assert len(work.portions) == 3
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(host):
    launches = []
    for count in (2, 20):
        before = host.launches
        stepped(host, count, (24, 40))
        launches.append(host.launches - before)
    assert launches[0] == launches[1] <= 12


class AsksNothing(TorchDispatchMode):
    """Raises if a number is read from a tensor, which would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in (
            *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"),
        ), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("case", [*SOME, Case("apollo", BF16, {"grad_clip": 0.1})], ids=str)
def test_a_step_reads_nothing_back(case, host, monkeypatch):
    params, optimizer = make(case)
    with on_host(host):
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        engine = engine_of(optimizer)
        whole = engine._work_of
        work = whole(optim.share.Share(optimizer._places()))
        monkeypatch.setattr(engine, "_work_of", lambda places: work)
        for each in (engine._dense_engine, engine._low_engine, engine._scaled_engine):
            monkeypatch.setattr(each, "step", lambda places, coefficients: None)
        monkeypatch.setattr(engine, "_put", lambda work, addresses: None)
        grads = [p.grad for p in params]
        with AsksNothing():
            optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))


def test_a_capture_finds_memory_for_every_portion(host, monkeypatch):
    monkeypatch.setitem(portion.SCRATCH_BYTES, "cpu", 1)
    optimizer = stepped(host, 5, (24, 40))
    monkeypatch.setattr(host, "capturing", lambda: True)
    optimizer.step()
    assert len(engine_of(optimizer)._low_engine._staging.of_graphs) == 2 * 5


@pytest.mark.parametrize("options", [{"rank": 16}, {"rank": 4}], ids=str)
def test_gradients_that_lie_otherwise_are_read(options, host):
    """Gradients that are not contiguous, or at other addresses."""
    case = Case("apollo", FP32, options)
    one, two = make(case), make(case)
    for step in range(3):
        before = [p.detach().clone() for p in one[0]]
        for params, _ in (one, two):
            set_grads(params, step)
        grad = two[0][0].grad
        two[0][0].grad = grad.t().contiguous().t() if step == 1 else grad.clone()
        one[1].step()
        with on_host(host):
            two[1].step()
        compare(case, one, two, before, step)


def test_another_state_is_found(host):
    case = SOME[0]
    one, two = make(case), make(case)
    for step in range(2):
        compare(case, one, two, step_both(one, two, host, step), step)
    state = copy.deepcopy(one[1].state_dict())
    for params, optimizer in (one, two):
        optimizer.load_state_dict(copy.deepcopy(state))
        for p, start in zip(params, one[0], strict=True):
            p.data.copy_(start)
    for state in two[1].state.values():  # tensors replaced one by one are noticed, too
        state["step"] = state["step"].clone()
    before = step_both(one, two, host, 2)
    compare(case, one, two, before, 2)


def test_a_16_bit_product_is_the_one_of_fp32_numbers():
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(shape, generator=generator) for shape in ((3, 50), (50, 70)))
    for dtype in (BF16, FP16, FP32):
        out = torch.empty(3, 70)
        projected_cuda.multiply(p.to(dtype), g.to(dtype), out)
        assert torch.allclose(out, p.to(dtype).float() @ g.to(dtype).float(), rtol=1e-5, atol=1e-5)


def test_a_scratch_is_no_larger_than_what_is_alive_at_once(host, monkeypatch):
    monkeypatch.setitem(portion.SCRATCH_BYTES, "cpu", 100_000)
    optimizer = stepped(host, 9, (24, 400))
    (work,) = engine_of(optimizer)._works.values()
    assert len(work.portions) == 2
    place = work.portions[0].places[0]
    each = portion.Portion.bytes_of(place, work.portions[0].kind)
    assert engine_of(optimizer)._scratch.numel() == 7 * each <= 100_000


def test_a_step_after_one_whose_copy_failed_reads_its_own_gradients(host, monkeypatch):
    case = Case("apollo", FP32, {"rank": 4})
    one, two = make(case), make(case)
    kept = []  # so that the next gradients are at other addresses
    for step in range(2):
        for params, _ in (one, two):
            set_grads(params, step)
            kept += [p.grad for p in params]
        with on_host(host):
            if step:
                with monkeypatch.context() as patch:
                    patch.setattr(engine_of(two[1])._staging, "readable", out_of_memory)
                    with pytest.raises(torch.OutOfMemoryError):
                        two[1].step()
            one[1].step()
            two[1].step()
    assert_same(one[0], two[0])


def out_of_memory(*_):
    raise torch.OutOfMemoryError("none left")
