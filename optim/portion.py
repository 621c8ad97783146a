"""Tensors whose gradients are projected together: their layout in memory, and the tables that
describe them to an engine."""

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim import plan
from optim.plan import CHANNELS, DRAWS, Projection, Projections
from optim.projection import gain, sides_of
from optim.share import Place, Places
from optim.standins import LowSteps

# Bytes of P, P G and N that are alive at once, unless a single tensor has more, by the type of
# device.  At rank 256 the SDXL UNet has 4.9 GB of them, and on a GPU each portion costs a dozen
# launches.
SCRATCH_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_LINE = 256  # bytes that tensors in the scratch are aligned to


class ProjectedKind(NamedTuple):
    """What all tensors of a portion have in common."""

    grad_dtype: torch.dtype
    p_dtype: torch.dtype
    rank: int
    signs: bool  # P consists of signs
    per_tensor: bool  # a tensor has one factor, not one per channel
    conditioned: bool  # is_conditioned


def is_conditioned(group: dict[str, Any]) -> bool:
    """Whether the projected gradient depends on sums over the whole gradient."""
    return group["orthograd"] or group["grad_clip"] is not None


def kind_of(place: Place, grad_dtype: torch.dtype, p_dtype: torch.dtype) -> ProjectedKind:
    """The kind of a parameter that is projected."""
    group = place[1]
    return ProjectedKind(
        grad_dtype=grad_dtype,
        p_dtype=p_dtype,
        rank=group["rank"],
        signs=group["projection"] == "sign",
        per_tensor=group["scaling"] == "tensor",
        conditioned=is_conditioned(group),
    )


class Portion:
    """Tensors of one kind that are projected together, and where their P, P G and N are."""

    def __init__(self, kind: ProjectedKind, places: list[Place]) -> None:
        self.kind, self.places = kind, places
        self.lows = Places()
        self.p: list[Tensor] = []
        self.products: list[Tensor] = []  # P G of each
        self.counts: list[Tensor] = []  # step counts
        self.steps = torch.empty(0)  # all N, with the padding between them
        self.table = torch.empty(0)  # on the device: its Projections, then its lists
        sizes = [self._sizes(place, kind) for place in places]
        self.p_bytes, self.low_bytes = (sum(each) for each in zip(*sizes, strict=True))
        sides = [sides_of(place) for place in places]
        self.num_draws = [-(-kind.rank * width // DRAWS) for width, _ in sides]
        self.num_channels = [-(-length // CHANNELS) for _, length in sides]

    @property
    def num_bytes(self) -> int:
        """Bytes of scratch."""
        return self.p_bytes + 2 * self.low_bytes

    @staticmethod
    def _sizes(place: Place, kind: ProjectedKind) -> tuple[int, int]:
        """Bytes of P, and of P G."""
        width, length = sides_of(place)
        return _lines(kind.rank * width * kind.p_dtype.itemsize), _lines(4 * kind.rank * length)

    @classmethod
    def bytes_of(cls, place: Place, kind: ProjectedKind) -> int:
        """Bytes of scratch for one tensor."""
        p_bytes, low_bytes = cls._sizes(place, kind)
        return p_bytes + 2 * low_bytes

    def lay_out(self, scratch: Tensor, low_steps: LowSteps) -> None:
        """Make views of the scratch: P, and N as parameters of an engine of their own, with P G as
        their gradients."""
        p_at, low_at, step_at = 0, self.p_bytes, self.p_bytes + self.low_bytes
        self.steps = scratch[step_at : step_at + self.low_bytes].view(torch.float32)
        for place in self.places:
            rank, (width, length) = self.kind.rank, sides_of(place)
            p_bytes, low_bytes = self._sizes(place, self.kind)
            self.p.append(_matrix(scratch, p_at, rank, width, self.kind.p_dtype))
            low = _matrix(scratch, step_at, rank, length, torch.float32)
            low.grad = _matrix(scratch, low_at, rank, length, torch.float32)
            self.products.append(low.grad)
            self.lows.append(low_steps.adopt(place, low))
            self.counts.append(low_steps.state[low]["step"])
            p_at, low_at, step_at = p_at + p_bytes, low_at + low_bytes, step_at + low_bytes

    def send(self, factors: list[Tensor], grads: int) -> None:
        """Write the engine's tables to the device: the tensors, with the addresses of their
        factors; the address of the gradients' addresses, `grads`; and the lists of parts."""
        tensors = (Projection * len(self.places))(
            *(self._describe(i, x.data_ptr()) for i, x in enumerate(factors))
        )
        lists = [
            torch.frombuffer(tensors, dtype=torch.uint8),
            _parts(self.num_draws),
            _parts(self.num_channels),
        ]
        ends = [ctypes.sizeof(Projections)]
        for x in lists:
            ends.append(ends[-1] + x.numel())
        sums = _lines(ends[-1])
        self.table = torch.empty(
            sums + 16 * sum(self.num_channels), dtype=torch.uint8, device=self.steps.device
        )
        base = self.table.data_ptr()
        head = Projections(
            tensors=base + ends[0],
            grads=grads,
            draws=base + ends[1],
            channels=base + ends[2],
            sums=base + sums,
            grad_dtype=plan.DTYPES[self.kind.grad_dtype],
            p_dtype=plan.DTYPES[self.kind.p_dtype],
            signs=self.kind.signs,
            per_tensor=self.kind.per_tensor,
        )
        raw = torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *lists])
        self.table[: raw.numel()].copy_(raw)

    def _describe(self, i: int, factors: int) -> Projection:
        index, group, param = self.places[i]
        width, length = sides_of(self.places[i])
        return Projection(
            p=self.p[i].data_ptr(),
            low=self.products[i].data_ptr(),
            step=self.lows[i][2].data_ptr(),
            factors=factors,
            count=self.counts[i].data_ptr(),
            seed=group["seed"] % (1 << 64),
            index=index,
            update_gap=group["update_gap"],
            rank=group["rank"],
            width=width,
            length=length,
            first_part=sum(self.num_channels[:i]),
            gain=gain(SimpleNamespace(**group), width) * group["rank"] ** 0.5,
            tall=param.shape[0] == length,
        )


def _matrix(scratch: Tensor, at: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """A view of the scratch as a matrix that begins at byte `at`; it refers to no base."""
    view = scratch[at : at + rows * cols * dtype.itemsize].view(dtype)
    return view.view(rows, cols).detach()


def _parts(counts: Iterable[int]) -> Tensor:
    """Part structs as bytes: for each tensor, as many as its count."""
    numbers = torch.tensor(list(counts), device="cpu")
    owners = torch.arange(len(numbers), device="cpu").repeat_interleave(numbers)
    within = torch.arange(len(owners), device="cpu") - (numbers.cumsum(0) - numbers)[owners]
    return torch.stack([owners, within], dim=1).to(torch.int32).view(torch.uint8).flatten()


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
