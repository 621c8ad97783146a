"""How much memory is available for training."""

from dataclasses import dataclass

import torch

from trainer.system import memory

# Memory that CUDA's context takes: assumed (0.3 to 0.6 GB are usual), not measured.
_CONTEXT = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory available to a run, and where it is."""

    free_bytes: int
    where: str


def card(gib: float) -> Room:
    """A GPU of this many GiB, less CUDA's context."""
    return Room(free_bytes=max(round(gib * (1 << 30)) - _CONTEXT, 0), where=f"a card of {gib:g} GB")


def room_of(device: torch.device) -> Room:
    """The memory that a run can use on a device now: what is free, plus what this process already
    uses, which is also part of a plan (on a CPU, `Plan.process_bytes`)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        return Room(free_bytes=free, where=torch.cuda.get_device_name(device))
    return Room(free_bytes=memory.free_host_bytes() + memory.resident_bytes(), where="this machine")
