"""The family in plain PyTorch: what every optimizer computes, in eight to fifteen lines a rule.

This file is the specification.  A rule is a pure function of one parameter's fp32 values:

    rule(h, w, g, s) -> (u, s')    w, g, u (*) like the parameter;  s, s' {name: moment (*)}

`h` holds the group's options, `t` (this step's number, from 1), `usable` (which elements of g
count; g is 0 elsewhere) and `codec` (how each moment is stored).  The caller decays the weights,
subtracts `lr * u` and stores s'; u = None leaves the weights alone.  Rules know nothing of storage,
rounding or loops.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from optim.codecs import Codec, Factored
from optim.features import limited

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


def adafactor(h: SimpleNamespace, w: Tensor, g: Tensor, s: Moments) -> Step:
    """Shazeer & Stern 2018 (arXiv 1804.04235), Alg. 4 and 5, with a fixed beta2 (bias-corrected) or
    their 1 - t^decay.

    The first moment is of the clipped update, as in the paper.
    """
    beta2 = h.beta2 if h.beta2 is not None else 1 - h.t**h.beta2_decay
    v = ema(h, s["exp_avg_sq"], g.square(), beta2)
    correction = 1 - beta2**h.t if h.beta2 is not None else 1.0
    divisor = damped(h.codec["exp_avg_sq"], v / correction, h.eps[0]).sqrt()
    u, moments = grown(h, g / divisor, s, {"exp_avg_sq": v})
    u, moments = shortened(h, u, s, moments)
    if h.beta1 is not None:
        moments["exp_avg"] = ema(h, s["exp_avg"], u, h.beta1)
        u = moments["exp_avg"] / (1 - h.beta1**h.t)
    if h.relative_step and h.lr > 0:
        u = u * min(1.0, h.t**-0.5 / h.lr)
    if h.scale_parameter:
        u = u * rms(w).clamp_min(h.eps[1])
    return u, moments


def ema(h: SimpleNamespace, average: Tensor, x: Tensor, beta: float) -> Tensor:
    """beta * average + (1 - beta) * x; an element without a usable gradient keeps its average."""
    return torch.where(h.usable, torch.lerp(average, x, 1 - beta), average)


def mixed(h: SimpleNamespace, fast: Tensor, x: Tensor, s: Moments) -> tuple[Tensor, Moments]:
    """fast + alpha_t * (a slow average of x), where there is one: -> the sum, the slow moment.

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
    """u under the growth limiter where there is one, and the moments with the norm it remembers."""
    if h.growth_limit is None:
        return u, moments
    u = torch.where(h.usable, u, 0.0)
    u, norm = limited(h, u, s["update_norm"])
    return u, moments | {"update_norm": norm}


def damped(codec: Codec, v: Tensor, eps: float) -> Tensor:
    """v as Adafactor divides by it: v (*) -> (*), with eps added, to its factors where it has some.

    Shazeer & Stern 2018, Alg. 4, lines 4-6, add eps to what is averaged; here it is added where the
    average is used, so that a row without gradients stays exactly zero.  There, eps^2 / mean would
    underflow: the smallest normal number is the floor.
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
    """u with an RMS of at most `clip_threshold`, and the moments with the RMS it had where the next
    step is to know it.

    Shazeer & Stern 2018, Alg. 4, line 8.  With clip_norm="lagged" the previous step's RMS
    is taken for this one's; where there was none, or it was 0, nothing is clipped.
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


def rms(x: Tensor) -> Tensor:
    """Root mean square over all elements, summed in fp64: x (*) -> 0-d.  An empty tensor has 0."""
    return (torch.linalg.vector_norm(x, dtype=torch.float64) / max(x.numel(), 1) ** 0.5).float()
