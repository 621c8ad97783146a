"""Random projections of a gradient, which are drawn anew from counters and never stored.

A matrix gradient G (R, C) is read with its smaller dimension first, as G (D, L), and projected to
P G (r, L).  So the state has r L elements, P has r D, and there is a norm for each of the L
channels.  Convolutions are matrices O x (I*kh*kw).

P as drawn has the same bits on every device and in every dtype: bf16 represents the draws exactly,
so a GPU's tensor cores can multiply them by 16-bit gradients, and fp32 holds the products.  The
last bits of the sums P G depend on the device.
"""

from collections.abc import Iterable
from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor

from optim.features import NARROW
from optim.rng import mix, normals, signs
from optim.share import Place, Places


def projected_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """(D, L), the lengths of the projected and of the kept dimension of a parameter, or None if it
    is not projected: it is not a matrix, or rank >= D would save nothing."""
    sides = matrix_sides(shape)
    return sides if rank < sides[0] else None


def matrix_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The smaller and the larger side of a parameter's matrix; zeros if it is not a matrix."""
    if len(shape) < 2:
        return 0, 0
    rows, cols = shape[0], prod(shape[1:])
    return min(rows, cols), max(rows, cols)


def channels(g: Tensor) -> Tensor:
    """A tensor of the parameter's shape as its (D, L) matrix: a view where it is contiguous."""
    matrix = g.reshape(g.shape[0], -1)
    return matrix.t() if matrix.shape[0] >= matrix.shape[1] else matrix


def unchanneled(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `channels`: (D, L) -> a tensor of this shape."""
    return (matrix.t() if shape[0] >= prod(shape[1:]) else matrix).reshape(shape)


def parted(places: Iterable[Place]) -> tuple[Places, Places]:
    """The parameters that are projected, and the others."""
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


def projection(h: SimpleNamespace, width: int, device: torch.device) -> Tensor:
    """P fp32 (rank, width) with elements of mean 0 and variance 1 / rank, so that |P x| is |x| on
    average.

    It depends on (seed, parameter, how many times `update_gap` steps have passed), with the same
    bits on every device.  With `residual` its rows are then made orthogonal and equally long, by
    the Cholesky factor of P P^T in fp64 (the same everywhere up to rounding), so that
    rank / width * P^T P is a projection.
    """
    key = mix(h.seed, h.index, (h.t - 1) // h.update_gap, ord("P"))
    draw = normals if h.projection == "gaussian" else signs
    p = draw(key, (h.rank, width), device)
    return orthonormal_rows(p) * (width / h.rank) ** 0.5 if h.residual else p.mul_(h.rank**-0.5)


def gain(h: SimpleNamespace, width: int) -> float:
    """The factor of scaled gradients: the root of `scale`, where "auto" is width / rank."""
    return float(width / h.rank if h.scale == "auto" else h.scale) ** 0.5


def orthonormal_rows(p: Tensor) -> Tensor:
    """p (r, D) -> rows of length 1 that span the same space.  A row that depends linearly on those
    above it (short rows of signs may repeat) becomes zero."""
    p64 = p.to("cpu" if p.device.type in NARROW else p.device, torch.float64)
    ridge = 1e-12 * p.shape[1] * torch.eye(p.shape[0], dtype=torch.float64, device=p64.device)
    factor = torch.linalg.cholesky_ex(p64 @ p64.t() + ridge).L  # it does not wait for a GPU
    return torch.linalg.solve_triangular(factor, p64, upper=False).float().to(p.device)
