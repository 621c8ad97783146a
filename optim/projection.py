"""Random projections of a gradient, which are drawn anew from counters and never stored.

A matrix gradient G (R, C) is looked at with its smaller dimension first, G (D, L), and projected to
P G (r, L).  So the state is small in the larger number (r L), P is small in both (r D), and there
is a norm for each of the L channels.  Convolutions are matrices O x (I*kh*kw).

P has the same bits everywhere as it is drawn, and in every dtype: draws are numbers that bf16 has,
so that a GPU multiplies 16-bit gradients on its tensor cores.  The product P G is torch's matmul,
whose last bits depend on the device and may depend on the number of threads: a run repeats itself
on one machine.
"""

from collections.abc import Callable
from math import prod
from types import SimpleNamespace

import torch
from torch import Tensor

from optim.rng import mix, normals, signs

Draw = Callable[[int, tuple[int, int], torch.device], Tensor]


def projected_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """(D, L), the lengths of the projected and of the kept dimension of a parameter, or None where
    it is not projected: it is no matrix, or rank >= D would save nothing."""
    if len(shape) < 2:
        return None
    sides = sorted((shape[0], prod(shape[1:])))
    return (sides[0], sides[1]) if rank < sides[0] else None


def channels(g: Tensor) -> Tensor:
    """A tensor of the parameter's shape as its (D, L) matrix: a view where it is contiguous."""
    matrix = g.reshape(g.shape[0], -1)
    return matrix.t() if matrix.shape[0] >= matrix.shape[1] else matrix


def unchanneled(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `channels`: (D, L) -> a tensor of this shape."""
    return (matrix.t() if shape[0] >= prod(shape[1:]) else matrix).reshape(shape)


def projection(
    h: SimpleNamespace, width: int, device: torch.device, normals: Draw = normals
) -> Tensor:
    """P fp32 (rank, width) with elements of mean 0 and variance 1 / rank, so that |P x| is |x| on
    average.

    It is a function of (seed, parameter, how many times `update_gap` steps have passed), in the
    same bits on every device.  With `residual` its rows are then made orthogonal and of one length,
    by Cholesky's factor of P P^T in fp64 (to rounding the same everywhere), so that
    rank / width * P^T P projects.  `normals` draws like `optim.rng.normals`.
    """
    key = mix(h.seed, h.index, (h.t - 1) // h.update_gap, ord("P"))
    draw = normals if h.projection == "gaussian" else signs
    p = draw(key, (h.rank, width), device)
    return orthonormal_rows(p) * (width / h.rank) ** 0.5 if h.residual else p.mul_(h.rank**-0.5)


def gain(h: SimpleNamespace, width: int) -> float:
    """What scaled gradients are multiplied by: the root of `scale`, which "auto" makes width /
    rank."""
    return float(width / h.rank if h.scale == "auto" else h.scale) ** 0.5


def orthonormal_rows(p: Tensor) -> Tensor:
    """p (r, D) -> rows of length 1 that span the same space.  A row that depends on those above it
    (few signs repeat) comes out as zero."""
    p64 = p.double()
    ridge = 1e-12 * p.shape[1] * torch.eye(p.shape[0], dtype=torch.float64, device=p.device)
    factor = torch.linalg.cholesky_ex(p64 @ p64.t() + ridge).L  # it asks a GPU nothing
    return torch.linalg.solve_triangular(factor, p64, upper=False).float()
