"""The CUDA engine without a GPU: its kernels compiled for every architecture and looked at, and its
arithmetic, with the kernels compiled for the host instead, against the CPU engine's."""

import contextlib
import copy
import ctypes
import io
import re
import subprocess
import sysconfig

import pytest
import torch
from conftest import REPOSITORY
from helpers import set_grads
from torch.nn import Parameter

import optim
from optim import backend, cuda, native, plan
from optim.engine import DescriptorEngine

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]

needs_nvrtc = pytest.mark.skipif(cuda.unavailable() is not None, reason="no NVRTC")
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")

# (name, dtype, options): together every rule, codec and feature, in the kinds that runs consist of.
CASES = [
    *((name, BF16, {}) for name in sorted(optim.FAMILY)),
    ("adamw_factored", BF16, {"cautious": True, "orthograd": True, "grad_clip": 0.1}),
    ("adamw_factored", FP32, {"factor_1d": True, "cautious_decay": True}),
    ("adamw", FP16, {"storage": "bf16", "atan2": True, "grams": True}),
    ("adamw8bit", BF16, {"rounding": "kahan", "growth_limit": 1.01}),
    ("adopt", BF16, {"storage": "8bit", "atan2": True}),
    ("ademamix", FP32, {"storage": "8bit", "warmup_steps": 3}),
    ("lion", BF16, {"storage": "bf16", "rounding": "nearest"}),
    ("sgd", FP16, {"nesterov": True, "storage": "factored"}),
    ("adafactor8bit", BF16, {"clip_norm": "lagged", "relative_step": True}),
    ("adafactor8bit", FP32, {"beta1": 0.9, "storage": "factored", "scale_parameter": True}),
]
CASES = [case for case in CASES if plan.has_rule(optim.FAMILY[case[0]].rule)]
IDS = [f"{name}-{str(dtype)[6:]}-{'-'.join(options)}" for name, dtype, options in CASES]
SHAPES = [(70, 1100), (33, 3, 3, 3), (37,), (), (0,), (5, 0), (1, 5), (7, 1429)]


def make(name, dtype, options, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    return params, optim.build(name, params, lr=0.01, weight_decay=0.1, **options)


def kinds_of(name, dtype, options):
    """The kinds of tensors, with kernels each, that a run with these options has."""

    class Describing(DescriptorEngine):
        def _make(self, work, places):
            self.kinds = {
                cuda.kind_of(type(optimizer).rule.__name__, d, flags) for d in self._descriptors
            }

    params, optimizer = make(name, dtype, options)
    flags = plan.group_options(optimizer.param_groups[0], 1.0).flags
    set_grads(params, 0)
    engine = Describing(optimizer)
    engine._refresh(optimizer._places())
    return engine.kinds


# The compiler ------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_and_keeps_everything_in_registers(arch):
    kinds = set().union(*(kinds_of(*case) for case in CASES))
    names = {name for kind in kinds for name, _ in kind.passes()} | {cuda.MEASURE}
    log = io.StringIO()
    made = cuda.compile_kernels(sorted(names), arch, log)
    assert made.symbol_mapping.keys() == names
    report = log.getvalue()
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(memory) >= len(names)
    assert set(memory) == {("0", "0")}, report
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 255


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_then_taken_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "kernels"))
    gpu = cuda.Gpu.__new__(cuda.Gpu)
    gpu._arch, gpu._sources, gpu._loaded = "sm_90", "x", {}
    path = gpu._path(cuda.MEASURE)
    gpu._compile(cuda.MEASURE, path)
    symbol, code = path.read_bytes().split(b"\n", 1)
    assert b"measure_kernel" in symbol
    assert code[:4] == b"\x7fELF"
    gpu._sources = "y"  # other headers: another kernel
    assert gpu._path(cuda.MEASURE) != path


def test_a_machine_without_cuda_core_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    reason = cuda.unavailable.__wrapped__()
    assert "pip install 'low-memory-trainer[cuda]'" in reason


# The arithmetic -----------------------------------------------------------------------------------


class Host:
    """In place of a GPU: kernels compiled for this machine, on its memory."""

    def __init__(self, folder):
        self.folder, self.loaded, self.launches = folder, {}, 0

    def load(self, names):
        missing = [name for name in dict.fromkeys(names) if name not in self.loaded]
        if missing:
            stem = self.folder / f"kernels{len(self.loaded)}"
            lines = [
                f'extern "C" void kernel{i}(const engine::Launch* launch, int grid, int threads) '
                f"{{ cuda_on_host::run(grid, threads, [=] {{ {name}(launch); }}); }}"
                for i, name in enumerate(missing)
            ]
            includes = '#include "cuda_on_host.h"\n#include "engine/cuda.h"\n'
            stem.with_suffix(".cpp").write_text(includes + "\n".join(lines))
            compiler = sysconfig.get_config_var("CXX").split()[0]
            flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off"]
            paths = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests'}"]
            files = [stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so")]
            subprocess.run([compiler, *flags, *paths, *files], check=True)
            library = ctypes.CDLL(str(stem.with_suffix(".so")))
            for i, name in enumerate(missing):
                self.loaded[name] = getattr(library, f"kernel{i}")
        return self.loaded

    def launch(self, kernel, grid, block, shared, address):
        assert grid > 0
        assert shared <= 1 << 16
        self.launches += 1
        kernel(ctypes.c_void_p(address), grid, block)

    def here(self):
        return contextlib.nullcontext()

    def capturing(self):
        return False

    def pinned(self, *shape, dtype):
        return torch.empty(shape, dtype=dtype)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("kernels"))


def on_host(host, monkeypatch):
    monkeypatch.setattr(
        backend, "fused_engine", lambda optimizer, device: cuda.CudaEngine(optimizer, device, host)
    )


def differences(optimizer, twin):
    """Where two optimizers' parameters or states are not the same bits."""
    found = []
    pairs = zip(
        *((p for g in o.param_groups for p in g["params"]) for o in (optimizer, twin)), strict=True
    )
    for p, q in pairs:
        tensors = {"weight": (p.detach(), q.detach())}
        tensors |= {k: (x, twin.state[q][k]) for k, x in optimizer.state[p].items()}
        for key, (a, b) in tensors.items():
            if not torch.equal(a, b):
                found.append(f"{tuple(p.shape)} {key}: {(a != b).sum()} of {a.numel()}")
    return found


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "options"), CASES, ids=IDS)
def test_the_kernels_give_the_bits_of_the_cpu_engine(name, dtype, options, host, monkeypatch):
    params, optimizer = make(name, dtype, options)
    twins, twin = copy.deepcopy((params, optimizer))
    before = host.launches
    for step in range(3):
        for group in (params, twins):
            set_grads(group, step)
            group[0].grad[3, 700] = torch.nan
        optimizer.step()
        with monkeypatch.context() as patch:
            on_host(host, patch)
            twin.step()
        assert not differences(optimizer, twin), f"step {step + 1}"
    assert host.launches > before
