"""How much memory a run took, measured; and that freed memory is given back."""

import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# mallopt(3): parameters of glibc's allocator.  From a size of M_MMAP_THRESHOLD a block is a mapping
# of its own, which free() returns to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK_BYTES = 128 << 10  # as glibc begins
_LARGE_BYTES = 1 << 30


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
    unfreed still counts.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Peak since `reset_peak`: allocated on a GPU, resident memory of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def resident_bytes() -> int:
    """This process's resident memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", _STATUS.read_text())
    assert found, f"Linux reports {field} for every process"
    return int(found[1]) * 1024
