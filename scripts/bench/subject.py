"""The device whose kernels are checked."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from optim import gpu, native


class Subject:
    """A GPU, and what checks ask of it.  The tests have one that is this machine's processor.

    `native` is whether the CPU engine is there to be compared with, bit for bit; plain PyTorch is
    otherwise, within tolerances.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.native = native.unavailable() is None
        self.gpu: Any = gpu.gpu_of(device)

    def fresh(self) -> Any:
        """A `gpu.Gpu` that has loaded nothing yet."""
        return gpu.Gpu(self.device)

    def engines(self) -> AbstractContextManager[Any]:
        """Within it, optimizers that make their first step get this device's engine."""
        return contextlib.nullcontext()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        torch.cuda.synchronize(self.device)

    def side_stream(self) -> AbstractContextManager[Any]:
        """Within it, work goes to another stream than outside."""
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Within it, whatever waits for the device raises RuntimeError."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def launches(self, call: Callable[[], object]) -> int:
        """How many kernels of ours this call launches."""
        count, launch = 0, self.gpu.launch

        def counted(*arguments: Any) -> None:
            nonlocal count
            count += 1
            launch(*arguments)

        self.gpu.launch = counted
        try:
            call()
        finally:
            del self.gpu.launch
        return count
