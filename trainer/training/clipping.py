"""Gradient clipping: `method.clip`, with `method.max_grad_norm` as the bound.

    global  the whole gradient is scaled to a norm of at most the bound.  Needs all gradients at
            once, so not with the fused backward.
    exact   the same, bit for bit, with the fused backward too: a first backward pass only measures
            the norm, a second one steps.  Costs a forward and a backward pass.
    lagged  as `global`, with the norm of the previous step; the first step of a run is clipped
            exactly.  Costs nothing; a sudden spike is clipped one step late.
    rms     each tensor on its own: its root mean square is at most bound / sqrt(N), with N the
            number of trained elements, which keeps the whole gradient's norm within the bound
            too.  Changes the gradient's direction; needs nothing of other tensors.

All modes scale the gradients in place, in their own dtype, as `torch.nn.utils.clip_grad_norm_`
does, so the optimizer sees the same bits whenever it steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements summed at a time on a CPU, which makes an fp32 copy of them
_TINY = 1e-6  # `clip_grad_norm_` adds it to the divisor, too


class Clip:
    """Measures and scales a step's gradients.

    `last_norm` is the norm of the last step with a finite one, NaN before that.
    """

    def __init__(self, mode: str, limit: float, parameters: Sequence[Tensor]) -> None:
        self.mode, self.limit = mode, limit
        self.last_norm = math.nan
        self._parameters = parameters
        self._numel = sum(p.numel() for p in parameters)
        self._norms: dict[Tensor, Tensor] = {}  # 0-d fp32, on the parameter's device
        self._known = (math.nan, 1.0)  # a norm, and its coefficient

    def state_dict(self) -> dict[str, Any]:
        return {"last_norm": self.last_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_norm = state["last_norm"]

    def needs_this_norm(self) -> bool:
        """Whether all gradients must be measured before any is used."""
        if self.mode == "lagged":
            return not math.isfinite(self.last_norm)
        return self.mode in ("global", "exact")

    def measure(self, *parameters: Tensor) -> None:
        """Record the norms of these parameters' gradients."""
        for parameter in parameters:
            assert parameter.grad is not None
            self._norms[parameter] = norm_of(parameter.grad)

    def measured(self, parameter: Tensor) -> bool:
        return parameter in self._norms

    def forget(self) -> None:
        """Discard the recorded norms."""
        self._norms.clear()

    def norm(self) -> float:
        """The norm of all gradients that were measured."""
        norms = [self._norms[p] for p in self._parameters if p in self._norms]
        if not norms:
            return 0.0
        device = norms[0].device
        return torch.linalg.vector_norm(torch.stack([x.to(device) for x in norms])).item()

    def scale(self, parameter: Tensor, norm: float) -> None:
        """Clip one measured gradient in place.  norm: the global one (`rms` and `none` ignore
        it)."""
        assert parameter.grad is not None
        if self.mode == "rms":
            share = (parameter.numel() / self._numel) ** 0.5
            parameter.grad.mul_(_coefficient(self._norms[parameter], self.limit * share))
        elif self.mode != "none" and norm + _TINY > self.limit:
            parameter.grad.mul_(self._whole(norm))

    def _whole(self, norm: float) -> float:
        """The coefficient for the whole gradient's norm, computed once per step."""
        if self._known[0] != norm:
            self._known = (norm, _coefficient(torch.tensor(norm), self.limit).item())
        return self._known[1]

    def end_step(self, norm: float) -> None:
        """Keep this step's norm for the next one, unless it is not finite."""
        if math.isfinite(norm):
            self.last_norm = norm


def norm_of(grad: Tensor) -> Tensor:
    """The Euclidean norm, in fp32 for any dtype: (*) -> 0-d."""
    in_parts = grad.is_cpu and grad.numel() > _CHUNK
    chunks = grad.flatten().split(_CHUNK) if in_parts else (grad,)
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float32) for chunk in chunks]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _coefficient(norm: Tensor, limit: float) -> Tensor:
    """The factor that limits a gradient of this norm to `limit`: 0-d -> 0-d."""
    return (limit / (norm + _TINY)).clamp(max=1.0)
