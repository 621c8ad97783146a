"""backend="native": the CPU engine of `csrc/`, built by the install where a compiler exists.

It steps a bucket of parameters in one call: rules, codecs and features fused into one pass over
memory wherever the mathematics allows it.  It computes what `optim/reference.py` specifies.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from optim import compiled, plan
from optim.engine import DescriptorEngine, Work, buckets, in_lines
from optim.interface import Owner
from optim.share import Share

_native = compiled.module

CPU = torch.device("cpu")
# Most elements of a bucket of parameters, whose partial sums share one buffer.
BUCKET_NUMEL = 8 << 20
# A parameter of at most this many tiles is stepped by one thread, while its cache holds it.
FEW_TILES = 4
_USES = {"draw": 0, "project": 1, "lengths": 2, "whole": 3}  # csrc/engine/projection.h


def unavailable() -> str | None:
    """Why the native engine cannot be used, or None if it can."""
    return compiled.missing if _native is None else None


def isa() -> str:
    """The instruction set in use: OPTIM_ISA, or the best one this machine has.

    Raises ValueError for a set that this machine does not have.
    """
    names = _native.isas()
    chosen = os.environ.get("OPTIM_ISA", names[-1])
    if chosen not in names:
        raise ValueError(f"OPTIM_ISA={chosen}: this machine has {', '.join(names)}")
    return chosen


def multiplies_pairs(isa: str) -> bool:
    """Whether projections of bf16 gradients take P in bf16."""
    return bool(_native.multiplies_pairs(isa))


def project(use: str, table: Tensor, count: int, isa: str) -> None:
    """Run `count` items of a step of APOLLO's projections; `table` begins with a Projections."""
    _native.project(_USES[use], table.data_ptr(), count, isa, torch.get_num_threads())


class NativeEngine(DescriptorEngine):
    """Steps the CPU parameters of one owner."""

    def __init__(self, owner: Owner, rule: str) -> None:
        super().__init__(owner, rule)
        self._isa = isa()
        self._room = torch.empty(0, dtype=torch.uint8, device=CPU)

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.interface.Engine`."""
        work, weights, read = self._refresh(share)
        options = (plan.Options * len(self._owner.param_groups))()
        for number, key, group in self._groups(work, CPU):
            coefficient = float(coefficients.get(key, 1.0))
            options[number] = plan.group_options(group, coefficient, self._rule)
        self._launch(_native.launch, work, options)
        del read
        self._write_back(share, weights)

    def grad_sq(self, share: Share) -> float:
        """As `optim.interface.Engine`."""
        work, _, read = self._refresh(share)
        total = sum(self._launch(_native.grad_sq, work, None))
        del read
        return total

    def _make(self, work: Work, share: Share) -> None:
        sizes: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for index, _, param in share:
            few = plan.num_tiles(self._descriptors[index]) <= FEW_TILES
            sizes[few].append((index, param.numel()))
        chosen = [(few, each) for few in sizes for each in buckets(sizes[few], BUCKET_NUMEL)]
        for few, members in chosen:
            bucket = plan.Bucket(members, self._descriptors, alone=few)
            launch = plan.Launch(
                tensors=ctypes.addressof(self._descriptors),
                members=bucket.members.data_ptr(),
                tiles=bucket.tiles.data_ptr(),
                first_tile=bucket.first_tile.data_ptr(),
                vectors=bucket.vectors.data_ptr(),
                num_tensors=bucket.num_tensors,
                num_tiles=bucket.num_tiles,
                rule=plan.RULES[self._rule],
                workspace_per_thread=bucket.workspace_per_thread,
            )
            work.launches.append((launch, bucket))

    def _launch(self, function: Any, work: Work, options: Any) -> list[Any]:
        results, threads = [], torch.get_num_threads()
        for launch, bucket in work.launches:
            # Each begins on its own cache line: the workspace is accessed in whole vectors.
            hypers = in_lines(bucket.num_tensors * plan.HYPER_BYTES)
            sums = in_lines(bucket.num_tiles * plan.TILE_SUMS_BYTES)
            workspace = bucket.workspace_size + bucket.workspace_per_thread * threads
            size = hypers + sums + workspace * 4
            if self._room.numel() < size:
                self._room = torch.empty(size, dtype=torch.uint8, device=CPU)
            launch.hypers = self._room.data_ptr()
            launch.sums = launch.hypers + hypers
            launch.workspace = launch.sums + sums
            launch.options = ctypes.addressof(options) if options is not None else 0
            results.append(function(ctypes.addressof(launch), self._isa, threads))
        return results
