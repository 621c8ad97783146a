"""The CUDA engine without a GPU: its kernels are compiled for every architecture and inspected;
compiled for the host, their arithmetic is compared with the CPU engine's."""

import contextlib
import copy
import gc
import io
import os
import re
import subprocess
import sys
import sysconfig
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from cuda_host import Host, on_host

import optim
from optim import cuda, gpu, native, plan

sys.path.insert(0, str(REPOSITORY / "scripts"))
from bench.cases import CASES, Case, copied, kernels_of, kinds_of, make, prepare, set_grads

ARCHITECTURES = ["sm_80", "sm_90", "sm_120"]

needs_nvrtc = pytest.mark.skipif(gpu.unavailable() is not None, reason="no NVRTC")
NOTHING = contextlib.nullcontext()

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")

# The compiler ------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_and_fits_registers_and_shared_memory(arch):
    names = kernels_of(CASES)
    kinds = set().union(*map(kinds_of, CASES))
    asked = {n: k.num_shared(n) * cuda.MOMENT_BYTES for k in kinds for n, _ in k.passes()}

    def used(report, symbol):
        """A kernel's bytes of static shared memory."""
        symbol = symbol.decode() if isinstance(symbol, bytes) else symbol
        found = re.search(rf"entry function '{symbol}'(?:.*\n)*?.*Used .*", report)
        assert found, symbol
        return sum(int(n) for n in re.findall(r"(\d+) bytes smem", found[0]))

    def compiled(some):
        log = io.StringIO()
        made = gpu.compile_kernels(some, arch, log)
        assert made.symbol_mapping.keys() == set(some)
        for name in some:
            asked[name] = asked.get(name, 0) + used(log.getvalue(), made.symbol_mapping[name])
        return log.getvalue()

    with ThreadPoolExecutor() as pool:
        report = "".join(pool.map(compiled, [names[i::16] for i in range(16)]))
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(memory) >= len(names)
    assert set(memory) == {("0", "0")}, report
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 255
    assert max(asked.values()) <= 48 << 10  # a launch's limit without opting in to more


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_multiprocessor_has_registers_for_eight_blocks_of_adamw8bit(arch):
    (name,) = (
        name
        for kind in kinds_of(Case("adamw8bit", torch.bfloat16, {}))
        for name, _ in kind.passes()
        if "apply_kernel" in name and "Float8Slot" in name
    )
    log = io.StringIO()
    gpu.compile_kernels([name], arch, log)
    registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())))
    assert registers * cuda.TILE_THREADS * 8 <= 65536
    assert {*re.findall(r"(\d+) bytes spill stores", log.getvalue())} == {"0"}


@pytest.mark.parametrize(
    ("flags", "read"),
    [
        (("grad_clip",), ["AnyGrad", "Unread"]),
        (("scale_parameter",), ["Unread", "AnyWeight"]),
        (("orthograd",), ["AnyGrad", "AnyWeight"]),
        (("grad_clip", "scale_parameter"), ["AnyGrad", "AnyWeight"]),
    ],
)
def test_what_is_measured_before_a_step_reads_no_more_than_its_flags_ask_for(flags, read):
    bits = sum(1 << plan.FLAGS.index(flag) for flag in flags)
    kind = gpu.Kind("sgd", (0, 0, 0), 0, 0, bits, False)
    (kernel,) = [name for name, _ in kind.passes() if "measure" in name]
    assert re.findall(r"Any\w+|Unread", kernel) == read


def test_a_pass_that_looks_at_no_moment_asks_for_none_of_their_shared_memory():
    flag = 1 << plan.FLAGS.index("grad_clip")
    kind = gpu.Kind("adam", (6, 0, 5), 1, 1, flag, False)
    assert [kind.num_shared(name) for name, of_tiles in kind.passes() if of_tiles] == [0, 2]


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_then_taken_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(gpu, "_kernel", lambda raw: raw)
    card, path = a_card(), a_card()._path(gpu.MEASURE)
    raw = card.load([gpu.MEASURE])[gpu.MEASURE]
    symbol, code = raw.split(b"\n", 1)
    assert b"measure_kernel" in symbol
    assert code[:4] == b"\x7fELF"
    assert [x.name for x in path.parent.iterdir()] == [path.name]  # no temporary files
    monkeypatch.setattr(gpu, "compile_kernels", None)
    assert a_card().load([gpu.MEASURE]) == {gpu.MEASURE: raw}
    card._sources = "y"  # changed headers give another kernel
    assert card._path(gpu.MEASURE) != path


def a_card():
    card = gpu.Gpu.__new__(gpu.Gpu)
    card._arch, card._sources, card._loaded, card.num_compiled = "sm_90", "x", {}, 0
    return card


@pytest.fixture
def compiled(monkeypatch):
    """The names compiled so far; dummy bytes replace the code."""
    names = []

    def compile_kernels(some, arch):
        names.extend(some)
        return SimpleNamespace(code=b"x" * 1000, symbol_mapping={name: "s" for name in some})

    monkeypatch.setattr(gpu, "compile_kernels", compile_kernels)
    monkeypatch.setattr(gpu, "_kernel", lambda raw: raw)
    return names


@pytest.mark.parametrize("spoil", [lambda raw: raw[:500], lambda raw: b"", lambda raw: raw + b"x"])
def test_a_kernel_that_is_not_whole_on_the_disk_is_compiled_again(
    spoil, compiled, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path))
    path = a_card()._path("k")
    right = a_card().load(["k"])
    path.write_bytes(spoil(path.read_bytes()))
    for times in (2, 2):  # the rewritten file is complete
        assert a_card().load(["k"]) == right
        assert compiled == ["k"] * times


def test_a_cache_that_cannot_be_written_is_said_and_the_kernel_used(
    compiled, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path / "file" / "kernels"))
    card = a_card()
    for _ in range(2):
        assert card.load(["k", "l"]).keys() == {"k", "l"}
    (record,) = caplog.records
    assert "cannot be cached" in record.getMessage()
    assert "OPTIM_CACHE" in record.getMessage()
    assert compiled == ["k", "l"]


def test_two_threads_may_keep_the_same_kernel(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_CACHE", str(tmp_path))
    path, raw = a_card()._path("k"), b"s\n" + b"x" * 1_000_000
    with ThreadPoolExecutor(4) as pool:
        failures = list(pool.map(lambda _: a_card()._keep(raw, path), range(40)))
    assert failures == [None] * 40
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    assert a_card()._read(path) == raw


# Runs in a new process, which finds the fake driver instead of the real one.
LAUNCH = """
import contextlib, pathlib, sys, threading, warnings
from types import SimpleNamespace
warnings.simplefilter("error", DeprecationWarning)
import torch
from optim import gpu
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=0xABC0)
card = gpu.Gpu.__new__(gpu.Gpu)
card._device, card._threads = torch.device("cuda", 1), threading.local()
for _ in range(2):
    with card.here():
        kernel = card._read(pathlib.Path(sys.argv[1]))
        card.launch(kernel, 70000, 64, 4352, 0x7FFF12345678)
"""


@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="libcuda.so.1 is Linux's")
def test_the_driver_is_asked_for_the_kernel_and_told_grid_stream_and_argument(tmp_path):
    raw = a_card()._compile(gpu.MEASURE)
    a_card()._keep(raw, tmp_path / "kernel")
    symbol = raw.split(b"\n", 1)[0].decode()
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    source, library = REPOSITORY / "tests" / "fake_driver.c", tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-w", "-shared", "-fPIC", source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, tmp_path / "kernel"],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked = ["load ELF", f"kernel {symbol} of 0x1111"]
    asked += ["launch 0x2222 grid 70000 1 1 block 64 1 1 shared 4352 stream 0xabc0 argument "
              "7fff12345678"]  # fmt: skip
    context = ["context 0x3001"]  # once per thread
    assert done.stdout.splitlines() == [*context, *asked, *asked]


def test_a_machine_without_cuda_core_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    reason = gpu.unavailable.__wrapped__()
    assert "pip install 'low-memory-trainer[cuda]'" in reason


# The arithmetic -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Host(tmp_path_factory.mktemp("kernels"))


def differences(optimizer, twin):
    """List where two optimizers' parameters or states are not bitwise equal."""
    found = []
    pairs = zip(
        *((p for g in o.param_groups for p in g["params"]) for o in (optimizer, twin)), strict=True
    )
    for p, q in pairs:
        tensors = {"weight": (p.detach(), q.detach())}
        tensors |= {k: (x, twin.state[q][k]) for k, x in optimizer.state[p].items()}
        for key, (a, b) in tensors.items():
            if not torch.equal(a, b):
                values = f", {a.tolist()} and {b.tolist()}" if a.numel() < 5 else ""
                found.append(f"{tuple(p.shape)} {key}: {(a != b).sum()} of {a.numel()}{values}")
    return found


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.is_projected()], ids=str)
def test_the_kernels_give_the_bits_of_the_cpu_engine(case, host):
    params, optimizer = make(case)
    twins, twin = copied(params, optimizer)
    before = host.launches
    for step in range(3):
        prepare(params, optimizer, step)
        with on_host(host):
            prepare(twins, twin, step)
        for group in (params, twins):
            set_grads(group, step)
            group[0].grad[3, 700] = torch.nan
        optimizer.step()
        with on_host(host):
            twin.step()
        assert not differences(optimizer, twin), f"step {step + 1}"
    assert host.launches > before


@needs_native
@pytest.mark.slow
def test_gradients_are_found_after_another_set_of_parameters_has_moved_them(host):
    params, optimizer = make(CASES[0])
    twins, twin = copy.deepcopy((params, optimizer))
    set_grads(params, 0)
    set_grads(twins, 0)
    for group, one, engine in ((params, optimizer, NOTHING), (twins, twin, on_host(host))):
        usual, other = group[0].grad, torch.ones_like(group[0])
        with engine:
            one.step()
            group[0].grad = other
            one.step_param(group[0])
            group[0].grad = usual
            one.step()
    assert not differences(optimizer, twin)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("none left")


def test_a_step_after_one_whose_copy_failed_reads_its_own_gradients(host, monkeypatch):
    params, optimizer = make(CASES[0])
    twins, twin = copied(params, optimizer)
    for step in range(2):
        for group in (params, twins):
            kept = [p.grad for p in group]  # so that the next gradients are at other addresses
            set_grads(group, step)
        with on_host(host):
            if step:
                staging = twin._dispatch.engine(torch.device("cpu"))._staging
                with monkeypatch.context() as patch:
                    patch.setattr(staging, "readable", out_of_memory)
                    with pytest.raises(torch.OutOfMemoryError):
                        twin.step()
            for each in (optimizer, twin):
                each.step()
        del kept
    assert not differences(optimizer, twin)


def test_every_capture_has_memory_of_its_own_and_wants_a_step_before_it(host, monkeypatch):
    params, optimizer = make(CASES[0])
    set_grads(params, 0)
    with on_host(host):
        optimizer.step()
    copied = optimizer._dispatch.engine(torch.device("cpu"))._staging.of_graphs
    for captures in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(host, "capturing", lambda: True)
            optimizer.step()
        assert len(copied) == 2 * captures  # the addresses and the options
        optimizer.step()
    assert len({x.data_ptr() for x in copied}) == 4
    monkeypatch.setattr(host, "capturing", lambda: True)
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"an ordinary step\(\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw_factored", "apollo", "muon"])
def test_a_capture_without_a_step_before_it_is_refused_before_anything_is_allocated(
    name, host, monkeypatch
):
    params, optimizer = make(Case(name, torch.float32, {}))
    set_grads(params, 0)

    def refused(step):
        with monkeypatch.context() as patch:
            patch.setattr(host, "capturing", lambda: True)
            with pytest.raises(RuntimeError, match=r"an ordinary step\(\)"):
                step()

    with on_host(host):
        refused(optimizer.step)
        assert not optimizer.state
        optimizer.step_param(params[0])
        refused(lambda: optimizer.step_param(params[1]))
        assert [*optimizer.state] == [params[0]]
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw_factored", "apollo", "muon"])
def test_a_fused_backward_of_many_buckets_can_be_captured(name, host, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(24, 40)) for _ in range(6)]
    options = {"rank": 4} if name == "apollo" else {}
    optimizer = optim.build(name, params, **options)
    optim.fuse_backward(optimizer, bucket_bytes=1)

    def train():
        sum(p.square().sum() for p in params).backward()
        optimizer.step()

    with on_host(host):
        train()
        for _ in range(2):
            monkeypatch.setattr(host, "capturing", lambda: True)
            train()
            monkeypatch.setattr(host, "capturing", lambda: False)
            train()
    assert all(int(optimizer.state[p]["step"]) == 5 for p in params)


@pytest.mark.parametrize("name", ["adamw_factored", "apollo", "muon"])
def test_what_a_graph_points_to_outlives_an_ordinary_step_of_more_parameters(
    name, host, monkeypatch
):
    params, optimizer = make(Case(name, torch.float32, {}))
    set_grads(params, 0)
    grads = [p.grad for p in params]

    def held(engine):
        """Weak references to the memory of an engine's works."""
        rooms = [engine._room] if hasattr(engine, "_room") else [engine._scratch]
        works = [*getattr(engine, "_work", getattr(engine, "_works", {})).values()]
        for work in works:
            rooms += [one.tables for one in work.launches]
            portions = getattr(work, "portions", [])
            rooms += [getattr(portion, "table", portion.steps) for portion in portions]
        return [weakref.ref(x.untyped_storage()) for x in rooms if x.numel()]

    for p in params[1:]:
        p.grad = None
    with on_host(host):
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(host, "capturing", lambda: True)
            patch.setattr(gpu, "capturing", lambda: True)
            optimizer.step()
        outer = optimizer._dispatch.engine(torch.device("cpu"))
        inner = [x for x in vars(outer).values() if isinstance(x, cuda.CudaEngine)]
        before = [ref for engine in (outer, *inner) for ref in held(engine)]
        assert before
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    gc.collect()
    assert all(ref() is not None for ref in before)


def test_the_shared_memory_that_is_asked_for_is_what_the_kernels_use(tmp_path):
    """Checked by a host compiler, which sees the same constants."""
    source = tmp_path / "shared.cpp"
    source.write_text(
        '#include "cuda_on_host.h"\n#include "engine/cuda.h"\n'
        f"static_assert(4 * engine::cuda::ThreadSums::RowSums::kShared == {cuda.MOMENT_BYTES});\n"
        f"static_assert(engine::cuda::kTileThreads == {cuda.TILE_THREADS});\n"
    )
    compiler = sysconfig.get_config_var("CXX").split()[0]
    paths = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests'}"]
    flags = ["-std=c++17", "-fsyntax-only", "-w"]
    subprocess.run([compiler, *flags, *paths, source], check=True)


# Shortcuts that csrc/ takes on a GPU and claims to be exact.
EXACT = """
#include <stdio.h>
#include "cuda_on_host.h"
#include "engine/cuda.h"
using namespace engine::cuda;
constexpr uint32_t kStep = 1009;  // of the numbers' bits

float of_bits(uint32_t bits) { return __uint_as_float(bits); }
int main() {
    long codes = 0, decoded = 0, packed = 0;
    for (uint32_t bits = 0; bits < bits_of_float(0x1p127f); bits += kStep) {
        const int exponent = float8_exponent(of_bits(bits));
        const F x(of_bits(bits)), minus(-of_bits(bits));
        const U most((1u << kFloat8Cut) - 1), base(Signed8::base(exponent));
        codes += Unsigned8::encode(x, most, U(Unsigned8::base(exponent))).r[0] > 255;
        const uint32_t code = Signed8::encode(x, most, base).r[0];
        codes += code > 127;
        codes += Signed8::encode(minus, most, base).r[0] != (code | 128);
    }
    for (int exponent = 32; exponent <= 254; ++exponent)
        for (uint32_t code = 0; code < 256; ++code) {
            const uint32_t base = Unsigned8::base(exponent), bits = code ? (code + base) << 20 : 0;
            decoded += bits_of_float(Unsigned8::decode(U(code), U(base)).r[0]) != bits;
            const U grid(Signed8::base(exponent));
            const F x = Signed8::decode(U(code), grid);  // is stored as it is
            decoded += code % 128 < 120 && Signed8::encode(x, U(0u), grid).r[0] != code;
        }
    U x;
    for (uint32_t i = 0; i < 4; ++i) x.r[i] = 0x01020304u * (i + 1) ^ 0x80F07F00u;
    for (int i = 0; i < 4; ++i) packed += (word_of_bytes(x) >> 8 * i & 255) != (x.r[i] & 255);
    printf("%ld %ld %ld", codes, decoded, packed);
}
"""


def test_shorter_ways_to_a_code_and_back_are_exact(tmp_path):
    """Codes fit in a byte, x and -x differ only in the sign bit; decoding and packing are exact."""
    source, program = tmp_path / "exact.cpp", tmp_path / "exact"
    source.write_text(EXACT)
    compiler = sysconfig.get_config_var("CXX").split()[0]
    paths = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests'}"]
    flags = ["-std=c++17", "-O2", "-w", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, *paths, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"] * 3
