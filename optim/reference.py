"""The family in plain PyTorch: what every optimizer computes, in eight to fifteen lines a rule.

This file is the specification.  A rule is a pure function of one parameter's fp32 values:

    rule(h, w, g, s) -> (u, s')      w, g, u (*) like the parameter;  s {name: moment (*)} -> the
    moments to store

`h` holds the group's options, `t` (this step's number, from 1) and `codec` (how each moment is
stored).  The caller decays the weights, subtracts `lr * u` and stores s'; u = None leaves the
weights alone.  Rules know nothing of storage, rounding or loops.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

Moments = dict[str, Tensor]


def sgd(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> tuple[Tensor | None, Moments]:
    """Sutskever et al. 2013, as torch.optim.SGD without dampening writes it: m <- mu m + g."""
    if h.momentum == 0:
        return g, {}
    m = h.momentum * s["exp_avg"] + g
    return (g + h.momentum * m if h.nesterov else m), {"exp_avg": m}


def adam(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> tuple[Tensor | None, Moments]:
    """Kingma & Ba 2014, Alg. 1; with the caller's decoupled decay it is AdamW (Loshchilov & Hutter
    2017, Alg. 2)."""
    beta1, beta2 = h.betas
    m = torch.lerp(s["exp_avg"], g, 1 - beta1)
    v = torch.lerp(s["exp_avg_sq"], g.square(), 1 - beta2)
    denominator = (v / (1 - beta2**h.t)).sqrt() + h.eps
    return m / (1 - beta1**h.t) / denominator, {"exp_avg": m, "exp_avg_sq": v}


def adopt(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> tuple[Tensor | None, Moments]:
    """Taniguchi et al. 2024 (arXiv 2411.02853), Alg. 2: normalise by the *previous* v, clip at
    t^(1/4), then average.

    The first call only initialises v.
    """
    beta1, beta2 = h.betas
    if h.t == 1:
        return None, {"exp_avg": s["exp_avg"], "exp_avg_sq": g.square()}
    limit = (h.t - 1) ** 0.25
    normalised = (g / s["exp_avg_sq"].sqrt().clamp_min(h.eps)).clamp(-limit, limit)
    m = torch.lerp(s["exp_avg"], normalised, 1 - beta1)
    return m, {"exp_avg": m, "exp_avg_sq": torch.lerp(s["exp_avg_sq"], g.square(), 1 - beta2)}


def adopt_factored(
    h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments
) -> tuple[Tensor | None, Moments]:
    """`adopt` for a factored first moment, which gives an element without gradients a share of its
    neighbours' momentum.

    Park & Lee 2024 (SMMF) move such an element; here it stays where it is.
    """
    u, moments = adopt(h, w, g, s)
    return (None if u is None else torch.where(g == 0, 0.0, u)), moments


def lion(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> tuple[Tensor | None, Moments]:
    """Chen et al. 2023 (arXiv 2302.06675), Alg. 2."""
    beta1, beta2 = h.betas
    u = torch.lerp(s["exp_avg"], g, 1 - beta1).sign()
    return u, {"exp_avg": torch.lerp(s["exp_avg"], g, 1 - beta2)}


def adafactor(
    h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments
) -> tuple[Tensor | None, Moments]:
    """Shazeer & Stern 2018 (arXiv 1804.04235), Alg. 4 and 5, with a fixed beta2 (bias-corrected) or
    their 1 - t^decay.

    eps[0] is added where v is used and not where it is averaged, so that a row without gradients
    stays exactly zero.
    """
    beta2 = h.beta2 if h.beta2 is not None else 1 - h.t**h.beta2_decay
    v = h.codec["exp_avg_sq"].project(torch.lerp(s["exp_avg_sq"], g.square(), 1 - beta2))
    correction = 1 - beta2**h.t if h.beta2 is not None else 1.0
    u = g * (v / correction + h.eps[0]).rsqrt()
    if h.clip_threshold is not None:
        u = u / (rms(u) / h.clip_threshold).clamp_min(1.0)
    moments = {"exp_avg_sq": v}
    if h.beta1 is not None:
        moments["exp_avg"] = torch.lerp(s["exp_avg"], u, 1 - h.beta1)
        u = moments["exp_avg"] / (1 - h.beta1**h.t)
    if h.relative_step:
        u = u * min(1.0, h.t**-0.5 / h.lr) if h.lr > 0 else u
    if h.scale_parameter:
        u = u * rms(w).clamp_min(h.eps[1])
    return u, moments


def rms(x: Tensor) -> Tensor:
    """Root mean square over all elements: x (*) -> 0-d.  An empty tensor has 0."""
    return x.square().mean().sqrt() if x.numel() else x.new_zeros(())
