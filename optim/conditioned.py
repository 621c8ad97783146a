"""APOLLO's projection of a gradient that is first conditioned by sums over the whole of it
(`grad_clip`, `orthograd`), in PyTorch, some channels at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim import features
from optim.projection import channels
from optim.share import Place

# Elements converted to fp32 at a time: what fits a CPU's cache, and enough for a GPU.
CHUNK_CPU, CHUNK = 1 << 16, 1 << 22


def conditioned_product(
    place: Place,
    grad: Tensor,
    p: Tensor,
    coefficient: float | Tensor,
    lost: Tensor | None,
) -> Tensor:
    """P G fp32 (r, L) of a parameter's gradient, clipped and orthogonalised as its group asks; NaN
    in a channel without a usable element.  p fp32 (r, D); `coefficient` is the gradient's factor
    from the clip by the global norm, `lost` the weights' rounding error if that is kept."""
    _, group, param = place
    grad, weight = channels(grad), channels(param.detach())
    lost = None if lost is None else channels(lost)
    width = max(1, (CHUNK if grad.is_cuda else CHUNK_CPU) // grad.shape[0])
    spans = [slice(at, at + width) for at in range(0, grad.shape[1], width)]

    def weights(span: slice) -> Tensor:
        w = weight[:, span].double()
        return w if lost is None else w + lost[:, span].double()

    coefficient, rho = _conditioning(group, grad, weights, spans, coefficient)
    low = torch.empty((p.shape[0], grad.shape[1]), dtype=torch.float32, device=param.device)
    for span in spans:
        g = grad[:, span].float()
        ok = features.usable(g)
        g = torch.where(ok, g, 0.0)
        if group["orthograd"]:
            g = torch.where(ok, (g.double() - rho * weights(span)).float(), 0.0)
        torch.matmul(p, g, out=low[:, span])
        low[:, span].masked_fill_(~ok.any(dim=0), torch.nan)
    return low.mul_(coefficient)


def _conditioning(
    group: dict[str, Any],
    grad: Tensor,
    weights: Callable[[slice], Tensor],
    spans: list[slice],
    coefficient: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(c, rho), 0-d: the projected gradient is c (g - rho w).

    As `features.clipped` and `features.orthogonal`, with sums over all spans."""
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
