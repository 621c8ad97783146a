"""The family in plain PyTorch: what every optimizer computes, in eight to fifteen lines per rule.

This file is the specification.  A rule is a pure function of one parameter's fp32 values:

    rule(h, w, g, s) -> (u, s')    w, g, u (*) like the parameter;  s, s' {name: moment}

A moment has the shape of its codec: the parameter's, or that of a scalar, a projection or a sample;
one that s' lacks stays unchanged.  `h` holds the group's options, `t` (this step's number, from 1),
`index` (the parameter's), `usable` (which elements of g count; g is 0 elsewhere), `codec` (how each
moment is stored) and `rate` (what the function of that name returns for it).  The
caller decays the weights, subtracts `rate * u` and stores s'; u = None leaves the weights alone.
Rules know nothing of storage, rounding or loops.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.codecs import Codec, Factored, FactoredSign
from optim.features import length, limited, wide
from optim.newton_schulz import gain as orthogonal_gain
from optim.newton_schulz import is_matrix, orthogonalized
from optim.projection import channels, gain, projected_shape, projection, unchanneled

Moments = dict[str, Tensor]
Step = tuple[Tensor | None, Moments]


def sgd(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Sutskever et al. 2013, as torch.optim.SGD without dampening writes it: m <- mu m + g."""
    if "exp_avg" not in s:  # no momentum
        return grown(h, g, s, {})
    m = torch.where(h.usable, h.momentum * s["exp_avg"] + g, s["exp_avg"])
    return grown(h, g + h.momentum * m if h.nesterov else m, s, {"exp_avg": m})


def adam(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Kingma & Ba 2014, Alg. 1; with the caller's decoupled decay it is AdamW (Loshchilov & Hutter
    2017, Alg. 2)."""
    beta1, beta2 = h.betas[:2]
    m = ema(h, s["exp_avg"], g, beta1)
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    numerator, slow = mixed(h, m / (1 - beta1**h.t), g, s)
    root = (v / (1 - beta2**h.t)).sqrt()
    u = arctan(numerator, root) if h.atan2 else numerator / (root + h.eps)
    return grown(h, u, s, {"exp_avg": m, "exp_avg_sq": v} | slow)


def schedule_free(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Defazio et al. 2024 (arXiv 2405.15682), Alg. 1, with Adam's second moment: z steps by the
    gradient at y, x is the mean of all z, and y = (1 - beta1) z + beta1 x.

    The weights are y, and the moment is the gap y - z, by which z and x are known.  While lr is 0
    nothing moves, x neither.
    """
    return averaging(h, w, g, s, 1 / h.t if h.lr > 1e-20 else 0.0)


def prodigy_schedule_free(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Schedule-Free with the rate d lr that Prodigy finds.

    d comes from y, where the gradients are taken: for a convex loss no <g, y - solution> is
    negative, whence the estimate is at most the distance to the solution (Mishchenko & Defazio
    2023, section 3).  A z weighs (d lr)^2 in x: those from before d was found hardly count.
    """
    weight = h.rate.to(s["weight_sum"]) ** 2
    total = s["weight_sum"] + weight
    share = torch.where(total > 0, weight / total, 0.0).float()
    u, moments = averaging(h, w, g, s, share)
    total = torch.where(h.usable.any(), total, s["weight_sum"])
    return u, moments | travelled(h, w, g, s) | {"weight_sum": total}


def adopt(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Taniguchi et al. 2024 (arXiv 2411.02853), Alg. 2: normalise by the *previous* v, clip at
    t^(1/4), then average.  The first call only initialises v."""
    beta1, beta2 = h.betas[:2]
    if h.t == 1:
        return None, s | {"exp_avg_sq": g.square()}
    root, limit = s["exp_avg_sq"].sqrt(), (h.t - 1) ** 0.25
    n = arctan(g, root) if h.atan2 else (g / root.clamp_min(h.eps)).clamp(-limit, limit)
    m = ema(h, s["exp_avg"], n, beta1)
    numerator, slow = mixed(h, m, n, s)
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    return grown(h, numerator, s, {"exp_avg": m, "exp_avg_sq": v} | slow)


def lion(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Chen et al. 2023 (arXiv 2302.06675), Alg. 2."""
    beta1, beta2 = h.betas
    u = torch.lerp(s["exp_avg"], g, 1 - beta1).sign()
    return u, {"exp_avg": ema(h, s["exp_avg"], g, beta2)}


def prodigy(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Mishchenko & Defazio 2023 (arXiv 2306.06101), Alg. 4: Adam on d g, with steps of d lr.  While
    lr is 0 the averages do not change, as in prodigyopt."""
    beta1, beta2 = h.betas if h.lr > 0 else (1.0, 1.0)
    m = ema(h, s["exp_avg"], h.d * g, beta1)
    v = ema(h, s["exp_avg_sq"], (h.d * g).square(), beta2)
    u = arctan(m, v.sqrt()) if h.atan2 else m / (v.sqrt() + h.d * h.eps)
    return grown(h, u, s, {"exp_avg": m, "exp_avg_sq": v} | travelled(h, w, g, s))


def lion_prodigy(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Lion on d g, with steps of d lr: both averages are of d g, so that momentum and gradient keep
    their proportion while d grows.  While lr is 0 they do not change."""
    beta1, beta2 = h.betas if h.lr > 0 else (1.0, 1.0)
    u = torch.lerp(s["exp_avg"], h.d * g, 1 - beta1).sign()
    return u, {"exp_avg": ema(h, s["exp_avg"], h.d * g, beta2)} | travelled(h, w, g, s)


def sophia(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Liu et al. 2023 (arXiv 2305.14342), Alg. 3, lines 6 and 14: the momentum over the curvature,
    each element clipped at 1."""
    m = ema(h, s["exp_avg"], g, h.betas[0])
    u = (m / (h.rho * s["hessian"]).clamp_min(h.eps)).clamp(-1, 1)
    return grown(h, u, s, {"exp_avg": m})


def curved(h: SimpleNamespace, g: Tensor, s: Moments, scale: float) -> Moments:
    """The moment that an estimate of the curvature updates; g (*) is the sampled loss's gradient.

    Liu et al. 2023, Alg. 2 (Gauss-Newton-Bartlett) and Alg. 3, line 9: scale * g^2 is the estimate
    of the Gauss-Newton matrix's diagonal.
    """
    return {"hessian": ema(h, s["hessian"], scale * g.square(), h.betas[1])}


def adafactor(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Shazeer & Stern 2018 (arXiv 1804.04235), Alg. 4 and 5, with a fixed beta2 (bias-corrected) or
    their 1 - t^decay.

    The first moment averages the clipped update, as in the paper.
    """
    u, moments = normalized(h, g, s, h.eps[0])
    u, moments = grown(h, u, s, moments)
    u, moments = shortened(h, u, s, moments)
    u, moments = averaged(h, u, s, moments)
    if h.relative_step and h.lr > 0:
        u = u * min(1.0, h.t**-0.5 / h.lr)
    if h.scale_parameter:
        u = u * rms(w).clamp_min(h.eps[1])
    return u, moments


def came(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Luo et al. 2023 (CAME, arXiv 2307.02047), Alg. 2: Adafactor's clipped update, averaged, over
    the root of its instability, the factored average of (u - m)^2.

    As in the paper, no average is bias-corrected.  A tensor without an instability (a vector) is
    stepped by the average itself.
    """
    beta1, beta2, beta3 = h.betas
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    u = g / damped(h.codec["exp_avg_sq"], v, h.eps[0]).sqrt()
    u, moments = shortened(h, u, s, {"exp_avg_sq": v})
    m = moments["exp_avg"] = ema(h, s["exp_avg"], u, beta1)
    if "exp_avg_res" in s:
        moments["exp_avg_res"] = ema(h, s["exp_avg_res"], (u - m).square(), beta3)
        m = m / damped(h.codec["exp_avg_res"], moments["exp_avg_res"], h.eps[1]).sqrt()
    return grown(h, m, s, moments)


def apollo(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Zhu et al. 2024 (APOLLO, arXiv 2412.05270), Alg. 1: the gradient, scaled by Adam's step for
    its projection.  The growth limit only applies to scaled gradients, not to Adam's steps."""

    def step(h: SimpleNamespace, g: Tensor) -> Step:
        return adam(SimpleNamespace(**vars(h) | {"growth_limit": None}), w, g, s)

    if projected_shape(tuple(g.shape), h.rank) is None:
        return step(h, g)
    return rescaled(h, g, s, step)


def adafactor_apollo(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """As `apollo`, with Adafactor's second moment for the projection.

    With a projection, the clip applies to the scaled gradient, and the first moment averages the
    projection's step.
    """

    def low_step(h: SimpleNamespace, low: Tensor) -> tuple[Tensor, Moments]:
        u, moments = normalized(h, low, s, h.eps)
        return averaged(h, u, s, moments)

    if projected_shape(tuple(g.shape), h.rank) is not None:
        u, moments = rescaled(h, g, s, low_step)
        return shortened(h, u, s, moments)
    u, moments = normalized(h, g, s, h.eps)
    u, moments = shortened(h, u, s, moments)
    return averaged(h, u, s, moments)


def muon(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Jordan et al. 2024 (Muon): SGD's step of a matrix, orthogonalized; other tensors have Adam's.

    Where momentum has sign bits, which have no zero, an element without a gradient has no step.
    """
    if not is_matrix(tuple(g.shape)):
        return adam(SimpleNamespace(**vars(h) | {"atan2": False}), w, g, s)
    u, moments = sgd(SimpleNamespace(**vars(h) | {"growth_limit": None}), w, g, s)
    assert u is not None
    has_signs = any(isinstance(codec, FactoredSign) for codec in h.codec.values())
    moves = h.usable & (g != 0) if has_signs else h.usable
    u = orthogonalized(torch.where(moves, u, 0.0).flatten(1), h.ns_steps).float().reshape(g.shape)
    u = torch.where(moves, u * orthogonal_gain(h.adjust_lr_fn, tuple(g.shape)), 0.0)
    return grown(h, u, s, moments)


def rate(h: SimpleNamespace) -> float | Tensor:
    """The factor of updates and decay: lr, times d where that is found, and then Adam's bias
    correction if it is wanted."""
    if not hasattr(h, "d"):
        return h.lr
    beta1, beta2 = h.betas
    corrects = getattr(h, "bias_correction", False)
    correction = (1 - beta2**h.t) ** 0.5 / (1 - beta1**h.t) if corrects else 1.0
    return h.d * (h.lr * correction)


def rescaled(
    h: SimpleNamespace,
    g: Tensor,
    s: Moments,
    low_step: Callable[[SimpleNamespace, Tensor], Step],
) -> tuple[Tensor, Moments]:
    """A matrix gradient, scaled by the norms of `low_step(h, P g)` relative to those of P g, after
    the growth limiter: g, u (*), P g (r, L).

    Zhu et al. 2024, Alg. 1: u = sqrt(scale) |N| / |P g| g, with norms of channels or of the tensor.
    With `residual` only what lies outside the span of P is scaled (and limited), and N itself is
    mapped back: Chen et al. 2024 (Fira, arXiv 2410.01623).  The factor of a channel whose
    projection is zero is 0; a channel without a usable element keeps its moments and has no step.
    """
    matrix, shape = channels(g), tuple(g.shape)
    p = projection(h, matrix.shape[0], g.device)
    low, share = p @ matrix, h.rank / matrix.shape[0]
    usable = channels(h.usable).any(dim=0).expand_as(low)
    n, moments = low_step(SimpleNamespace(**vars(h) | {"usable": usable}), low)
    assert n is not None
    n = torch.where(usable, n, 0.0)
    if any(isinstance(codec, FactoredSign) for codec in h.codec.values()):
        n = torch.where(low == 0, 0.0, n)  # sign bits have no zero
    length, low_length = (norms(x, 0 if h.scaling == "channel" else None) for x in (n, low))
    factor = torch.where(low_length > 1e-30, length / low_length, 0.0).float()
    factor = factor * gain(h, matrix.shape[0])
    rest = matrix - share * (p.t() @ low) if h.residual else matrix
    u, moments = grown(h, unchanneled(factor * rest, shape), s, moments)
    if h.residual:
        u = u + unchanneled(gain(h, matrix.shape[0]) * share * (p.t() @ n), shape)
    return u, moments


def travelled(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Moments:
    """One parameter's contribution to the distance d, from every `slice_p`-th of its elements (S of
    them): the moments

        start (S)  the weights before the first step
        grad_sum (S) <- beta3 grad_sum + d/d0 rate g
        numerator 0-d wide <- beta3 numerator + d/d0 rate <g, start - w>
        denominator 0-d wide <- |grad_sum|_1

    Mishchenko & Defazio 2023, Alg. 4, the lines of r and s.  Factors are d/d0, not d, so that the
    sums do not underflow (their remark on implementation).  `safeguard_warmup` replaces the rate in
    grad_sum by d.  Where lr = 0, or no element of the gradient is usable, the sums do not change:
    nothing moves, and nothing can be learned.
    """
    now, grad, usable = (x.flatten()[:: h.slice_p] for x in (w, g, h.usable))
    start = {"start": now} if h.t == 1 else {}
    if h.lr == 0:
        return start
    beta3 = h.beta3 if h.beta3 is not None else h.betas[1] ** 0.5
    in_wide = wide(w.device)
    way = start.get("start", s["start"]).to(in_wide) - now.to(in_wide)
    weight = h.d / h.d0 * (h.d if h.safeguard_warmup else h.rate)
    total = torch.where(usable, beta3 * s["grad_sum"] + weight * grad, s["grad_sum"])
    progress = h.d / h.d0 * h.rate * summed(grad.to(in_wide) * way)
    learns = h.usable.any()
    numerator, denominator = beta3 * s["numerator"] + progress, summed(total.abs())
    return start | {
        "grad_sum": total,
        "numerator": torch.where(learns, numerator, s["numerator"]),
        "denominator": torch.where(learns, denominator, s["denominator"]),
    }


def averaging(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments, share: float | Tensor) -> Step:
    """Schedule-Free's step: z moves by -rate n, and then x by share (z - x).

    Weight decay, at y, is part of n.
    """
    beta1, beta2 = h.betas
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    n = g / ((v / (1 - beta2**h.t)).sqrt() + h.eps) + h.weight_decay * w
    of_x = beta1 * (1 - share)
    gap = (1 - share) * s["gap"] + of_x * h.rate * n
    u = (1 - of_x) * n + share / (h.rate + 1e-30) * s["gap"]
    u = u - h.weight_decay * w  # by which the caller decays y
    return u, {"gap": torch.where(h.usable, gap, s["gap"]), "exp_avg_sq": v}


def ema(h: SimpleNamespace, average: Tensor, x: Tensor, beta: float) -> Tensor:
    """beta * average + (1 - beta) * x; an element without a usable gradient keeps its average."""
    return torch.where(h.usable, torch.lerp(average, x, 1 - beta), average)


def mixed(h: SimpleNamespace, fast: Tensor, x: Tensor, s: Moments) -> tuple[Tensor, Moments]:
    """fast + alpha_t * (a slow average of x), if there is one: -> the sum, the slow moment.

    Pagliardini et al. 2024 (AdEMAMix, arXiv 2409.03137), Alg. 1: alpha grows linearly and
    beta3's half-life grows linearly over `warmup_steps`.  The slow average is not bias-corrected.
    """
    if "exp_avg_slow" not in s:
        return fast, {}
    progress, beta3 = min(h.t / h.warmup_steps, 1.0) if h.warmup_steps else 1.0, h.betas[2]
    if progress < 1 and h.betas[0] > 0 and beta3 > 0:
        log1, log3 = math.log(h.betas[0]), math.log(beta3)
        beta3 = min(math.exp(log1 * log3 / ((1 - progress) * log3 + progress * log1)), beta3)
    slow = ema(h, s["exp_avg_slow"], x, beta3)
    return fast + h.alpha * progress * slow, {"exp_avg_slow": slow}


def grown(h: SimpleNamespace, u: Tensor, s: Moments, moments: Moments) -> tuple[Tensor, Moments]:
    """u after the growth limiter, if there is one, and the moments with the norm it remembers."""
    if h.growth_limit is None:
        return u, moments
    u = torch.where(h.usable, u, 0.0)
    u, norm = limited(h, u, s["update_norm"])
    return u, moments | {"update_norm": norm}


def normalized(h: SimpleNamespace, g: Tensor, s: Moments, eps: float) -> tuple[Tensor, Moments]:
    """g over the root of its second moment, and that moment: Shazeer & Stern 2018, Alg. 4, lines
    4-7."""
    beta2 = h.beta2 if h.beta2 is not None else 1 - h.t**h.beta2_decay
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    correction = 1 - beta2**h.t if h.beta2 is not None else 1.0
    divisor = damped(h.codec["exp_avg_sq"], v / correction, eps).sqrt()
    return g / divisor, {"exp_avg_sq": v}


def averaged(h: SimpleNamespace, u: Tensor, s: Moments, moments: Moments) -> tuple[Tensor, Moments]:
    """The bias-corrected average of u if there is a first moment, and the moments with it."""
    if h.beta1 is None:
        return u, moments
    m = ema(h, s["exp_avg"], u, h.beta1)
    return m / (1 - h.beta1**h.t), moments | {"exp_avg": m}


def damped(codec: Codec, v: Tensor, eps: float) -> Tensor:
    """v as Adafactor divides by it: v (*) -> (*), with eps added, to its factors if it has any.

    Shazeer & Stern 2018, Alg. 4, lines 4-6, add eps to what is averaged; here it is added where the
    average is used, so that a row without gradients stays exactly zero.  In such a row eps^2 / mean
    would underflow: the smallest normal number is the floor.
    """
    if isinstance(codec, Factored):
        row, col = codec.means(v)
        v = codec.product(row + eps, col + eps)
    else:
        v = v + eps
    return v.clamp_min(2.0**-126)


def shortened(
    h: SimpleNamespace, u: Tensor, s: Moments, moments: Moments
) -> tuple[Tensor, Moments]:
    """u with an RMS of at most `clip_threshold`, and the moments with the RMS it had, if the next
    step needs it.

    Shazeer & Stern 2018, Alg. 4, line 8.  With clip_norm="lagged" the previous step's RMS is used
    instead of this one's; if there was none, or it was 0, nothing is clipped.
    """
    if h.clip_threshold is None:
        return u, moments
    now = rms(u)
    if "update_rms" in s:
        moments = moments | {"update_rms": now}
    return u / (s.get("update_rms", now) / h.clip_threshold).clamp_min(1.0), moments


def arctan(numerator: Tensor, root: Tensor) -> Tensor:
    """4/pi atan2(m, sqrt v): 1 where m = sqrt v, bounded by 2, no eps.

    Everett et al. 2024 (arXiv 2407.05872); both arguments bias-corrected.
    """
    return 4 / math.pi * torch.atan2(numerator, root)


def norms(x: Tensor, dim: int | None) -> Tensor:
    """Euclidean norms along a dimension, or of the whole: x (R, C) -> (1, C), (R, 1) or (1, 1), in
    the widest dtype."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x.device))


def summed(x: Tensor) -> Tensor:
    """The sum of all elements in the widest dtype: x (*) -> 0-d.  Rows of 1024 are summed first, so
    that the bits do not depend on the number of threads."""
    rows = F.pad(x.flatten().to(wide(x.device)), (0, -x.numel() % 1024)).view(-1, 1024)
    return rows.sum(dim=1).sum()


def rms(x: Tensor) -> Tensor:
    """Root mean square over all elements: x (*) -> 0-d.  An empty tensor has 0."""
    return (length(x) / max(x.numel(), 1) ** 0.5).float()
