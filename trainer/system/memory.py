"""Memory: measuring a run's use, returning freed memory, and advice when it runs out."""

import ctypes
import gc
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from trainer.config import Config, remedies
from trainer.errors import UserError, reason

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
# A container's files (cgroup 2, then 1): limit, usage, and statistics, with the key of the file
# pages in the usage that the kernel drops when memory is needed.
_CGROUP = Path("/sys/fs/cgroup")
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)

# mallopt(3): parameters of glibc's allocator.  A block of M_MMAP_THRESHOLD bytes or more gets its
# own mapping, which free() returns to the system.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BLOCK_BYTES = 128 << 10  # glibc's initial value
LARGE_BYTES = 1 << 30  # of weights, from which on a run manages its memory
# Of errors without a type of their own: torch's on the CPU; outside of its allocator on a GPU (a
# context, a module, pinned memory); of the libraries there.
_LACKING = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_RUNS = itertools.count()  # of this process


def return_freed_blocks(weight_bytes: int) -> bool:
    """For a large model, return freed CPU memory to the system: what is free now, and from now on
    blocks of 128 kB or more.

    By default glibc raises that threshold to up to 32 MB as blocks are freed, and keeps smaller
    ones for reuse; that was 350 MB after a step of SDXL, with activations of all sizes.  For a
    small model, whose tensors are about this size, it would only cost time.  Returns whether it was
    done: not every C library can.
    """
    if weight_bytes < LARGE_BYTES:
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return False
    gc.collect()
    trim(0)
    return all([mallopt(x, _BLOCK_BYTES) == 1 for x in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])


def free_host_bytes() -> int:
    """Bytes that this process can still allocate, within its container's limit; `sys.maxsize` if
    the system does not say."""
    free = sys.maxsize
    with suppress(OSError, KeyError, ValueError):
        free = 1024 * _numbers(_MEMINFO)["MemAvailable:"]
    for limit, used, statistics, droppable in _CONTAINERS:
        with suppress(OSError, KeyError, ValueError):  # "max", or no container of this kind
            left = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
            free = min(free, left + _numbers(_CGROUP / statistics)[droppable])
    return free


def _numbers(path: Path) -> dict[str, int]:
    """A file with a name and a number on each line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}


def reset_peak(device: torch.device) -> None:
    """Reset the peak, so that earlier work in this process, such as a sweep's runs, is excluded.

    On the CPU this is Linux's way to reset the high-water mark, proc(5); what earlier runs left
    unfreed still counts.  Where a container forbids it, the peak is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):
            _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: allocated on a GPU, resident memory of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


class Peaks:
    """The peak memory of each phase of a run: "training" is its steps, "rest" the encoding,
    evaluating and drawing of pictures before and between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.runs_before = next(_RUNS)  # in this process, whose memory may be in the CPU's peaks
        self._of = {"training": 0, "rest": 0}
        gc.collect()
        reset_peak(device)

    def state_dict(self) -> dict[str, Any]:
        return {**self._of}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The largest of this session and those of a checkpoint."""
        self._of = {phase: max(peak, state[phase]) for phase, peak in self._of.items()}

    def end(self, phase: str) -> None:
        """Attribute the peak since the previous `end` to `phase`, and reset the counter."""
        self._of[phase] = max(self._of[phase], peak_bytes(self._device))
        reset_peak(self._device)

    @property
    def training(self) -> int:
        return self._of["training"]

    @property
    def run(self) -> int:
        return max(self._of.values())


def resident_bytes() -> int:
    """This process's resident memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    assert found, f"Linux reports {field} for every process"
    return int(found[1]) * 1024


def ran_out(error: Exception) -> bool:
    """Whether an error is that memory ran out: the GPU's, Python's, or torch's on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, UserError) and any(text in str(error) for text in _LACKING)


@contextmanager
def explained(config: Config, step: int | None = None) -> Iterator[None]:
    """Within the block, running out of memory raises a UserError that names options that save some.
    step: the one that is made; None: before the first one, while encoding and loading.

    Nothing is saved then: a fused backward may have stepped some of the weights.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        when = "before the first step" if step is None else f"in step {step}"
        savers = "; ".join(str(x) for x in remedies.of(config) if x.in_steps or step is None)
        advice = (
            f"Try {savers}"
            if savers
            else "No option saves more; it takes a device with more memory"
        )
        raise UserError(
            f"out of memory {when}, which was not saved. {advice} ({reason(error)})"
        ) from error
