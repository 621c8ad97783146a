"""How the fused engines step APOLLO: two ordinary steps, one of projections and one of weights.

A matrix gradient is projected by torch's matmul, a chunk at a time.  The projection P G (r, L) is
then a parameter of its own to an engine: Adam or Adafactor steps it from zero with a learning rate
of -1, so that what its "weight" becomes is the step N.  The ratio of the lengths of N and P G is a
number for each channel, and with these the engine steps the weights along G itself (the rule
"scaled").  What is not projected is stepped by Adam or Adafactor as it is.

P G and N are alive for as many tensors at once as fit into LOW_BYTES, or for a single larger one.
This is the CPU's way; a GPU has its own (`optim/projected_cuda.py`), of the same two steps.
"""

from collections.abc import Callable, Iterable
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim import features, native, rng
from optim.codecs import Codec, Given
from optim.engine import buckets
from optim.projection import channels, gain, projected_shape, projection
from optim.reference import norms
from optim.share import Place, Places, Share

if TYPE_CHECKING:
    from optim.backend import Engine
    from optim.fused import FusedOptimizer

LOW_BYTES = 32 << 20
CHUNK = 1 << 16  # gradient elements that are fp32 at once

Make = Callable[[Any, str], "Engine"]  # (owner, rule) -> what steps the owner's tensors by the rule

# What the step of a projection has of its group's options.
_BARE: dict[str, Any] = {
    **{"lr": -1.0, "weight_decay": 0.0, "rounding": "nearest", "clip_threshold": None},
    **{"growth_limit": None, "grad_clip": None, "max_grad_norm": None},
    **dict.fromkeys(("orthograd", "cautious", "grams", "cautious_decay"), False),
}


class ProjectedEngine:
    """Steps the parameters of an APOLLO on a CPU, by engines that `make(owner, rule)` gives for the
    steps of `dense` (a rule's name) and for "scaled"."""

    def __init__(self, optimizer: "FusedOptimizer", dense: str, make: Make) -> None:
        self._low, self._scaled = LowSteps(optimizer), ScaledSteps(optimizer)
        self._tensors: dict[int, Tensor] = {}  # the projections, by the parameter
        self._dense_engine = make(optimizer, dense)
        self._low_engine, self._scaled_engine = make(self._low, dense), make(self._scaled, "scaled")

    def step(self, places: Share, coefficients: dict[int, float | Tensor]) -> None:
        """As `optim.backend.Engine`."""
        wide, others = parted(places)
        if others:
            self._dense_engine.step(Share(others), coefficients)
        if not wide:
            return
        self._low.refresh()
        sizes = [(place, 8 * place[1]["rank"] * sides_of(place)[1]) for place in wide]
        for some in buckets(sizes, LOW_BYTES):
            lows = Places(self._low_of(place, coefficients) for place in some)
            self._low_engine.step(Share(lows), {})
            for place, (_, _, low) in zip(some, lows, strict=True):
                self._scaled.put(place, low)
                low.grad, low.data = None, low.data.new_empty(0)
        self._scaled_engine.step(Share(wide), coefficients)

    def grad_sq(self, places: Share) -> float | Tensor:
        """As `optim.backend.Engine`."""
        wide, others = parted(places)
        for place in wide:
            self._scaled.factors_of(place)
        return features.summed(
            [self._scaled_engine.grad_sq(Share(wide)), self._dense_engine.grad_sq(Share(others))]
        )

    def _low_of(self, place: Place, coefficients: dict[int, float | Tensor]) -> Place:
        """The projection of a parameter's gradient, as the gradient of a tensor (r, L) of zeros."""
        index, group, param = place
        assert param.grad is not None
        state = self._low.optimizer.state_of(param, group)
        h = SimpleNamespace(**group | {"index": index, "t": int(state["step"]) + 1})
        width, length = sides_of(place)
        low = self._tensors.setdefault(index, torch.empty(0, device=param.device))
        low.data = torch.zeros((h.rank, length), device=param.device)
        draw = native.normals if native.unavailable() is None else rng.normals
        p = projection(h, width, param.device, draw)
        low.grad = projected(place, param.grad, p, coefficients.get(id(group), 1.0), state)
        return self._low.adopt(place, low)


class LowSteps:
    """What an engine asks of an optimizer, of the projections in place of the parameters."""

    shared: tuple[str, ...] = ()

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self.optimizer = optimizer
        self.param_groups = [dict(group) for group in optimizer.param_groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._places: dict[Tensor, Place] = {}
        self._unread: dict[int, Tensor] = {}  # counts of what is not usable in projections

    def refresh(self) -> None:
        """Take over the options as they are now."""
        for group, own in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            own.update(group | {name: x for name, x in _BARE.items() if name in group})

    def adopt(self, place: Place, low: Tensor) -> Place:
        """Let a tensor (r, L) stand for a parameter, with its moments and its step count."""
        index, group, param = place
        state = self.optimizer.state_of(param, group)
        moments = {k: x for k, x in state.items() if k == "step" or k.startswith("exp_avg")}
        unread = self._unread.get(index)
        if unread is None or unread.device != param.device:
            unread = torch.zeros((), dtype=torch.int64, device=param.device)
        self._unread[index] = unread
        self.state[low] = {"nonfinite": unread} | moments
        self._places[low] = place
        return index, self.group_of(group), low

    def drop(self, low: Tensor) -> None:
        """Forget a tensor, and let go of its memory."""
        del self.state[low], self._places[low]
        low.grad, low.data = None, low.data.new_empty(0)

    def group_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options for the projections of a group's parameters."""
        return next(
            own
            for theirs, own in zip(self.optimizer.param_groups, self.param_groups, strict=True)
            if theirs is group
        )

    def codecs(self, low: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """Those of the parameter's moments."""
        _, own, param = self._places[low]
        return self.optimizer.moments(param, own)

    def state_of(self, low: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's moments and step count."""
        return self.state[low]

    def check_state(self, index: int, group: dict[str, Any], low: Tensor) -> None:
        """Raise ValueError where the parameter's state is not what its options ask for."""
        self.optimizer.check_state(*self._places[low])


class ScaledSteps:
    """What an engine asks of an optimizer, of weights that follow a gradient by its channels."""

    shared: tuple[str, ...] = ()

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = optimizer
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._factors: dict[int, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self._optimizer.param_groups

    def factors_of(self, place: Place) -> Tensor:
        """Where the factors of a parameter's channels are: fp32 (L,)."""
        index, group, param = place
        length = sides_of(place)[1]
        factors = self._factors.get(index)
        if factors is None or factors.device != param.device or factors.numel() != length:
            factors = self._factors[index] = torch.zeros(length, device=param.device)
        state = self._optimizer.state_of(param, group)
        kept = {k: x for k, x in state.items() if not k.startswith("exp_avg")}
        side = "row" if param.shape[0] >= param.numel() // param.shape[0] else "col"
        self.state[param] = kept | {f"scales.{side}": factors}
        return factors

    def put(self, place: Place, low: Tensor) -> None:
        """The factors from the step N that a projection has become, low (r, L), and from its
        gradient P G, whose channels without a usable element are NaN."""
        group = place[1]
        assert low.grad is not None
        dim = 0 if group["scaling"] == "channel" else None
        step, before = low.detach(), low.grad.nan_to_num(0.0)
        length, low_length = norms(step, dim), norms(before, dim)
        factor = torch.where(low_length > 1e-30, length / low_length, 0.0).float()
        factor = factor * gain(SimpleNamespace(**group), sides_of(place)[0])
        self.factors_of(place).copy_(factor.flatten().expand(low.shape[1]))

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """The factors, in place of the moments."""
        shape = tuple(param.shape)
        codecs = self._optimizer.codecs(param, group)
        others = {k: codec for k, codec in codecs.items() if not k.startswith("exp_avg")}
        return {"scales": Given(shape, (shape[0], prod(shape[1:])))} | others

    def state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state but for its moments, and the factors."""
        return self.state[param]

    def check_state(self, index: int, group: dict[str, Any], param: Tensor) -> None:
        """Raise ValueError where the parameter's state is not what its options ask for."""
        self._optimizer.check_state(index, group, param)


def parted(places: Iterable[Place]) -> tuple[Places, Places]:
    """Those that are projected, and the others."""
    wide, others = Places(), Places()
    for place in places:
        is_wide = projected_shape(tuple(place[2].shape), place[1]["rank"]) is not None
        (wide if is_wide else others).append(place)
    return wide, others


def sides_of(place: Place) -> tuple[int, int]:
    """(D, L) of a parameter that is projected."""
    sides = projected_shape(tuple(place[2].shape), place[1]["rank"])
    assert sides is not None
    return sides


def projected(
    place: Place,
    grad: Tensor,
    p: Tensor,
    coefficient: float | Tensor,
    state: dict[str, Tensor],
    chunk: int = CHUNK,
) -> Tensor:
    """P G fp32 (r, L) of a parameter's gradient as the features leave it, NaN where a channel has
    no usable element; p fp32 (r, D), `chunk` elements of the gradient at a time."""
    _, group, param = place
    grad, weight = channels(grad), channels(param.detach())
    lost = channels(state["compensation"]) if "compensation" in state else None
    width = max(1, chunk // grad.shape[0])
    spans = [slice(at, at + width) for at in range(0, grad.shape[1], width)]

    def weights(span: slice) -> Tensor:
        w = weight[:, span].double()
        return w if lost is None else w + lost[:, span].double()

    rho: float | Tensor = 0.0
    if is_conditioned(group):
        coefficient, rho = _conditioning(group, grad, weights, spans, coefficient)
    low = torch.empty((p.shape[0], grad.shape[1]), device=param.device)
    for span in spans:
        g = grad[:, span].float()
        clean = g.is_cpu and _all_usable(g)
        if clean and not group["orthograd"]:
            torch.matmul(p, g, out=low[:, span])
            continue
        ok = features.usable(g)
        g = torch.where(ok, g, 0.0)
        if group["orthograd"]:
            g = torch.where(ok, (g.double() - rho * weights(span)).float(), 0.0)
        torch.matmul(p, g, out=low[:, span])
        low[:, span].masked_fill_(~ok.any(dim=0), torch.nan)
    return low.mul_(coefficient)


def is_conditioned(group: dict[str, Any]) -> bool:
    """Whether what is projected depends on sums over the whole gradient."""
    return group["orthograd"] or group["grad_clip"] is not None


def _all_usable(g: Tensor) -> bool:
    """Whether all elements of a gradient are (`features.usable`); NaN is in both extremes."""
    least, largest = torch.aminmax(g)
    return bool(least >= -features.LARGEST_GRAD) and bool(largest <= features.LARGEST_GRAD)


def _conditioning(
    group: dict[str, Any],
    grad: Tensor,
    weights: Callable[[slice], Tensor],
    spans: list[slice],
    coefficient: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(c, rho), 0-d: the gradient that is projected is c (g - rho w).

    `features.clipped` and `features.orthogonal`, of sums over all spans."""
    sums = torch.zeros(3, dtype=torch.float64, device=grad.device)
    for span in spans:
        g = grad[:, span].double()
        g = torch.where(features.usable(grad[:, span]), g, 0.0)
        w = weights(span) if group["orthograd"] else g
        sums += torch.stack([g.square().sum(), (w * g).sum(), w.square().sum()])
    grad_sq, weight_grad, weight_sq = sums
    c = torch.ones_like(grad_sq) * coefficient  # as_tensor would wait for the device
    if group["grad_clip"] is not None:
        c = c * (group["grad_clip"] / (c * grad_sq.sqrt()).clamp_min(1e-30)).clamp_max(1.0)
    rho = torch.zeros_like(c)
    if group["orthograd"]:
        rho = weight_grad / (weight_sq + 1e-30)
        rest_sq = grad_sq - 2 * rho * weight_grad + rho * rho * weight_sq
        something = rest_sq > 1e-12 * grad_sq
        c = c * torch.where(something, (grad_sq / rest_sq.clamp_min(1e-300)).sqrt(), 0.0)
    return c.float(), rho
