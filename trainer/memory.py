"""How much memory a run took, measured."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak so far: allocated on a GPU, resident memory of this process on the CPU (which sweeps
    share)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
