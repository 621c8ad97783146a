"""Orthogonalization by matrix products alone, as Muon steps along it.

A momentum U D V^T becomes about U V^T: a step that is equally long in all directions that the
momentum has.  The result is not exact: singular values above 0.003 of the norm end between 0.68 and
1.21, which training does not notice (Jordan et al. 2024); smaller ones end below.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from optim.share import Place, Places

# p(x) = a x + b x^3 + c x^5, chosen so that small singular values grow as fast as they can.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST = 1e-30  # the smallest size that a matrix is divided by


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is orthogonalized: convolutions are matrices O x (I*kh*kw)."""
    return len(shape) > 1


def parted(places: Iterable[Place]) -> tuple[Places, Places]:
    """The parameters that are orthogonalized, and the others."""
    matrices, others = Places(), Places()
    for place in places:
        (matrices if is_matrix(tuple(place[2].shape)) else others).append(place)
    return matrices, others


def precision(device: torch.device) -> torch.dtype:
    """What the iterations compute in: on a GPU bf16, as Jordan et al. do, for its tensor cores."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalized(x: Tensor, steps: int) -> Tensor:
    """x fp32 (R, C) -> about U V^T in `precision`, where x = U D V^T; zero rows and columns stay
    zero.

    Jordan et al. 2024, "Muon", the quintic Newton-Schulz iteration.  Costs 2 steps (2 R^2 C + R^3)
    multiplications and additions, for R <= C.
    """
    if not x.numel():
        return x
    unit = (x if x.shape[0] <= x.shape[1] else x.t()).to(precision(x.device))
    # By its largest element first: a sum of squares in fp64 would be one of a copy in fp64.
    unit = unit / torch.linalg.vector_norm(unit, torch.inf).clamp_min(_LEAST)
    unit = unit / torch.linalg.vector_norm(unit, dtype=torch.float32).clamp_min(1.0)
    for _ in range(steps):
        square = unit @ unit.t()
        unit = torch.addmm(
            unit, torch.addmm(square, square, square, beta=_B, alpha=_C), unit, beta=_A
        )
    return unit if unit.shape == x.shape else unit.t()


def gain(adjust_lr_fn: str, shape: tuple[int, ...]) -> float:
    """The factor of an orthogonal step of this shape (R, ...), read as (R, C).

    "original" is sqrt(max(1, R / C)) (Jordan et al. 2024); "match_rms_adamw" is
    0.2 sqrt(max(R, C)), with which the step's RMS is about 0.2, as AdamW's is (Liu et al. 2025,
    section 2.2).
    """
    rows, cols = shape[0], max(prod(shape[1:]), 1)
    if adjust_lr_fn == "original":
        return max(1.0, rows / cols) ** 0.5
    return float(0.2 * max(rows, cols) ** 0.5)
