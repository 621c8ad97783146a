"""APOLLO's projections in the CPU engine: P as Python draws it, P G, and portions."""

import gc
import weakref

import pytest
import torch
from helpers import assert_same, build, make_params, projection_of, run, set_grads

import optim
from optim import native, plan, portion
from optim.features import usable
from optim.portion import Portion
from optim.projected import NativeProjectedEngine
from optim.projection import channels

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")
SHAPES = [(24, 16), (16, 24), (16, 16), (12, 3, 3, 3)]


@pytest.fixture
def portions(monkeypatch):
    """What the native engine has projected so far: (kind, P of each, P G of each), copied."""
    seen = []

    def measure(self, portion, real=NativeProjectedEngine._measure):
        products = [low.clone() for low in portion.products]
        seen.append((portion.kind, [p.clone() for p in portion.p], products))
        real(self, portion)

    monkeypatch.setattr(NativeProjectedEngine, "_measure", measure)
    return seen


@pytest.mark.parametrize("kind", ["gaussian", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engines_draws_are_those_of_python(dtype, kind, portions):
    rank = 20
    params = make_params(dtype, [(701, 710), (33, 3, 3, 3)])
    assert rank * 701 > plan.DRAWS
    run(optim.build("apollo", params, rank=rank, projection=kind, update_gap=2), params, range(3))
    for t, (_, drawn, _) in enumerate(portions, start=1):
        for index, (p, width) in enumerate(zip(drawn, (701, 27), strict=True)):
            options = {"rank": rank, "projection": kind, "update_gap": 2}
            wanted = projection_of(index, t, width, **options) * rank**0.5
            assert torch.allclose(p.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 13, 27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engines_product_is_that_of_the_usable_elements(dtype, rank, portions):
    """For gradients of either orientation and odd lengths, with unusable elements."""
    params = make_params(dtype, [(29, 101), (101, 29), (64, 96), (33, 5, 3, 3)])
    optimizer = optim.build("apollo", params, rank=rank)
    set_grads(params, 0)
    for param in params:
        grad = channels(param.grad)  # a view
        grad[2, 0], grad[3, 0], grad[5, 7] = torch.nan, torch.inf, -torch.inf
        grad[:, -1] = torch.nan
        if dtype is not torch.float16:
            grad[4, 9], grad[5, 9] = 1e30, -1e30
    optimizer.step()
    ((_, drawn, products),) = portions
    for param, p, low in zip(params, drawn, products, strict=True):
        grad = channels(param.grad).double()
        wanted = p.double() @ torch.where(usable(grad), grad, 0.0)
        assert low[:, -1].isnan().all()
        assert torch.allclose(low[:, :-1].double(), wanted[:, :-1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"scaling": "tensor"}, {"orthograd": True}], ids=str)
def test_portions_do_not_change_a_bit_nor_does_stepping_one_by_one(options, monkeypatch):
    ends = []
    for way, size in (("all", 1 << 20), ("all", 1), ("each", 1 << 20)):
        monkeypatch.setitem(portion.SCRATCH_BYTES, "cpu", size)
        params = make_params(torch.bfloat16, [*SHAPES, (700, 50), (50, 700)])
        optimizer = optim.build("apollo", params, rank=6, **options)
        for t in range(3):
            set_grads(params, t)
            if way == "all":
                optimizer.step()
            for param in params if way == "each" else []:
                optimizer.step_param(param)
        ends.append(params)
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_an_engine_keeps_to_the_instruction_set_that_it_was_made_for(monkeypatch):
    """It drew P in that instruction set's dtype."""
    used, project, made_for = set(), native.project, native.isa()

    def noted(use, table, count, isa):
        used.add(isa)
        project(use, table, count, isa)

    monkeypatch.setattr(native, "project", noted)
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = optim.build("apollo", params, rank=4, backend="native")
    run(optimizer, params, range(1))
    monkeypatch.setenv("OPTIM_ISA", "mmx")
    used.clear()
    run(optimizer, params, range(1, 3))
    assert used == {made_for}


def test_what_a_step_holds_is_of_the_projections_size(portions, monkeypatch):
    """Not the gradients' size: as many projections as fit into a bound, or one."""
    params = make_params(torch.bfloat16, [(64, 96)] * 12)
    optimizer = optim.build("apollo", params, rank=8, backend="native")
    run(optimizer, params, range(1))
    ((kind, _, _),) = portions
    each = Portion.bytes_of((0, optimizer.param_groups[0], params[0]), kind)
    assert each == 8 * 64 * kind.p_dtype.itemsize + 2 * 4 * 8 * 96
    monkeypatch.setitem(portion.SCRATCH_BYTES, "cpu", 3 * each + 1)
    other = optim.build("apollo", params, rank=8, backend="native")
    run(other, params, range(1))
    assert [len(drawn) for _, drawn, _ in portions] == [12, 3, 3, 3, 3]
    assert other._dispatch.engine(torch.device("cpu"))._scratch.numel() == 3 * each


@pytest.mark.parametrize("name", ["apollo", "muon"])
def test_an_outgrown_scratch_is_released(name):
    params = make_params(shapes=[(24, 16), (48, 32), (96, 64)])
    optimizer = build(name, params)
    set_grads(params, 0)
    scratches = []
    for param in params:
        optimizer.step_param(param)
        engine = optimizer._dispatch.engine(torch.device("cpu"))
        scratches.append(weakref.ref(engine._scratch.untyped_storage()))
    gc.collect()
    assert [scratch() is not None for scratch in scratches] == [False, False, True]
