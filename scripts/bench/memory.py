"""What a step holds for its own duration, and what it keeps: peak temporary memory and state.

On CUDA, torch's allocator knows: the peak during the step minus what was allocated before it.

On a CPU the kernel does (Linux only).  Native code allocates outside torch, so nothing inside the
process can be asked.  Writing 5 to /proc/self/clear_refs sets VmHWM, the process's peak of
resident memory, to what is resident now; after the step, VmHWM minus that value is what the step
needed on top.  Memory that malloc has kept from earlier calls would be resident already and not
show, hence it is returned first with malloc_trim(0).  Parameters, gradients and state are resident
since the warm-up.  The kernel's counters are exact to some 0.3 MB.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def peak_temporary(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held during this call on top of what was before; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
        before = _resident_peak()
    except (AttributeError, OSError):  # no glibc, no Linux, or a container that forbids it
        return None
    call()
    return max(0, _resident_peak() - before)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, whole storages, shared ones once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in _tensors(list(optimizer.state.values()))
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(storages.values())


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _tensors(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)


def _resident_peak() -> int:
    """VmHWM in bytes."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
