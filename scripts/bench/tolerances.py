"""How far two computations of the same step may be apart, where their bits may differ.

What one adds up in another order, or takes a `pow` of another library for, differs in last places:
of a weight, of a moment, of a code that stands for one.  Each kind of tensor has its tolerance in
one table.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optim.features import usable
from optim.projection import channels, projected_shape, projection

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Tolerance:
    """How far the engine may be from the reference, which adds up in another order.

    Every element may miss by `relative` of itself and `scale` of the largest one (of weights: of
    what the step moved); and `share` of them, but two at least, by `places` neighbours more.
    """

    relative: float = 0.0
    scale: float = 0.0
    places: int = 0
    share: float = 0.0


TOLERANCES = {
    "exact": Tolerance(),
    "weight fp32": Tolerance(scale=3e-6, places=2, share=1.0),
    "weight bf16": Tolerance(scale=3e-6, places=1, share=1e-3),
    "weight fp16": Tolerance(scale=3e-6, places=1, share=3e-3),
    "weight kahan": Tolerance(relative=2**-22, scale=3e-6, places=1, share=0.1),
    "signed fp32": Tolerance(relative=1e-6, scale=5e-7),
    "size fp32": Tolerance(relative=3e-6, scale=1e-7),  # of what may have cancelled
    "squares fp32": Tolerance(relative=3e-6, scale=1e-9),
    "shares fp64": Tolerance(relative=1e-6),  # of d
    "moment bf16": Tolerance(scale=5e-7, places=1, share=1e-3),
    "codes": Tolerance(places=1, share=1e-2),
    "signs": Tolerance(places=1, share=1e-5),
}
WEIGHT = {FP32: "weight fp32", BF16: "weight bf16", FP16: "weight fp16"}


def misses(
    what: str,
    wanted: Tensor,
    found: Tensor,
    *,
    largest: float | Tensor | None = None,
    place: Tensor | None = None,
    slack: float = 1.0,
    besides: float | Tensor = 0.0,
) -> str:
    """What is wrong with `found` by TOLERANCES[what], `slack` times as wide, and `besides` for
    every element: a phrase, or ""."""
    tolerance = TOLERANCES[what]
    x, y = wanted.double(), found.double()
    error = (x - y).abs()
    largest = x.abs().max() if largest is None and x.numel() else largest or 0.0
    near = slack * (tolerance.relative * x.abs() + tolerance.scale * largest) + besides
    place = spacing(wanted) if place is None else place
    away = ~(error <= near)  # NaN is
    far = ~(error <= near + tolerance.places * place)
    allowed = max(tolerance.share * away.numel(), 2 if tolerance.places else 0)
    if not far.any() and away.sum() <= allowed:
        return ""
    worst = (error - near).nan_to_num(math.inf).argmax()
    return (
        f"{what}: {int(away.sum())} of {away.numel()} are off, {int(far.sum())} far; "
        f"{y.flatten()[worst]:.9g} should be {x.flatten()[worst]:.9g}"
    )


def spacing(x: Tensor) -> Tensor:
    """How far the neighbours of a stored number are from it, at most."""
    if not x.dtype.is_floating_point:
        return torch.ones(x.shape)
    kind = torch.finfo(x.dtype)
    return kind.eps * x.double().abs().clamp_min(kind.tiny)


def state_misses(
    name: str, wanted: Tensor, found: Tensor, slack: float = 1.0, blur: float = 0.0
) -> str:
    """`misses` for one tensor of a state; what is known of an update's length may miss the share
    `blur` of it."""
    moment, _, part = name.partition(".")
    if (wanted.dtype, wanted.shape) != (found.dtype, found.shape):
        return f"{found.dtype} {tuple(found.shape)}"
    if part == "sign":
        bits = torch.arange(8, dtype=torch.uint8)
        return misses(
            "signs", wanted[..., None] >> bits & 1, found[..., None] >> bits & 1, slack=slack
        )
    if part.endswith("codes"):
        return misses("codes", wanted, found, slack=slack)
    if wanted.dtype == BF16:
        return misses("moment bf16", wanted, found, slack=slack)
    if wanted.dtype == torch.float64:
        return misses("shares fp64", wanted, found, slack=slack)
    if wanted.dtype != FP32:
        return misses("exact", wanted, found, slack=slack)
    if moment in ("update_norm", "update_rms"):
        return misses("squares fp32", wanted, found, slack=slack, besides=blur * wanted.double())
    if moment not in ("exp_avg", "exp_avg_slow", "gap", "grad_sum"):
        return misses("squares fp32", wanted, found, slack=slack)
    return misses("signed fp32" if part == "" else "size fp32", wanted, found, slack=slack)


def param_misses(
    p: Parameter,
    q: Parameter,
    old: Tensor,
    one: dict[str, Tensor],
    two: dict[str, Tensor],
    slack: float = 1.0,
    blur: float = 0.0,
) -> list[str]:
    """Whatever differs between a parameter p with state `one` and its twin q with `two`; a weight
    may miss the share `blur` of how far it has moved, and so may an update's length."""
    assert one.keys() == two.keys()
    steps = (p.detach().double() - old.double()).abs()
    a, b, moved = p.detach(), q.detach(), steps.max().item() if p.numel() else 0.0
    usual: dict[str, Any] = {"largest": moved, "slack": slack, "besides": blur * steps}
    lines = {"weights": misses(WEIGHT[p.dtype], a, b, **usual)}
    for key in one:
        if key == "compensation":  # may be a place off itself, and makes up for the weights'
            c, d = one[key].double(), two[key].double()
            place, a, b = spacing(one[key]), a.double() + c, b.double() + d
            lines[key] = misses("weight kahan", a, b, place=place, **usual)
        else:
            lines[key] = state_misses(key, one[key], two[key], slack, blur)
    return [f"{tuple(p.shape)} {key}: {line}" for key, line in lines.items() if line]


def blur_of(index: int, group: dict[str, Any], param: Tensor, step: int) -> float:
    """How far, as a share of themselves, two may have the updates apart that APOLLO makes of a
    gradient in its step'th step (from 1).

    A channel's update is its gradient times |N| / |P G|.  Where Adam or Adafactor makes N of one
    length whatever that of P G is, the quotient is as wrong as |P G| is: by rounding, which is of
    the size of |P| |G|, over |P G|.  With a single row the products of some channel always nearly
    cancel, and a clip of the whole tensor passes on to all what is wrong with the largest.
    """
    shape = projected_shape(tuple(param.shape), group["rank"])
    if shape is None:
        return 0.0
    assert param.grad is not None
    grad = channels(param.grad).float()
    grad = torch.where(usable(grad), grad, 0.0).double()
    h = SimpleNamespace(**group | {"index": index, "t": step})
    before, after = (
        grad.norm(dim=0),
        (projection(h, shape[0], param.device).double() @ grad).norm(dim=0),
    )
    there = after > 0
    return 2**-20 * (before[there] / after[there]).max().item() if there.any() else 0.0
