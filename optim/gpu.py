"""A GPU for the CUDA engine: calls of the driver, and the kernels of `csrc/`, compiled at first use
for the card at hand.

No nvcc and no toolkit are needed: NVRTC, which comes with torch, compiles the same headers that the
CPU engine is built from, through NVIDIA's cuda-core (`pip install 'low-memory-trainer[cuda]'`).
The result is cached on disk by content, so a second run, or an upgrade that changes no kernel,
compiles nothing.
"""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim import plan, sources

_log = logging.getLogger(__name__)

_OPTIONS: dict[str, Any] = {  # of the compiler; for the same bits as on a CPU
    "std": "c++17",
    "fma": False,
    "device_as_default_execution_space": True,  # CUDA 13.0 wants lambdas annotated otherwise
}
_HEADER = '#include "engine/cuda.h"\n'
_SLOTS = (
    "NoSlot",
    "DenseSlot",
    "Bf16Slot",
    "SignedFloat8Slot",
    "Float8Slot",
    "FactoredSlot<false>",
    "FactoredSlot<true>",
    "GivenSlot",
)  # by CodecId
# The optional passes over tiles, the flags that need each, and the Phase of tensors that follows.
_PASSES = (
    ("measure", ("orthograd", "grad_clip", "scale_parameter"), 2),
    ("factor", (), 4),  # needed by a factored second moment of Adafactor or CAME
    ("norm", ("growth_limit", "clip_exact"), 6),
    ("residual", (), 8),  # needed by a factored instability of CAME
    ("limit", ("growth_settled",), 10),
    ("align", ("cautious",), 12),
)
_BEGIN, _FINISH = 0, 14
_MEASURE = "engine::cuda::measure_kernel"
_FACTORING = ("adafactor", "came")  # rules with two structs: for a matrix and for a vector


@cache
def unavailable() -> str | None:
    """Why CUDA tensors cannot use the fused kernels, or None if they can."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program

        del Program
        failed, *_ = nvrtc.nvrtcVersion()
    except Exception as error:  # whatever a missing or broken package raises
        return (
            f"the CUDA kernels are compiled with cuda-core and NVRTC ({error}); "
            "pip install 'low-memory-trainer[cuda]'"
        )
    if torch.version.hip is not None:
        return "its kernels are CUDA's, and this torch is ROCm's"
    if failed:
        return f"NVRTC does not work ({failed})"
    if sources.folder() is None:
        return "csrc/ is not next to the package"
    return None


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    rule: str  # of optim/reference.py
    codecs: tuple[int, int, int]  # CodecId of each slot
    weight_dtype: int
    grad_dtype: int
    flags: int
    compensated: bool

    def num_shared(self, kernel: str) -> int:
        """How many moments use shared memory in this pass over tiles."""
        if kernel.startswith(_MEASURE):  # it reads no moment
            return 0
        return sum(_SLOTS[codec].startswith(("Factored", "Given")) for codec in self.codecs)

    def has(self, *flags: str) -> bool:
        return any(self.flags >> plan.FLAGS.index(flag) & 1 for flag in flags)

    def template(self) -> str:
        """Its name in C++ (`Kind` in csrc/engine/cuda.h)."""
        matrix = _SLOTS[self.codecs[2]].startswith("Factored")
        rule = "".join(map(str.capitalize, self.rule.split("_")))
        if self.rule in _FACTORING:
            rule += "Matrix" if matrix else "Vector"
        parts = [f"engine::cuda::{x}" for x in (rule, *(_SLOTS[codec] for codec in self.codecs))]
        return (
            f"engine::cuda::Kind<{', '.join(parts)}, {self.weight_dtype}, {self.grad_dtype}, "
            f"{self.flags}, {str(self.compensated).lower()}>"
        )

    def passes(self) -> list[tuple[str, bool]]:
        """The kernels of a step, in order: (kernel, whether it runs over tiles)."""
        template, names = self.template(), [(_tensor_kernel(_BEGIN), False)]
        factors = self.rule in _FACTORING and _SLOTS[self.codecs[2]].startswith("Factored")
        asked = {"factor": factors, "residual": factors and self.rule == "came"}
        for name, flags, after in _PASSES:
            if self.has(*flags) or asked.get(name):
                kernel = f"engine::cuda::{name}_kernel<{template}>"
                if name == "measure":
                    of_grad = self.has("orthograd", "grad_clip")
                    kernel = _measure(of_grad, self.has("orthograd", "scale_parameter"))
                names.append((kernel, True))
                names.append((_tensor_kernel(after), False))
        names.append((f"engine::cuda::apply_kernel<{template}>", True))
        return [*names, (_tensor_kernel(_FINISH), False)]


def kind_of(rule: str, d: plan.Descriptor, flags: int) -> Kind:
    """The kind of a parameter, from its descriptor and its group's flags."""
    fast, slow, square = (moment.codec for moment in d.moments)
    codecs = (fast, slow, square)
    return Kind(rule, codecs, d.weight_dtype, d.grad_dtype, flags, d.compensation != 0)


def _measure(of_grad: bool, of_weight: bool) -> str:
    grad, weight = "AnyGrad" if of_grad else "Unread", "AnyWeight" if of_weight else "Unread"
    return f"{_MEASURE}<engine::cuda::{grad}, engine::cuda::{weight}>"


MEASURE = _measure(of_grad=True, of_weight=False)  # for a global norm


def _tensor_kernel(phase: int) -> str:
    return f"engine::cuda::tensor_kernel<{phase}>"


def compile_kernels(names: Iterable[str], arch: str, log: Any = None) -> Any:
    """Compile kernels for an architecture ("sm_90"): -> `cuda.core.ObjectCode`, a cubin with a
    symbol for each name.  Needs no GPU.  Raises NVRTC's message for an error in the sources.

    No contraction and no fast arithmetic: the bits are the CPU's.  Register counts and spills are
    written to `log` (a text file).
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        **_OPTIONS,
        arch=arch,
        include_path=str(sources.folder()),
        ptxas_options=["-v"] if log is not None else None,
    )
    program = Program(_HEADER, code_type="c++", options=options)
    return program.compile("cubin", name_expressions=tuple(names), logs=log)


class Gpu:
    """One device: its kernels, compiled or read from disk on first use, and the driver calls of an
    engine."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import nvrtc

        self._device = device
        self._threads = threading.local()
        major, minor = torch.cuda.get_device_capability(device)
        self._arch = f"sm_{major}{minor}"
        _, *version = nvrtc.nvrtcVersion()
        root = sources.folder()
        assert root is not None
        headers = sources.digest(root, root.rglob("*.h"))
        self._sources = f"{version} {self._arch} {_OPTIONS} {_HEADER} {headers}"
        self._loaded: dict[str, Any] = {}
        self.num_compiled = 0  # kernels that were not on disk

    def launch(self, kernel: Any, grid: int, block: int, shared: int, address: int) -> None:
        """Enqueue kernel(address) on the current stream; `shared` is in bytes."""
        from cuda.core import LaunchConfig, launch

        stream = _stream(torch.cuda.current_stream(self._device).cuda_stream)
        config = LaunchConfig(grid=grid, block=block, shmem_size=shared)
        launch(stream, config, kernel, address)

    @contextmanager
    def here(self) -> Iterator[None]:
        """A context in which the device is torch's current one and its CUDA context is current in
        this thread: torch only sees to that at a thread's first allocation or kernel, and the first
        may be a launch of ours."""
        from cuda.core import Device

        with torch.cuda.device(self._device):
            if not hasattr(self._threads, "ready"):
                Device(self._device.index).set_current()
                self._threads.ready = True
            yield

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return capturing()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Page-locked host memory, from which a captured copy reads again at every replay."""
        return torch.empty(shape, dtype=dtype, device="cpu").pin_memory()

    def load(self, names: Iterable[str]) -> dict[str, Any]:
        """These kernels, by name."""
        missing = [name for name in dict.fromkeys(names) if name not in self._loaded]
        found = {name: self._read(self._path(name)) for name in missing}
        fresh = [name for name in missing if found[name] is None]
        if fresh:
            began = time.perf_counter()
            with ThreadPoolExecutor() as pool:
                made = list(pool.map(self._compile, fresh))
            seconds = time.perf_counter() - began
            self.num_compiled += len(fresh)
            both = list(zip(fresh, made, strict=True))
            failures = [self._keep(raw, self._path(name)) for name, raw in both]
            kept = next(filter(None, failures), None) or f"they are cached in {cache_folder()}"
            _log.warning(
                "compiled %d CUDA kernels for %s in %.1f s; %s",
                *(len(fresh), self._arch, seconds, kept),
            )
            found |= {name: _kernel(raw) for name, raw in both}
        self._loaded |= found
        return self._loaded

    def _path(self, name: str) -> Path:
        key = hashlib.sha256(f"{self._sources} {name}".encode()).hexdigest()[:32]
        return cache_folder() / f"{key}.cubin"

    def _compile(self, name: str) -> bytes:
        """A line with the symbol, then the cubin."""
        made = compile_kernels([name], self._arch)
        return _symbol(made, name) + b"\n" + made.code

    def _keep(self, raw: bytes, path: Path) -> str | None:
        """Write a kernel to disk atomically, with a digest in front: -> why it cannot be kept, or
        None."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
                try:
                    partial.write(hashlib.sha256(raw).digest() + raw)
                    partial.close()
                    Path(partial.name).chmod(0o644)  # folders are shared
                    Path(partial.name).replace(path)
                except OSError:
                    Path(partial.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            return f"they cannot be cached for the next run ({error}); set OPTIM_CACHE to a folder"
        return None

    def _read(self, path: Path) -> Any:
        """A kernel from disk, or None if it is missing or damaged."""
        try:
            digest, raw = (both := path.read_bytes())[:32], both[32:]
        except OSError:
            return None
        return _kernel(raw) if hashlib.sha256(raw).digest() == digest else None


def capturing() -> bool:
    """Whether a CUDA graph is being captured on this thread's stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _kernel(raw: bytes) -> Any:
    """The kernel that `_compile` returned, on the device."""
    from cuda.core import ObjectCode

    symbol, code = raw.split(b"\n", 1)
    return ObjectCode.from_cubin(code).get_kernel(symbol.decode())


@cache
def _stream(handle: int) -> Any:
    """A stream of torch as one of cuda-core."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _symbol(made: Any, name: str) -> bytes:
    symbol = made.symbol_mapping[name]
    return symbol if isinstance(symbol, bytes) else symbol.encode()


def cache_folder() -> Path:
    """Where compiled kernels are kept: OPTIM_CACHE, or the user's cache folder."""
    if "OPTIM_CACHE" in os.environ:
        return Path(os.environ["OPTIM_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(root).expanduser() / "low-memory-trainer" / "kernels"


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The one `Gpu` of a device that has an index."""
    return Gpu(device)
