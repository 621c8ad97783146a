"""Low-rank approximations: the adapter of some rank that is closest to a weight's change, or to an
adapter of a larger rank."""

import torch
from torch import Tensor

from trainer.formats.adapter import Lora


def closest(change: Tensor, rank: int) -> tuple[Lora, Tensor]:
    """The adapter of this rank that is closest to a weight's change, in the sum of squares (Eckart
    & Young 1936), with alpha = rank.

    change (out, in[, kh, kw]), of which the matrix view is approximated -> the adapter, of a lower
    rank if the matrix has no more, and the squares of all singular values, largest first (fp64).
    """
    wide = change.float().flatten(1)
    is_tall = wide.shape[0] > wide.shape[1]
    if is_tall:
        wide = wide.t()
    # Singular vectors of the shorter side, at most 1280 in SDXL, from its Gram matrix; then a step
    # of subspace iteration (Halko et al. 2011, alg. 4.4) for the digits that squaring loses.
    squares, vectors = torch.linalg.eigh(wide @ wide.t())  # in ascending order
    basis = torch.linalg.qr(wide @ (wide.t() @ vectors[:, -rank:])).Q
    u, s, vh = torch.linalg.svd(basis.t() @ wide, full_matrices=False)
    u = basis @ u
    if is_tall:
        u, vh = vh.t(), u.t()
    return _adapter(u, s, vh, change.shape), squares.flip(0).clamp(min=0).double()


def resized(adapter: Lora, rank: int) -> tuple[Lora, Tensor]:
    """An adapter as `closest` would make it of this one's delta, and the squares of the delta's
    singular values; the delta itself is not computed.  DoRA's magnitude is kept."""
    up, r_up = torch.linalg.qr(adapter.up.float().flatten(1))
    down, r_down = torch.linalg.qr(adapter.down.float().flatten(1).t())
    u, s, vh = torch.linalg.svd(adapter.scale * (r_up @ r_down.t()), full_matrices=False)
    shape = (adapter.up.shape[0], *adapter.down.shape[1:])
    vh = vh[:rank] @ down.t()
    return _adapter(up @ u[:, :rank], s[:rank], vh, shape, adapter.magnitude), s.double().square()


def _adapter(
    u: Tensor, s: Tensor, vh: Tensor, shape: tuple[int, ...], magnitude: Tensor | None = None
) -> Lora:
    """u (out, rank) * s @ vh (rank, in * kh * kw) as an adapter, the singular values shared evenly
    by the two factors, so that both fit into fp16."""
    root, rank = s.sqrt(), s.shape[0]
    return Lora(
        down=(root[:, None] * vh).reshape(rank, *shape[1:]).contiguous(),
        up=(u * root).reshape(shape[0], rank, *[1] * (len(shape) - 2)).contiguous(),
        alpha=float(rank),
        magnitude=magnitude,
    )
