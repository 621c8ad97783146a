"""How much memory a run took, measured."""

import gc
import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    assert found, "Linux reports VmHWM for every process"
    return int(found[1]) * 1024
