"""How much of a change a LoRA of a limited rank keeps, in sums of squares over all numbers."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_LITTLE = 0.5  # of the change; if less is kept, there is a warning
_ENOUGH = 0.8  # what the rank that it suggests would keep, or
_NEARLY_ALL = 0.95  # of what the largest would, if less


@dataclass(kw_only=True)
class Kept:
    """Sums of squares, of everything that changes."""

    change: float = 0.0  # of layers, which a LoRA can hold
    lost: float = 0.0  # of that, to the rank
    beside: float = 0.0  # of other parameters
    # (largest rank,): squares of the k-th singular values, summed over layers.
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def note(self, change: float, lost: float, squares: Tensor) -> None:
        """Count one layer.  squares: of its change's singular values."""
        self.change += change
        self.lost += lost
        more = max(0, squares.shape[0] - self.squares.shape[0])
        self.squares = torch.nn.functional.pad(self.squares, (0, more))
        self.squares[: squares.shape[0]] += squares

    def share(self, part: float) -> float:
        """A sum of squares as a share of the whole change."""
        return part / total if (total := self.change + self.beside) else 1.0

    @property
    def kept(self) -> float:
        """The share that the LoRA keeps."""
        return self.share(max(self.change - self.lost, 0.0))

    def at(self, rank: int) -> float:
        """The share that a LoRA of this rank would keep."""
        return self.share(float(self.squares[:rank].sum()))

    def report(self, rank: int) -> None:
        """Say what other ranks would keep; warn if this one keeps little."""
        most = self.squares.shape[0]
        others = {max(1, rank // 4), max(1, rank // 2), rank, 2 * rank, 4 * rank}
        table = [f"{r}: {self.at(r):.1%}" for r in sorted(others) if r < most or r == rank]
        if len(table) > 1:
            log.info("kept by a LoRA of rank %s", ", ".join(table))
        if self.kept < _LITTLE:
            log.warning("the LoRA keeps less than half of the change; %s", self._remedy(rank))

    def _remedy(self, rank: int) -> str:
        goal = min(_ENOUGH, _NEARLY_ALL * self.at(self.squares.shape[0]))
        if self.at(rank) >= goal:
            return "the rest is in parameters that no LoRA changes: share the whole model instead"
        while self.at(rank) < goal:
            rank *= 2
        return f"--rank={rank} would keep {self.at(rank):.0%}"
