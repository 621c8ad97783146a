"""Options of every optimizer of the family, independent of its rule and of each other.

A feature is an option (`Features`) and a pure function on one parameter's fp32 tensors.  Rules call
the functions that belong inside their arithmetic (`limited`); the step applies the rest.
"""

from types import SimpleNamespace
from typing import Literal, TypedDict

import torch
from torch import Tensor

NARROW = {"mps"}  # types of devices without fp64
# The largest usable gradient: the squares of 2^31 such elements still have a finite fp32 sum.
LARGEST_GRAD = 2.0**48


class Features(TypedDict, total=False):
    """Options of every optimizer.

    storage: how moments are stored: "fp32" (4 bytes per element), "bf16" (2), "8bit" (1) or
        "factored" (rank-1 factors and a sign bit, about 1/8; SMMF).

    rounding: how bf16 and fp16 weights are written: "stochastic" (unbiased; fp16 is written to the
        nearest, so small steps are lost, which a warning says; if the optimizer finds its own rate,
        fp16 is compensated as by "kahan"), "nearest", or "kahan", which keeps the rounding error in
        2 more bytes per parameter and adds it to the next step.

    orthograd: remove from the gradient its component along the weights, and keep its norm (Prieto
        et al. 2025).  A parameter of one element has no other component and does
        not move, which a warning says.

    max_grad_norm: largest norm of all of the optimizer's gradients together, over all groups; it
        needs them all at once, so `step_param` and the fused backward refuse it, and under ZeRO-1
        each process would judge its share alone. None disables clipping.

    grad_clip: largest norm of one tensor's gradient; None disables clipping.

    growth_limit: an update's norm may be at most this many times the previous one's; Fira uses 1.01
        (Chen et al. 2024). None disables the limit.

    cautious: drop the elements of an update that point against the gradient, and scale up the rest
        (Liang et al. 2024).

    grams: take the sign of an update from the gradient, and its size from the moments (Cao et al.
        2024); not beside `cautious`.

    cautious_decay: decay only the weights that the update shrinks as well.

    factor_1d: factor the moments of 1-D tensors too (storage="factored" only); they are few and
        matter, so they are kept in fp32 unless asked.

    on_nonfinite: "skip" leaves weight and state of an element as they were when its gradient is
        NaN, infinite or above 2^48 in size, and counts it (`nonfinite_count`); "raise" raises
        FloatingPointError before anything changes, so `step_param` and the fused backward refuse
        it.

    seed: of the stochastic rounding, of weights and of state.

    backend: who computes a step: "native" (the fused engine: on a CPU where the install could
        build it, and on CUDA), "torch" (plain PyTorch, the same result to rounding), or "auto":
        what OPTIM_BACKEND says, else the best there is.
    """

    storage: Literal["fp32", "bf16", "8bit", "factored"]
    rounding: Literal["stochastic", "nearest", "kahan"]
    orthograd: bool
    max_grad_norm: float | None
    grad_clip: float | None
    growth_limit: float | None
    cautious: bool
    grams: bool
    cautious_decay: bool
    factor_1d: bool
    on_nonfinite: Literal["skip", "raise"]
    seed: int
    backend: Literal["auto", "native", "torch"]


DEFAULTS = Features(
    storage="fp32",
    rounding="stochastic",
    orthograd=False,
    max_grad_norm=None,
    grad_clip=None,
    growth_limit=None,
    cautious=False,
    grams=False,
    cautious_decay=False,
    factor_1d=False,
    on_nonfinite="skip",
    seed=0,
    backend="auto",
)


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums over a tensor: fp64 where the device has it."""
    return torch.float32 if device.type in NARROW else torch.float64


def usable(g: Tensor) -> Tensor:
    """Which elements of a gradient can be used: g (*) -> bool (*).  NaN compares false."""
    return g.float().abs() <= LARGEST_GRAD


def all_usable(grads: list[Tensor]) -> bool:
    """Whether all elements of all gradients can be used, judged by their extremes, which propagate
    NaN: no gradient is copied, and each device is waited for once."""
    extremes: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        if g.numel():
            extremes.setdefault(g.device, []).extend(x.float() for x in torch.aminmax(g))
    return all([bool(usable(torch.stack(each)).all()) for each in extremes.values()])


def orthogonal(w: Tensor, g: Tensor) -> Tensor:
    """g without its component along w, at g's norm: w, g (*) -> (*).

    Prieto et al. 2025 (arXiv 2501.04697).  A gradient that is parallel to w up to
    rounding leaves only noise, which is not scaled up to g's norm: the result is then zero.
    """
    w, g = w.to(wide(w.device)), g.to(wide(g.device))
    rest = g - (w * g).sum() / (w.square().sum() + 1e-30) * w
    norm, rest_norm = g.norm(), rest.norm()
    scale = torch.where(rest_norm > 1e-6 * norm, norm / rest_norm.clamp_min(1e-300), 0.0)
    return (rest * scale).float()


def total(parts: list[float | Tensor]) -> float | Tensor:
    """The sum of numbers and 0-d tensors, on the device of the first tensor if there is one."""
    device = next((x.device for x in parts if isinstance(x, Tensor)), None)
    return sum(x.to(device) if isinstance(x, Tensor) else x for x in parts)


def shrinking(norm: float | Tensor, limit: float) -> float | Tensor:
    """The factor that brings gradients of this norm (a number, or 0-d) to at most `limit`."""
    if isinstance(norm, Tensor):
        return (limit / norm).clamp(max=1.0)
    return limit / norm if norm > limit else 1.0


def grad_sq(g: Tensor) -> float:
    """The sum of the squares of g's usable elements."""
    return float(length(torch.where(usable(g), g, 0.0))) ** 2


def length(x: Tensor) -> Tensor:
    """The norm of x (*), summed in the widest dtype and of it: -> 0-d."""
    return torch.linalg.vector_norm(x, dtype=wide(x.device))


def clipped(h: SimpleNamespace, g: Tensor) -> Tensor:
    """g scaled down to norm `grad_clip` where it is longer."""
    if h.grad_clip is None:
        return g
    norm = length(g)
    return g * (h.grad_clip / norm.clamp_min(1e-30)).clamp_max(1.0).to(g)


def limited(h: SimpleNamespace, u: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """u scaled down so that its norm grows by at most `growth_limit`: u (*), previous 0-d -> u (*),
    its norm.

    Chen et al. 2024 (Fira, arXiv 2410.01623).  Without a previous norm, or after a (nearly)
    zero one, there is nothing to compare with and nothing is limited, so that a single zero
    gradient does not freeze the tensor.
    """
    norm = length(u).float()
    bound = torch.where(previous > 1e-6, previous * h.growth_limit, norm)
    scale = (bound / norm.clamp_min(1e-30)).clamp_max(1.0)
    return u * scale, norm * scale


def aligned(h: SimpleNamespace, u: Tensor, g: Tensor) -> Tensor:
    """The update after `grams` or `cautious`; moments are never touched."""
    if h.grams:
        return u.abs() * g.sign()
    if h.cautious:
        agrees = (u * g > 0).to(u.dtype)
        return u * agrees / agrees.mean().clamp_min(1e-3)
    return u


def decayed(h: SimpleNamespace, w: Tensor, u: Tensor) -> Tensor:
    """What decoupled weight decay subtracts, before its factor lr: w, u (*) -> (*)."""
    decay = h.weight_decay * w
    return torch.where(u * w > 0, decay, 0.0) if h.cautious_decay else decay
