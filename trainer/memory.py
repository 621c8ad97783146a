"""How much memory a run took, measured; that freed memory is given back; and what to do where it is
too little."""

import ctypes
import gc
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import optim
from trainer.config import Config, FullConfig
from trainer.errors import UserError, reason

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# mallopt(3): parameters of glibc's allocator.  From a size of M_MMAP_THRESHOLD a block is a mapping
# of its own, which free() returns to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK_BYTES = 128 << 10  # as glibc begins
_LARGE_BYTES = 1 << 30
_RUNS = itertools.count()  # of this process


def return_freed_blocks(weight_bytes: int) -> bool:
    """Make the CPU's memory go back to the system when it is freed, where a model is large: what is
    free now, and blocks of 128 kB or more from now on.

    By itself glibc raises that size to up to 32 MB as it sees blocks freed, and keeps smaller ones
    for later.  Between activations of all sizes that came to 350 MB after a step of SDXL.  With a
    small model, whose tensors are of about this size, it would only cost time.  Returns whether it
    was done: the C library must be one that can be told.
    """
    if weight_bytes < _LARGE_BYTES:
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        return False
    gc.collect()
    trim(0)
    return all([mallopt(x, _BLOCK_BYTES) == 1 for x in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])


def reset_peak(device: torch.device) -> None:
    """Forget the peak of whatever ran before in this process, such as a sweep's earlier runs.

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
    """The most memory that each phase of a run took: "training" is its steps, "rest" what comes
    before and between them, where pictures are encoded, evaluated and drawn."""

    def __init__(self, device: torch.device, training: int = 0, run: int = 0) -> None:
        """Begin with the peaks of the run's earlier sessions: `training`, and `run` in all."""
        self._device = device
        self.runs_before = next(_RUNS)  # in this process, whose memory may be in the CPU's peaks
        self._of = {"training": training, "rest": run}
        gc.collect()
        reset_peak(device)

    def end(self, phase: str) -> None:
        """What was taken since the last end was taken by this phase."""
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
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def explained(config: Config, when: str) -> Iterator[None]:
    """Within it, running out of memory is a UserError that says what to switch on.

    Nothing is saved then: a fused backward may have stepped some of the weights.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise UserError(
            f"out of memory {when}, of which nothing is saved. Try "
            f"{'; '.join(advice(config))} ({reason(error)})"
        ) from error


def advice(config: Config) -> list[str]:
    """What would take less memory than this configuration, the least costly first."""
    runtime, method = config.runtime, config.method
    can_step_inside = config.optim.name in optim.FAMILY
    clips = method.clip == "global" and method.max_grad_norm is not None
    clip = " method.clip=exact" if clips else ""
    samples = config.data.batch_size * runtime.accumulation
    chances = {
        f"runtime.fused_backward=true{clip}, which frees gradients as they are used": (
            can_step_inside and not runtime.fused_backward and runtime.accumulation == 1
        ),
        "model.dtype=bfloat16, which halves the weights": config.model.dtype == "float32",
        "runtime.gradient_checkpointing=true, which computes activations again": (
            not runtime.gradient_checkpointing
        ),
        f"data.batch_size=1 runtime.accumulation={samples}": config.data.batch_size > 1,
        "method.ema.device=cpu": method.ema is not None and method.ema.device != "cpu",
        "optim=adafactor8bit, which keeps next to nothing": (
            config.optim.name not in ("adafactor8bit", "adafactor8bit_apollo", "lomo")
        ),
        "method=lora, which trains few weights": isinstance(method, FullConfig),
        "a smaller data.resolution": True,
    }
    return [remedy for remedy, helps in chances.items() if helps]
