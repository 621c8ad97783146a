"""The backend: how it is chosen and reported."""

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys
import warnings

import helpers
import pytest
import torch
from helpers import assert_same, make_params, run, set_grads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
from optim import backend, compiled, features, native

BUILT = native.unavailable() is None
needs_native = pytest.mark.skipif(not BUILT, reason="it is not built")
SHAPES = [(24, 16), (16, 3, 3, 3), (24,)]
pytestmark = pytest.mark.usefixtures("no_wishes")


@pytest.fixture
def unbuilt(monkeypatch):
    """As if the installation had found no compiler."""
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(
        compiled, "missing", "the native engine is not built; install a C++ compiler"
    )


def build(name="sgd", **options):
    return optim.build(name, make_params(shapes=SHAPES), **options)


# The choice ---------------------------------------------------------------------------------------

BEST = "native" if BUILT else "torch"


@pytest.mark.filterwarnings("ignore:the optimizers run on plain PyTorch")
@pytest.mark.parametrize(
    ("argument", "environment", "chosen"),
    [
        ({}, None, BEST),
        ({"backend": "auto"}, None, BEST),
        ({"backend": "auto"}, "auto", BEST),
        ({"backend": "auto"}, "torch", "torch"),
        ({"backend": "torch"}, None, "torch"),
        ({"backend": "torch"}, "native", "torch"),  # the argument wins
        pytest.param({"backend": "native"}, "torch", "native", marks=needs_native),
        pytest.param({"backend": "auto"}, "native", "native", marks=needs_native),
    ],
)
def test_the_argument_chooses_then_the_environment_then_what_is_built(
    argument, environment, chosen, monkeypatch
):
    if environment:
        monkeypatch.setenv("OPTIM_BACKEND", environment)
    assert build(**argument).backend == chosen


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='cuda' .* 'auto', 'native' or 'torch'"):
        build(backend="cuda")
    monkeypatch.setenv("OPTIM_BACKEND", "fast")
    with pytest.raises(ValueError, match="OPTIM_BACKEND=fast is not one of auto, native, torch"):
        build()
    assert build(backend="torch").backend == "torch"  # the environment is not read


@needs_native
def test_an_instruction_set_that_does_not_exist_is_refused_with_those_that_do(monkeypatch):
    monkeypatch.setenv("OPTIM_ISA", "mmx")
    names = ", ".join(native._native.isas())
    optimizer = build(backend="native")
    set_grads(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(ValueError, match=f"OPTIM_ISA=mmx: this machine has {names}"):
        optimizer.step()


@needs_native
def test_the_best_instruction_set_is_the_default(monkeypatch):
    assert native.isa() == native._native.isas()[-1]
    monkeypatch.setenv("OPTIM_ISA", "baseline")
    assert native.isa() == "baseline"


def test_the_backend_is_no_option_of_a_group():
    with pytest.raises(TypeError, match="backend"):
        optim.build("sgd", [{"params": make_params(), "backend": "torch"}])
    assert "backend" not in build().param_groups[0]


# Without the native module ------------------------------------------------------------------------


@pytest.mark.usefixtures("unbuilt")
def test_without_the_module_auto_says_so_once_and_computes_on_torch():
    with pytest.warns(
        RuntimeWarning, match=r"plain PyTorch.*; the native engine is not built; install a C"
    ):
        optimizer = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("adamw")
    assert optimizer.backend == "torch"
    plain = build(backend="torch")
    for one in (optimizer, plain):
        run(one, one.param_groups[0]["params"], range(2))
    assert_same(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"])


@pytest.mark.usefixtures("unbuilt")
def test_without_the_module_torch_is_no_reason_to_warn(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(backend="torch")
        monkeypatch.setenv("OPTIM_BACKEND", "torch")
        build()


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize("environment", [None, "native"])
def test_without_the_module_native_is_refused_with_the_reason(environment, monkeypatch):
    if environment:
        monkeypatch.setenv("OPTIM_BACKEND", environment)
    with pytest.raises(
        RuntimeError,
        match=r"backend='native' is not available: the native engine is not built; .*compiler",
    ):
        build(backend="auto" if environment else "native")


def test_the_package_imports_and_steps_where_the_module_cannot_be_loaded():
    """In a new process, where the import fails."""
    code = """
import sys
sys.modules["optim._native"] = None
import torch, optim
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = optim.Adafactor8bit([p])
optimizer.step()
assert optimizer.backend == "torch" and (p < 1).all()
assert "not built; install a C++ compiler, then the package again" in optimizer.engine()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if not k.startswith("OPTIM_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SlowBackend: the optimizers run on plain PyTorch") == 1


# Moving between backends --------------------------------------------------------------------------


@needs_native
def test_batches_of_matrices_are_the_references_bit_for_bit():
    runs = []
    for chosen in ("torch", "native"):
        params = make_params(torch.bfloat16, SHAPES)
        groups = [{"params": params, "conv_view": "last2"}]
        run(optim.build("adafactor8bit", groups, backend=chosen, beta1=0.9), params, range(3))
        runs.append(params)
    assert_same(*runs)


@needs_native
def test_groups_of_both_kinds_step_and_are_clipped_together():
    runs = []
    for chosen in ("torch", "native"):
        params = make_params(shapes=SHAPES * 2)
        groups = [{"params": params[:3], "conv_view": "last2"}, {"params": params[3:]}]
        optimizer = optim.build("adafactor", groups, backend=chosen, max_grad_norm=0.1, eps=(1, 1))
        run(optimizer, params, range(3))
        assert all(int(optimizer.state[p]["step"]) == 3 for p in params)
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@needs_native
def test_an_optimizer_without_a_kernel_says_who_steps_it(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())

    class Averaged(optim.SGD):
        rule = staticmethod(lambda h, w, g, s: (g, {}))

    with pytest.warns(
        RuntimeWarning, match="plain PyTorch, which is slower; Averaged has no fused"
    ):
        optimizer = Averaged(make_params())
    assert optimizer.engine() == "plain PyTorch, which is slower; Averaged has no fused kernel"


@needs_native
@pytest.mark.filterwarnings("ignore:the optimizers run on plain PyTorch")
def test_a_rule_of_ones_own_is_used_whatever_its_name():
    def adam(h, w, g, s):
        return 3 * g, {}

    class Thrice(optim.AdamW):
        rule = staticmethod(adam)

        def __init__(self, params, lr=1.0, *, weight_decay=0.0, **features):
            optim.FusedOptimizer.__init__(self, params, locals())

        def moments(self, param, group):
            return {}

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = Thrice([param])
    optimizer.step()
    assert param.tolist() == [-3, -3]
    assert optimizer.engine() == "plain PyTorch, which is slower; Thrice has no fused kernel"


@needs_native
@pytest.mark.parametrize(
    ("name", "option"),
    [("adafactor", {"conv_view": "last2"}), ("apollo", {"residual": True})],
    ids=["adafactor", "apollo"],
)
def test_options_without_a_kernel_are_named_with_their_groups(name, option, monkeypatch):
    monkeypatch.setattr(backend, "_said", set())
    written = "=".join(str(part) for part in next(iter(option.items())))
    params = make_params()
    with pytest.warns(RuntimeWarning, match=f"{optim.FAMILY[name].__name__} with {written} has no"):
        optimizer = optim.build(name, params, backend="native", **option)
    slow = f"plain PyTorch on a CPU, which is slower; {written} has no fused kernel"
    assert optimizer.engine() == slow
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once already
        run(optimizer, params, range(1))
    groups = [{"params": params[:2]}, {"params": params[2:4], **option}, {"params": params[4:]}]
    mixed = optim.build(name, groups, backend="native").engine()
    assert f"the native engine ({native.isa()}) on a CPU (groups 0, 2)" in mixed
    assert f"{slow} (group 1)" in mixed


@needs_native
def test_an_option_without_a_kernel_is_named_when_it_is_set_later(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())
    params = make_params()
    optimizer = optim.build("adafactor", params, backend="native")
    optimizer.param_groups[0]["conv_view"] = "last2"
    with pytest.warns(RuntimeWarning, match="Adafactor with conv_view=last2 has no fused kernel"):
        run(optimizer, params, range(1))


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_native)])
def test_a_copy_keeps_the_backend_and_leaves_the_original_alone(chosen, copier, monkeypatch):
    optimizer = build("adamw8bit", backend=chosen)
    params = optimizer.param_groups[0]["params"]
    run(optimizer, params, range(2))
    monkeypatch.setenv("OPTIM_BACKEND", "torch")  # read on construction, not on copying
    twin_params, twin = copier((params, optimizer))
    assert twin.backend == chosen
    before = [p.detach().clone() for p in params]
    run(twin, twin_params, range(2, 4))
    assert_same(params, before)
    run(optimizer, params, range(2, 4))
    assert_same(params, twin_params)


@needs_native
def test_a_copy_made_where_the_engine_is_built_runs_where_it_is_not(request):
    optimizer = build(backend="native")
    run(optimizer, optimizer.param_groups[0]["params"], range(1))
    sent = pickle.dumps(optimizer)
    request.getfixturevalue("unbuilt")
    with pytest.warns(RuntimeWarning, match="plain PyTorch"):
        arrived = pickle.loads(sent)
    run(arrived, arrived.param_groups[0]["params"], range(1, 2))
    assert arrived.backend == "torch"


@needs_native
@pytest.mark.parametrize(("first", "second"), [("torch", "native"), ("native", "torch")])
@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_a_state_of_one_backend_goes_on_in_the_other(name, first, second):
    straight, changed = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    run(optim.build(name, straight, backend=first), straight, range(4))
    start = optim.build(name, changed, backend=first)
    run(start, changed, range(3))
    file = io.BytesIO()
    torch.save(start.state_dict(), file)
    file.seek(0)
    end = optim.build(name, changed, backend=second)
    end.load_state_dict(torch.load(file, weights_only=True))
    run(end, changed, range(3, 4))
    assert end.backend == second
    for a, b in zip(straight, changed, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


class OnlyNarrow(TorchDispatchMode):
    """A device without fp64, as MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, func
            assert x is not torch.float64, func
        return result


@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_plain_pytorch_needs_no_fp64_where_a_device_has_none(name, monkeypatch):
    options = {"backend": "torch", "grad_clip": 0.1, "max_grad_norm": 1.0}
    refusable = {"orthograd": True, "growth_limit": 1.1}
    options |= {k: x for k, x in refusable.items() if k not in optim.FAMILY[name].refuses}
    if "relative_step" in optim.options_of(name):
        options |= {"relative_step": True, "scale_parameter": True}
    runs = []
    for mode in (contextlib.nullcontext(), OnlyNarrow()):
        monkeypatch.setattr(features, "NARROW", {"cpu"} if runs else set())
        params = make_params(shapes=SHAPES)
        with mode:
            optimizer = helpers.build(name, params, **options)
            run(optimizer, params, range(3))
            if name != "sophia":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
