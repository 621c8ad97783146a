"""backend="native" on a GPU: the kernels of `csrc/`, compiled at first use for the card at hand.

There is no nvcc and no toolkit: NVRTC, which comes with torch, compiles the very headers that the
CPU engine is built from, through NVIDIA's cuda-core (`pip install 'low-memory-trainer[cuda]'`).
What it makes is kept on disk by content, so a second run, or an upgrade that changes no kernel,
compiles nothing.

A step is a few launches whatever the number of tensors: tensors of one kind (rule, codecs, dtypes,
flags) make buckets, and a bucket takes one launch a phase.  Nothing is read back: step counts,
norms, and learning rates given as tensors, stay on the device, so that a step can be captured in a
CUDA graph.
"""

import ctypes
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from optim import plan
from optim.engine import ADDRESSES, DescriptorEngine, Work, buckets

if TYPE_CHECKING:
    from optim.backend import Place
    from optim.fused import FusedOptimizer

_log = logging.getLogger(__name__)

ROOM = 96 << 20  # bytes of a bucket's partial sums, at most
TILE_THREADS, TENSOR_THREADS = 64, 256  # of a block: csrc/engine/exec_cuda.h
ROW_SUMS_BYTES = 4 * 16 * 17 * 4  # shared memory of a factored moment: RowSums::kRoom
_HEADER = '#include "engine/cuda.h"\n'
_SLOTS = (
    "NoSlot",
    "DenseSlot",
    "Bf16Slot",
    "Block8Slot",
    "Float8Slot",
    "FactoredSlot<false>",
    "FactoredSlot<true>",
)  # by CodecId
# The passes over tiles that some flag asks for, and the Phase of tensors that follows each.
_PASSES = (
    ("measure", ("orthograd", "grad_clip", "scale_parameter"), 2),
    ("factor", (), 4),  # asked for by a factored Adafactor
    ("norm", ("growth_limit", "clip_exact"), 6),
    ("align", ("cautious",), 8),
)
_BEGIN, _FINISH = 0, 10
MEASURE = "engine::cuda::measure_kernel"


@cache
def unavailable() -> str | None:
    """Why CUDA tensors cannot have the fused kernels, or None where they can."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program

        del Program
        failed, *_ = nvrtc.nvrtcVersion()
    except Exception as error:  # whatever a package that is not there, or a broken one, raises
        return (
            f"the CUDA kernels are compiled with cuda-core and NVRTC ({error}); "
            "pip install 'low-memory-trainer[cuda]'"
        )
    if torch.version.hip is not None:
        return "its kernels are CUDA's, and this torch is ROCm's"
    if failed:
        return f"NVRTC does not answer ({failed})"
    if sources() is None:
        return "csrc/ is not beside the package"
    return None


def sources() -> Path | None:
    """The folder of the kernels' headers: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next((p for p in (package / "csrc", package.parent / "csrc") if p.is_dir()), None)


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    rule: str  # of optim/reference.py
    codecs: tuple[int, int, int]  # CodecId of each slot
    weight_dtype: int
    grad_dtype: int
    flags: int
    compensated: bool

    @property
    def num_factored(self) -> int:
        return sum(_SLOTS[codec].startswith("Factored") for codec in self.codecs)

    def has(self, *flags: str) -> bool:
        return any(self.flags >> plan.FLAGS.index(flag) & 1 for flag in flags)

    def template(self) -> str:
        """Its name in C++ (`Kind` in csrc/engine/cuda.h)."""
        matrix = _SLOTS[self.codecs[2]].startswith("Factored")
        rule = self.rule.capitalize()
        if rule == "Adafactor":
            rule += "Matrix" if matrix else "Vector"
        parts = [f"engine::cuda::{x}" for x in (rule, *(_SLOTS[codec] for codec in self.codecs))]
        return (
            f"engine::cuda::Kind<{', '.join(parts)}, {self.weight_dtype}, {self.grad_dtype}, "
            f"{self.flags}, {str(self.compensated).lower()}>"
        )

    def passes(self) -> list[tuple[str, bool]]:
        """What a step runs for it, in order: (kernel, whether of tiles)."""
        template, names = self.template(), [(_tensor_kernel(_BEGIN), False)]
        factors = self.rule == "adafactor" and _SLOTS[self.codecs[2]].startswith("Factored")
        for name, flags, after in _PASSES:
            if self.has(*flags) or (name == "factor" and factors):
                kernel = f"engine::cuda::{name}_kernel<{template}>"
                names.append((MEASURE if name == "measure" else kernel, True))
                names.append((_tensor_kernel(after), False))
        names.append((f"engine::cuda::apply_kernel<{template}>", True))
        return [*names, (_tensor_kernel(_FINISH), False)]


def kind_of(rule: str, d: plan.Descriptor, flags: int) -> Kind:
    """The kind of a described parameter, by its group's flags."""
    fast, slow, square = (moment.codec for moment in d.moments)
    codecs = (fast, slow, square)
    return Kind(rule, codecs, d.weight_dtype, d.grad_dtype, flags, d.compensation != 0)


def _tensor_kernel(phase: int) -> str:
    return f"engine::cuda::tensor_kernel<{phase}>"


def compile_kernels(names: Iterable[str], arch: str, log: Any = None) -> Any:
    """Compile kernels for an architecture ("sm_90"): -> `cuda.core.ObjectCode`, a cubin with a
    symbol for each name.  Needs no GPU.  Raises what NVRTC says of an error in the sources.

    No contraction and no fast arithmetic: the bits are the CPU's.  `log` (a text file) receives
    registers and spills.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        std="c++17",
        arch=arch,
        fma=False,
        include_path=str(sources()),
        ptxas_options=["-v"] if log is not None else None,
    )
    program = Program(_HEADER, code_type="c++", options=options)
    return program.compile("cubin", name_expressions=tuple(names), logs=log)


class Gpu:
    """One device: its kernels, compiled or taken from the disk when first asked for, and what an
    engine asks of the driver."""

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import nvrtc

        self._device = device
        self._threads = threading.local()
        major, minor = torch.cuda.get_device_capability(device)
        self._arch = f"sm_{major}{minor}"
        _, *version = nvrtc.nvrtcVersion()
        root = sources()
        assert root is not None
        digest = hashlib.sha256(f"{version} {self._arch}".encode())
        for path in sorted(root.rglob("*.h")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        self._sources = digest.hexdigest()
        self._loaded: dict[str, Any] = {}

    def launch(self, kernel: Any, grid: int, block: int, shared: int, address: int) -> None:
        """Enqueue kernel(address) on the current stream; `shared` is in bytes."""
        from cuda.core import LaunchConfig, launch

        stream = _stream(torch.cuda.current_stream(self._device).cuda_stream)
        config = LaunchConfig(grid=grid, block=block, shmem_size=shared)
        launch(stream, config, kernel, address)

    @contextmanager
    def here(self) -> Iterator[None]:
        """The device as torch's current one, with its context current in this thread: torch leaves
        that to a thread's first allocation or kernel, and the first may be a launch of ours."""
        from cuda.core import Device

        with torch.cuda.device(self._device):
            if not hasattr(self._threads, "ready"):
                Device(self._device.index).set_current()
                self._threads.ready = True
            yield

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Page-locked host memory, from which a captured copy reads again at every replay."""
        return torch.empty(shape, dtype=dtype).pin_memory()

    def load(self, names: Iterable[str]) -> dict[str, Any]:
        """These kernels, by name."""
        missing = [name for name in dict.fromkeys(names) if name not in self._loaded]
        paths = {name: self._path(name) for name in missing}
        fresh = [name for name in missing if not paths[name].exists()]
        if fresh:
            began = time.perf_counter()
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda name: self._compile(name, paths[name]), fresh))
            seconds = time.perf_counter() - began
            _log.warning(
                "compiled %d CUDA kernels for %s in %.1f s; they are kept in %s",
                *(len(fresh), self._arch, seconds, paths[fresh[0]].parent),
            )
        for name in missing:
            self._loaded[name] = self._read(paths[name])
        return self._loaded

    def _path(self, name: str) -> Path:
        key = hashlib.sha256(f"{self._sources} {name}".encode()).hexdigest()[:32]
        return cache_folder() / f"{key}.cubin"

    def _compile(self, name: str, path: Path) -> None:
        """To the disk: a line with the symbol, then the cubin."""
        made = compile_kernels([name], self._arch)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(_symbol(made, name) + b"\n" + made.code)
        partial.replace(path)

    def _read(self, path: Path) -> Any:
        from cuda.core import ObjectCode

        symbol, code = path.read_bytes().split(b"\n", 1)
        return ObjectCode.from_cubin(code).get_kernel(symbol.decode())


@cache
def _stream(handle: int) -> Any:
    """A stream of torch's as cuda-core's."""
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


class _Launches:
    """A bucket on the device, and the kernels of its step: (kernel, grid, block, shared memory)."""

    def __init__(self, kind: Kind, bucket: plan.Bucket, kernels: dict[str, Any]) -> None:
        self.bucket = bucket
        self.tables = torch.empty(0)  # on the device: its Launch, then its lists
        shared = kind.num_factored * ROW_SUMS_BYTES
        self.steps: list[tuple[Any, int, int, int]] = []
        for name, of_tiles in kind.passes():
            if not of_tiles:
                self.steps.append((kernels[name], bucket.num_tensors, TENSOR_THREADS, 0))
            elif bucket.num_tiles:
                self.steps.append((kernels[name], bucket.num_tiles, TILE_THREADS, shared))


class CudaEngine(DescriptorEngine):
    """Steps the parameters of one optimizer that are on one GPU."""

    def __init__(
        self, optimizer: "FusedOptimizer", device: torch.device, gpu: Gpu | None = None
    ) -> None:
        super().__init__(optimizer)
        self._device = device
        self._gpu = gpu or gpu_of(device)
        self._table = torch.empty_like(self._words, device=device)
        shape = (len(optimizer.param_groups), ctypes.sizeof(plan.Options) // 8)
        self._options = torch.empty(shape, dtype=torch.float64, device=device)
        self._spares: dict[tuple[Any, ...], list[Tensor]] = {}  # pinned, for captures to come
        self._of_graphs: list[Tensor] = []  # pinned, from which graphs copy
        self._uploaded = b""  # the options that are on the device, if they came from the host
        self._captured = False  # a graph's replays write there too, unseen: nothing is known
        self._room = torch.empty(0, dtype=torch.float64, device=device)

    def step(self, places: "Sequence[Place]", coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.backend.Engine`."""
        with self._gpu.here():
            work, weights, read = self._refresh(places)
            self._put_options(coefficients)
            for one in work.launches:
                for kernel, grid, block, shared in one.steps:
                    self._gpu.launch(kernel, grid, block, shared, one.tables.data_ptr())
            del read  # the launches are in the stream that will reuse their memory
            for param, copy in weights:
                param.copy_(copy)

    def grad_sq(self, places: "Sequence[Place]") -> Tensor:
        """As `optim.backend.Engine`."""
        with self._gpu.here():
            work, _, read = self._refresh(places)
            measure = self._gpu.load([MEASURE])[MEASURE]
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for one in work.launches:
                tiles = one.bucket.num_tiles
                if not tiles:
                    continue
                self._gpu.launch(measure, tiles, TILE_THREADS, 0, one.tables.data_ptr())
                first = one.bucket.num_tensors * plan.HYPER_BYTES // 8
                words = plan.TILE_SUMS_BYTES // 8
                total += self._room[first : first + tiles * words : words].sum()
            del read
        return total

    def _stamp(self, params: list[Tensor], grad_dtypes: list[torch.dtype]) -> list[Any]:
        return [*super()._stamp(params, grad_dtypes), self._flags()]

    def _flags(self) -> list[int]:
        groups = self._optimizer.param_groups
        return [plan.group_options(group | {"lr": 0.0}, 1.0).flags for group in groups]

    def _make(self, work: Work, places: "Sequence[Place]") -> None:
        by_kind: dict[Kind, list[int]] = {}
        flags = self._flags()
        for index, _, _ in places:
            d = self._descriptors[index]
            kind = kind_of(type(self._optimizer).rule.__name__, d, flags[d.group])
            by_kind.setdefault(kind, []).append(index)
        kernels = self._gpu.load(name for kind in by_kind for name, _ in kind.passes())
        for kind, members in by_kind.items():
            sizes = [(i, plan.room_bytes(self._descriptors[i])) for i in members]
            for chosen in buckets(sizes, ROOM):
                bucket = plan.Bucket(chosen, self._descriptors)
                work.launches.append(_Launches(kind, bucket, kernels))
        need = max((self._words_needed(one.bucket) for one in work.launches), default=0)
        if need > self._room.numel():
            self._room = torch.empty(need, dtype=torch.float64, device=self._device)
            self._work.clear()  # they point into the old one
        for one in work.launches:
            self._send(one)
        self._table.copy_(self._words)
        work.on_device = work.members.to(self._device)

    @staticmethod
    def _words_needed(bucket: plan.Bucket) -> int:
        """64-bit words of a bucket's Hypers, TileSums and workspace."""
        size = bucket.num_tensors * plan.HYPER_BYTES + bucket.num_tiles * plan.TILE_SUMS_BYTES
        return -(-(size + bucket.workspace_size * 4) // 8)

    def _send(self, one: _Launches) -> None:
        """Copy a bucket's lists to the device, with the Launch that points to them."""
        bucket = one.bucket
        lists = [bucket.tiles, bucket.first_tile, bucket.vectors, bucket.members]
        raw = [x.contiguous().view(torch.uint8).flatten() for x in lists]
        launch_bytes = ctypes.sizeof(plan.Launch)
        table = torch.empty(
            launch_bytes + sum(x.numel() for x in raw), dtype=torch.uint8, device=self._device
        )
        addresses, end = [], launch_bytes
        for x in raw:
            addresses.append(table.data_ptr() + end)
            end += x.numel()
        hypers = self._room.data_ptr()
        sums = hypers + bucket.num_tensors * plan.HYPER_BYTES
        launch = plan.Launch(
            options=self._options.data_ptr(),
            tensors=self._table.data_ptr(),
            tiles=addresses[0],
            first_tile=addresses[1],
            vectors=addresses[2],
            members=addresses[3],
            hypers=hypers,
            sums=sums,
            workspace=sums + bucket.num_tiles * plan.TILE_SUMS_BYTES,
            num_tensors=bucket.num_tensors,
            num_tiles=bucket.num_tiles,
            rule=self._rule,
        )
        head = torch.frombuffer(bytearray(launch), dtype=torch.uint8)
        table.copy_(torch.cat([head, *raw]))
        one.tables = table

    def _put(self, work: Work, addresses: Tensor) -> None:
        known = torch.equal(self._words[work.members, ADDRESSES], addresses)
        super()._put(work, addresses)
        capturing = self._gpu.capturing()
        self._captured |= capturing
        if known and not self._captured:  # the device's table is what `_words` is
            return
        addresses = self._readable(addresses.contiguous()).to(self._device, non_blocking=True)
        self._table[work.on_device, ADDRESSES] = addresses

    def _readable(self, values: Tensor) -> Tensor:
        """Host values where a copy to the device may read them: as they are; or, for a graph that
        is being captured and copies again at every replay, in page-locked memory of its own.

        None can be had during a capture, so the steps before it see to spares: two, because a step
        with a global norm copies its addresses twice.
        """
        spares = self._spares.setdefault((*values.shape, values.dtype), [])
        if not self._gpu.capturing():
            while len(spares) < 2:
                spares.append(self._gpu.pinned(*values.shape, dtype=values.dtype))
            return values
        if not spares:
            raise RuntimeError(
                "a CUDA graph of optimizer.step() wants an ordinary step() of the same parameters "
                "before each capture"
            )
        self._of_graphs.append(spares.pop().copy_(values))
        return self._of_graphs[-1]

    def _put_options(self, coefficients: dict[int, float | Tensor]) -> None:
        """Write the groups' options to the device: numbers where they have changed, tensors (a
        learning rate, what a global norm makes of the gradients) always, from the device."""
        groups = self._optimizer.param_groups
        options, tensors = [], []
        for position, group in enumerate(groups):
            lr, coefficient = group["lr"], coefficients.get(id(group), 1.0)
            for field, value in (("lr", lr), ("coefficient", coefficient)):
                if isinstance(value, Tensor) and value.is_cuda:
                    word = getattr(plan.Options, field).offset // 8
                    tensors.append((position, word, value))
            numbers = group | {"lr": 0.0 if isinstance(lr, Tensor) and lr.is_cuda else lr}
            number = 1.0 if isinstance(coefficient, Tensor) else coefficient
            options.append(plan.group_options(numbers, number))
        raw = bytes((plan.Options * len(groups))(*options))
        if raw != self._uploaded or tensors or self._captured:
            host = torch.frombuffer(bytearray(raw), dtype=torch.float64).view_as(self._options)
            self._options.copy_(self._readable(host), non_blocking=True)
            self._uploaded = raw
        for position, word, value in tensors:
            self._options[position, word].copy_(value)
