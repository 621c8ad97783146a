"""The processes that train one model together, one for each GPU: `torchrun -m trainer`.

They share the micro-batches of a step and sum their gradients, so that all of them make the same
step: N processes train as one does with N times its runtime.accumulation.  The main one also
evaluates, draws, saves and reports, while the others wait for its next step.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

# How long the others wait for the main process, which may encode pictures or draw.  If a process
# ends with an error, torchrun ends the others.
_PATIENCE = timedelta(days=7)
# What torch raises of a GPU's failures; in older versions a RuntimeError.
_DEVICE_ERRORS: tuple[type, ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


def world_size() -> int:
    """How many processes there are; 1 without torchrun."""
    is_launched = distributed.is_available() and distributed.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if is_launched else 1


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def rank() -> int:
    """The number of this process; 0 is the main one."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def command(number: int | None = None) -> str:
    """The command line that starts so many processes, without the options of their run but with
    where this process has found choices of its own; None: as many as now."""
    number = number or world_size()
    start = f"torchrun --nproc-per-node {number} -m trainer" if number > 1 else "python -m trainer"
    return " ".join([start, *map(shlex.quote, _places_of_choices(sys.argv[1:]))])


def _places_of_choices(arguments: Sequence[str]) -> list[str]:
    """The arguments that add folders of choices: --config-dir, -cd and hydra.searchpath=...  A run
    that resumes does not inherit them, because its options are read with their help."""
    found = list[str]()
    for argument, after in zip(arguments, [*arguments, ""][1:], strict=True):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            found += ["--config-dir", os.path.abspath(value or after)]
        elif name == "hydra.searchpath":
            found.append(argument)
    return found


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A block in which the processes, of which each has such a device, can exchange numbers."""
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    except SystemExit:  # asked for by a signal, which all get
        distributed.destroy_process_group()
        raise
    # Not after an error: NCCL would wait here for the others, which wait for this process.  They
    # learn of it when it exits.
    distributed.destroy_process_group()


@contextmanager
def main_first(wanted: bool) -> Iterator[None]:
    """If wanted, the main process runs this block before the others begin it: they find its caches
    and downloads."""
    waits = wanted and world_size() > 1
    if waits and not is_main():
        meet()
    yield
    if waits and is_main():
        meet()


def total(number: float) -> float:
    """The sum of all processes' numbers.  Here and below, ConnectionError if one has ended."""
    return _over_all(number, "SUM")


def largest(number: float) -> float:
    """The largest of all processes' numbers."""
    return _over_all(number, "MAX")


def from_main(value: Any) -> Any:
    """The main process's value, which can be pickled."""
    if world_size() == 1:
        return value
    shared = [value]
    with _named_if_lost():
        distributed.broadcast_object_list(shared, device=torch.device("cpu"))
    return shared[0]


def meet() -> None:
    """Wait until all processes are here."""
    _over_all(0.0, "SUM")


def sum_gradients(*parameters: Tensor) -> None:
    """Replace gradients by their sums over all processes, which all name the same parameters in the
    same order."""
    if world_size() > 1:
        with _named_if_lost():
            for adding in [distributed.all_reduce(p.grad, async_op=True) for p in parameters]:
                adding.wait()


def _over_all(number: float, how: str) -> float:
    if world_size() == 1:
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    with _named_if_lost():
        distributed.all_reduce(shared, getattr(distributed.ReduceOp, how))
    return shared.item()


@contextmanager
def _named_if_lost() -> Iterator[None]:
    """Raise ConnectionError if a process has ended.  Errors of NCCL, of the GPU, and a lack of
    memory stay."""
    try:
        yield
    except (distributed.DistBackendError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if isinstance(error, _DEVICE_ERRORS):
            raise
        raise ConnectionError(
            "another process of this run has ended; its error, if it found one, is above"
        ) from error
