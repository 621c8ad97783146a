"""What a step takes: CPU time of the process on one thread, wall time on more, events on CUDA.

One thread's CPU time hardly sees other work on the machine (its caches and memory channels are
still shared); wall time does, so it is only used where CPU time says nothing.
"""

import time
from collections.abc import Callable

import torch

STREAM_NUMBERS = 1 << 25  # fp32; two arrays of 128 MiB, larger than caches


class Clock:
    """Times calls on one device.

    kind: "process CPU time", "wall time" or "CUDA events", for the report.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        if device.type == "cuda":
            self.kind = "CUDA events"
        else:
            self.kind = "process CPU time" if threads == 1 else "wall time"

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds that this call takes; on CUDA until the device has finished its work."""
        if self.device.type == "cuda":
            return _event_seconds(call)
        now = time.process_time if self.kind == "process CPU time" else time.perf_counter
        start = now()
        call()
        return now() - start


class Stream:
    """The bandwidth that is there to be had: an in-place fp32 update d += a of two large arrays.

    It reads d and a and writes d, 12 bytes a number.  An optimizer updates in place as well, so
    this is its ceiling (a copy would pay for reading the lines that it overwrites).
    """

    def __init__(self, device: torch.device, quick: bool) -> None:
        numbers = STREAM_NUMBERS >> 5 if quick else STREAM_NUMBERS
        self.bytes = 12 * numbers
        self._d = torch.full((numbers,), 1.0, device=device)
        self._a = torch.full((numbers,), 1e-3, device=device)

    def __call__(self) -> None:
        self._d.add_(self._a)


def _event_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
