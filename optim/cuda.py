"""backend="native" on a GPU: launches the kernels of `csrc/`, which `optim/gpu.py` compiles.

A step is a few launches whatever the number of tensors: tensors of one kind (rule, codecs, dtypes,
flags) form buckets, and a bucket takes one launch per phase.  Nothing is read back: step counts,
norms, and learning rates given as tensors, stay on the device, so that a step can be captured in a
CUDA graph.  What a graph points to lives as long as the engine.  `load_state_dict`,
`add_param_group` and a change of groups or parameters replace the engine; a graph must then be
captured again, not replayed.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from optim import plan
from optim.engine import ADDRESSES, DescriptorEngine, Work, buckets
from optim.gpu import MEASURE, Gpu, Kind, gpu_of, kind_of
from optim.interface import Owner
from optim.share import Share
from optim.staging import Staging

ROOM = 96 << 20  # most bytes of partial sums in a bucket
TILE_THREADS, TENSOR_THREADS = 64, 256  # per block: rows_cuda.h, exec_cuda.h
MOMENT_BYTES = (8 * 16 * 17 + 512 + 64) * 4  # shared memory of a factored moment: kShared


class _Launches:
    """A bucket on the device, and the kernels of its step: (kernel, grid, block, shared memory)."""

    def __init__(self, kind: Kind, bucket: plan.Bucket, kernels: dict[str, Any]) -> None:
        self.bucket = bucket
        self.tables = torch.empty(0)  # on the device: its Launch, then its lists
        self.steps: list[tuple[Any, int, int, int]] = []
        for name, of_tiles in kind.passes():
            if not of_tiles:
                self.steps.append((kernels[name], bucket.num_tensors, TENSOR_THREADS, 0))
            elif bucket.num_tiles:
                shared = kind.num_shared(name) * MOMENT_BYTES
                self.steps.append((kernels[name], bucket.num_tiles, TILE_THREADS, shared))


class CudaEngine(DescriptorEngine):
    """Steps the parameters of one optimizer that are on one GPU."""

    def __init__(
        self,
        owner: Owner,
        rule: str,
        device: torch.device,
        gpu: Gpu | None = None,
    ) -> None:
        super().__init__(owner, rule)
        self._device = device
        self._gpu = gpu or gpu_of(device)
        self._staging = Staging(self._gpu)
        self._staging.refuse_in_capture()
        self._table = torch.empty_like(self._words, device=device)
        shape = (len(owner.param_groups), ctypes.sizeof(plan.Options) // 8)
        self._options = torch.empty(shape, dtype=torch.float64, device=device)
        self._numbers = (plan.Options * len(owner.param_groups))()  # the host's copy
        self._uploaded = b""  # the options on the device, if they came from the host
        self._captured = False  # if so, replays write there too and its contents are unknown
        self._of_graphs: dict[int, tuple[Work, Tensor]] = {}  # with their rooms: kept for graphs
        self._room = torch.empty(0, dtype=torch.float64, device=device)

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.interface.Engine`."""
        with self._gpu.here():
            work, weights, read = self._refresh(share)
            self._put_options(work, coefficients)
            for one in work.launches:
                for kernel, grid, block, shared in one.steps:
                    self._gpu.launch(kernel, grid, block, shared, one.tables.data_ptr())
            del read  # safe: the stream that reuses their memory runs the launches first
            self._write_back(share, weights)

    def grad_sq(self, share: Share) -> Tensor:
        """As `optim.interface.Engine`."""
        with self._gpu.here():
            work, _, read = self._refresh(share)
            measure = self._gpu.load([MEASURE])[MEASURE]
            total = torch.zeros((), dtype=torch.float64, device=self._device)
            for one in work.launches:
                tiles = one.bucket.num_tiles
                if not tiles:
                    continue
                self._gpu.launch(measure, tiles, TILE_THREADS, 0, one.tables.data_ptr())
                first = one.bucket.num_tensors * plan.HYPER_BYTES // 8
                words = plan.TILE_SUMS_BYTES // 8
                total += self._room[first : first + tiles * words : words].sum()
            del read
        return total

    def _stamp(self, share: Share) -> list[Any]:
        return [*super()._stamp(share), [self._flags(group) for group in share.groups]]

    def _flags(self, group: dict[str, Any]) -> int:
        return plan.group_options(group | {"lr": 0.0}, 1.0, self._rule).flags

    def before_making(self) -> None:
        self._staging.refuse_in_capture()

    def _make(self, work: Work, share: Share) -> None:
        by_kind: dict[Kind, list[int]] = {}
        flags = {number: self._flags(self._owner.param_groups[number]) for number in work.groups}
        for index, _, _ in share:
            d = self._descriptors[index]
            kind = kind_of(self._rule, d, flags[d.group])
            by_kind.setdefault(kind, []).append(index)
        kernels = self._gpu.load(name for kind in by_kind for name, _ in kind.passes())
        for kind, members in by_kind.items():
            sizes = [(i, plan.room_bytes(self._descriptors[i])) for i in members]
            for chosen in buckets(sizes, ROOM):
                bucket = plan.Bucket(chosen, self._descriptors)
                work.launches.append(_Launches(kind, bucket, kernels))
        need = max((self._words_needed(one.bucket) for one in work.launches), default=0)
        if need > self._room.numel():
            self._room = torch.empty(need, dtype=torch.float64, device=self._device)
            self._work.clear()  # they point into the old one
        for one in work.launches:
            self._send(one)
        self._table.copy_(self._words)
        work.on_device = work.members.to(self._device)

    @staticmethod
    def _words_needed(bucket: plan.Bucket) -> int:
        """64-bit words of a bucket's Hypers, TileSums and workspace."""
        size = bucket.num_tensors * plan.HYPER_BYTES + bucket.num_tiles * plan.TILE_SUMS_BYTES
        return -(-(size + bucket.workspace_size * 4) // 8)

    def _send(self, one: _Launches) -> None:
        """Copy a bucket's lists to the device, with the Launch that points to them."""
        bucket = one.bucket
        lists = [bucket.tiles, bucket.first_tile, bucket.vectors, bucket.members]
        raw = [x.contiguous().view(torch.uint8).flatten() for x in lists]
        launch_bytes = ctypes.sizeof(plan.Launch)
        table = torch.empty(
            launch_bytes + sum(x.numel() for x in raw), dtype=torch.uint8, device=self._device
        )
        addresses, end = [], launch_bytes
        for x in raw:
            addresses.append(table.data_ptr() + end)
            end += x.numel()
        hypers = self._room.data_ptr()
        sums = hypers + bucket.num_tensors * plan.HYPER_BYTES
        launch = plan.Launch(
            options=self._options.data_ptr(),
            tensors=self._table.data_ptr(),
            tiles=addresses[0],
            first_tile=addresses[1],
            vectors=addresses[2],
            members=addresses[3],
            hypers=hypers,
            sums=sums,
            workspace=sums + bucket.num_tiles * plan.TILE_SUMS_BYTES,
            num_tensors=bucket.num_tensors,
            num_tiles=bucket.num_tiles,
            rule=plan.RULES[self._rule],
        )
        head = torch.frombuffer(bytearray(launch), dtype=torch.uint8)
        table.copy_(torch.cat([head, *raw]))
        one.tables = table

    def _put(self, work: Work, addresses: Tensor) -> None:
        known = torch.equal(self._words[work.members, ADDRESSES], addresses)
        capturing = self._gpu.capturing()
        self._captured |= capturing
        if capturing:
            self._of_graphs[id(work)] = work, self._room
        else:
            self._see_to_captures(addresses)
        if known and not self._captured:  # the device's table equals `_words`
            return
        readable = self._staging.readable(addresses.contiguous())
        there = readable.to(self._device, non_blocking=True)
        self._table[work.on_device, ADDRESSES] = there
        super()._put(work, addresses)  # last: the copy may have found no memory

    def _see_to_captures(self, addresses: Tensor) -> None:
        """Reserve memory for the copies of a capture that steps every known work: a fused backward
        has one per bucket."""
        alike = sum(len(members) == len(addresses) for members in self._work)
        self._staging.spare(addresses, alike)
        self._staging.spare(self._options, len(self._work))

    def _put_options(self, work: Work, coefficients: dict[int, float | Tensor]) -> None:
        """Write the options of the members' groups to the device: numbers if they have changed;
        tensors (a learning rate, the coefficient from a global norm) always, by a copy on the
        device."""
        tensors = []
        for position, key, group in self._groups(work, self._device):
            lr, coefficient = group["lr"], coefficients.get(key, 1.0)
            for field, value in (("lr", lr), ("coefficient", coefficient)):
                if isinstance(value, Tensor) and value.is_cuda:
                    word = getattr(plan.Options, field).offset // 8
                    tensors.append((position, word, value))
            numbers = group | {"lr": 0.0 if isinstance(lr, Tensor) and lr.is_cuda else lr}
            number = 1.0 if isinstance(coefficient, Tensor) else coefficient
            self._numbers[position] = plan.group_options(numbers, number, self._rule)
        raw = bytes(self._numbers)
        if raw != self._uploaded or tensors or self._captured:
            host = torch.frombuffer(bytearray(raw), dtype=torch.float64).view_as(self._options)
            host = self._staging.readable(host)
            self._options.copy_(host, non_blocking=True)
            self._uploaded = raw
        for position, word, value in tensors:
            self._options[position, word].copy_(value.reshape(()))


def indexed(device: torch.device) -> torch.device:
    """The device with its index; "cuda" is the current one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)
