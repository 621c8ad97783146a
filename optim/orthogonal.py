"""How the fused engines step Muon: an ordinary step of SGD, orthogonalized, and one of weights.

To an engine, a matrix's step is the step of a stand-in that starts from zero (`optim/indirect.py`).
torch's matmul orthogonalizes it, on every device, and the engine steps the weights along the result
with one factor for all (the rule "scaled").  Nothing is read back, so that a step can be captured
in a CUDA graph.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from optim import features, gpu
from optim.codecs import FactoredSign
from optim.engine import buckets, in_lines
from optim.indirect import IndirectEngine, Make, Portions
from optim.interface import RuledOwner
from optim.newton_schulz import gain, orthogonalized, parted, precision
from optim.share import Place, Places, Share
from optim.standins import DirectedSteps, LowSteps

# Bytes of steps that are alive at once, unless a single tensor has more, by the type of device.
SCRATCH_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
_LOW = "sgd"  # the rule of a step before it is orthogonalized


class OrthogonalEngine(IndirectEngine):
    """Steps the parameters of a Muon."""

    shaping = ()

    def __init__(self, optimizer: RuledOwner, dense: str, make: Make, device: torch.device) -> None:
        low, self._directed = LowSteps(optimizer, kept=("grad_clip",)), DirectedSteps(optimizer)
        super().__init__(optimizer, dense, (low, _LOW), self._directed, make, device)
        self._of_graphs: dict[int, Portions] = {}  # kept alive for graphs

    def step(self, share: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.interface.Engine`."""
        work = self._work_of(share)
        if gpu.capturing():
            self._of_graphs[id(work)] = work
        if work.others:
            self._dense_engine.step(Share(work.others), coefficients)
        of_lows = self._refreshed(work, coefficients)
        for portion, grads in self._portions_of(work):
            portion.steps.zero_()
            self._low_engine.step(Share(portion.lows, grads), of_lows)
            steps = portion.lows.params
            all_of = zip(portion.directed, grads, steps, portion.has_signs, strict=True)
            for place, grad, step, has_signs in all_of:
                _orthogonalize(place, grad, step, has_signs)
            self._scaled_engine.step(Share(portion.directed, steps), {})

    def grad_sq(self, share: Share) -> float | Tensor:
        """As `optim.interface.Engine`."""
        work = self._work_of(share)
        self._refreshed(work, {})
        of_matrices = [
            self._low_engine.grad_sq(Share(portion.lows, grads))
            for portion, grads in self._portions_of(work)
        ]
        return features.total([*of_matrices, self._dense_engine.grad_sq(Share(work.others))])

    def _refreshed(
        self, work: Portions, coefficients: dict[int, float | Tensor]
    ) -> dict[int, float | Tensor]:
        """Give the stand-ins the current options: -> the coefficients of their gradients."""
        self._low.refresh(work.wide.groups)
        self._directed.refresh(work.wide.groups)
        return {
            id(self._low.group_of(group)): coefficients.get(id(group), 1.0)
            for group in work.wide.groups
        }

    @staticmethod
    def _portions_of(work: Portions) -> Iterable[tuple["MatrixPortion", list[Tensor]]]:
        """The portions, with the gradients of their parameters."""
        if not work.wide:
            return
        grads = Share(work.wide).readable_grads()
        for portion in work.portions:
            own, grads = grads[: len(portion.places)], grads[len(portion.places) :]
            yield portion, own

    def _parted(self, places: Iterable[Place]) -> tuple[Places, Places]:
        return parted(places)

    def _make(self, work: Portions) -> None:
        limit = SCRATCH_BYTES[self._device.type]
        sizes = [(place, MatrixPortion.bytes_of(place)) for place in work.wide]
        work.portions = [MatrixPortion(places) for places in buckets(sizes, limit)]
        self._reserve(max(portion.num_bytes for portion in work.portions))
        for portion in work.portions:
            portion.lay_out(self._scratch, self._low)
            portion.directed = self._directed.places_of(portion.places)
            portion.has_signs = [self._has_signs(place) for place in portion.places]
            for place in portion.places:
                self._scaled.factors_of(place).fill_(1.0)

    def _has_signs(self, place: Place) -> bool:
        """Whether the momentum is stored with sign bits."""
        codecs = self._optimizer.moments(place[2], place[1]).values()
        return any(isinstance(codec, FactoredSign) for codec in codecs)


def _orthogonalize(place: Place, grad: Tensor, step: Tensor, has_signs: bool) -> None:
    """Orthogonalize a matrix's step in place (fp32, of the parameter's shape), and apply its
    factor: here, because the tensors for factors are shared by all works.

    An unusable element of the gradient becomes NaN, so that the engine skips it; with signs,
    which have no zero, an element without a gradient has no step.
    """
    _, group, param = place
    matrix = step.flatten(1)  # a view
    direction = orthogonalized(matrix, group["ns_steps"])
    step.copy_(grad).abs_()
    unusable = (step <= features.LARGEST_GRAD).logical_not_()
    still = step == 0 if has_signs else None
    matrix.copy_(direction).mul_(gain(group["adjust_lr_fn"], tuple(param.shape)))
    if still is not None:
        step.masked_fill_(still, 0.0)
    step.masked_fill_(unusable, torch.nan)


def scratch_bytes(numels: list[int], device_type: str) -> int:
    """Bytes that are alive at once while matrices of these sizes are stepped: their steps, and of
    one of them two iterates."""
    largest = max(numels, default=0)
    steps = min(4 * sum(numels), max(SCRATCH_BYTES[device_type], 4 * largest))
    return steps + 2 * largest * precision(torch.device(device_type)).itemsize


class MatrixPortion:
    """Matrices whose steps are in the scratch together."""

    def __init__(self, places: list[Place]) -> None:
        self.places, self.lows = places, Places()
        self.directed = Places()  # the same parameters, for the engine that steps them
        self.has_signs: list[bool] = []  # of each: does its momentum have sign bits?
        self.num_bytes = sum(map(self.bytes_of, places))
        self.steps = torch.empty(0)  # all of them, with the padding between them

    @staticmethod
    def bytes_of(place: Place) -> int:
        """Bytes of scratch for one tensor."""
        return in_lines(4 * prod(place[2].shape))

    def lay_out(self, scratch: Tensor, low_steps: LowSteps) -> None:
        """Make views of the scratch, as parameters of an engine of their own."""
        self.steps, at = scratch[: self.num_bytes].view(torch.float32), 0
        for place in self.places:
            shape = place[2].shape
            step = self.steps[at : at + prod(shape)].view(shape).detach()  # it refers to no base
            self.lows.append(low_steps.adopt(place, step))
            at += self.bytes_of(place) // 4
