"""Prodigy: Adam or Lion that finds its learning rate, from how far the weights have come.

d, a lower estimate of the distance to the solution, multiplies the learning rate.  It is one number
for all parameters, so a step uses the d that the steps before it determined, and moves it once, at
the end of `step()`: each parameter keeps its own share of the two sums whose ratio is the estimate
(`optim.reference.travelled`), and they are added in the parameters' order, whichever way and in
whichever order the parameters were stepped.  A parameter without a gradient keeps its share.
"""

import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from optim import reference
from optim.codecs import Bf16, Codec, Dense, Exact, stored
from optim.features import Features
from optim.fused import FusedOptimizer
from optim.share import Share

_LOWEST_LR = 0.1  # of a group, below which it is taken for another optimizer's rate


class DistanceAdapted(FusedOptimizer):
    """What the optimizers below have in common: d and its estimate.

    `group["d"]` of every group is the one 0-d fp64 tensor with d, on the parameters' device;
    `group["d_max"]` is the largest estimate so far.  No step reads them on the host.
    """

    common: ClassVar[tuple[str, ...]] = ("d0", "d_coef", "growth_rate", "slice_p")
    shared: ClassVar[tuple[str, ...]] = ("d", "d_max")
    _has_moved = False  # since d was last estimated

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `FusedOptimizer.add_param_group`; the group takes part in the one d."""
        super().add_param_group(param_group)
        first, last = self.param_groups[0], self.param_groups[-1]
        device = last["params"][0].device if last["params"] else "cpu"
        for name in self.shared:
            fresh = torch.tensor(last["d0"], dtype=torch.float64, device=device)
            last[name] = first.get(name, fresh)

    def idle_options(self) -> list[str]:
        """As `FusedOptimizer.idle_options`; and a rate with which d finds nothing."""
        low = [group["lr"] for group in self.param_groups if 0 < float(group["lr"]) < _LOWEST_LR]
        return super().idle_options() + [
            f"lr={lr:g} multiplies the rate that is found, and with less than {_LOWEST_LR} hardly "
            "anything is found; leave lr at 1 and let a schedule scale it"
            for lr in sorted({*map(float, low)})
        ]

    def statistics(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How what the estimate needs of a parameter is stored: every `slice_p`-th weight as it was
        at the start, and the sum of such gradients, which bf16 holds only with stochastic rounding:
        it decays by less than half a spacing a step."""
        shape = (-(-param.numel() // group["slice_p"]),)
        return {
            "start": Exact(shape, param.dtype),
            "grad_sum": Dense(shape) if param.dtype == torch.float32 else Bf16(shape),
            "numerator": Exact((), torch.float64),
            "denominator": Exact((), torch.float64),
        }

    def compensates(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Of fp16 weights too, for which there is no stochastic rounding: to the nearest, a step of
        d0 leaves them where they are, and from weights that stay d learns nothing."""
        unbiased = group["rounding"] == "stochastic" and param.dtype == torch.float16
        return unbiased or super().compensates(param, group)

    def rate(self, h: SimpleNamespace) -> Tensor:
        """d lr."""
        return h.d * h.lr

    def end_step(self) -> None:
        """Move d: Mishchenko & Defazio 2023 (arXiv 2306.06101), Alg. 4, d_hat and d, with
        prodigyopt's `growth_rate`.  Without any gradient since the last time, it stays."""
        if not self._has_moved:
            return
        self._has_moved = False
        states = [self.state[param] for _, _, param in self._places() if param in self.state]
        device = states[0]["numerator"].device
        numerator, denominator = (
            torch.stack([state[name].to(device) for state in states]).sum()
            for name in ("numerator", "denominator")
        )
        group = self.param_groups[0]
        if group["d"].device != device:  # the weights were moved before the first step
            for name in self.shared:
                moved = group[name].to(device)
                for each in self.param_groups:
                    each[name] = moved
        d, d_max = group["d"], group["d_max"]
        estimate = group["d_coef"] * numerator / denominator
        known = (denominator > 0) & estimate.isfinite()
        free = torch.where(d == group["d0"], torch.maximum(d, estimate), d)  # the first is not held
        largest = torch.maximum(d_max, estimate)
        d.copy_(torch.where(known, torch.minimum(largest, free * group["growth_rate"]), d))
        d_max.copy_(torch.where(known, largest, d_max))

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        super()._take_over(state_dict)
        self._has_moved = False  # the sums are those that the saved d came from, or wait for it

    def _step(self, places: Share) -> None:
        super()._step(places)
        self._has_moved = self._has_moved or bool(places)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_has_moved": self._has_moved}


class Prodigy(DistanceAdapted):
    """AdamW that finds its rate (Prodigy); both moments in fp32, and 1/11 of weights and sums.

    State: 8.36 bytes a parameter for bf16 weights, 8.73 for fp32.

    Args:
        params: parameters or parameter groups.
        lr: multiplies d; leave it at 1 and let a schedule scale it.  Each group has its own: it
            scales the group's steps and, as much, its share of both sums that d comes from.  While
            it is 0 the group stays, and so do its averages and its share.
        betas: decay of the averages of the gradient and of its square.
        beta3: decay of the sums that d comes from; none is the square root of the second beta.
        d0: d before the first step, below any sensible one.
        d_coef: multiplies the estimate of d; the way to tune the method, 0.5 to 2.
        growth_rate: d may become at most this many times larger in a step; inf does not limit it.
        safeguard_warmup: leave lr out of the denominator of d, so that a warm-up does not inflate
            the estimate.
        slice_p: d comes from every slice_p-th element of each parameter; 1 takes all.
        bias_correction: correct both moments as Adam does; the step is then longer, and so are the
            sums' terms.
        eps: d * eps is added to sqrt(v).
        atan2: 4/pi atan2(m, sqrt v) in place of m / (sqrt v + d eps): bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - d * lr * weight_decay.
        features: options of every optimizer, `optim.features.Features`.

    Weights in fp16 keep the error of their rounding, in 2 more bytes a parameter, unless they are
    written to the nearest: then they may never leave where they start, and neither does d.

    All groups share d, and so d0, d_coef, growth_rate and slice_p.  d is of the parameters that the
    optimizer has: where ZeRO-1 (ZeroRedundancyOptimizer) gives each process a share of them, each
    finds another d, and the result depends on the number of processes.  Under DDP, where each
    process has them all, all find the same.

    Against prodigyopt 1.1.2, which moves d before the update and uses the new one in d * eps alone,
    this uses one d for the whole step; all else is equal.

    Source: Mishchenko & Defazio 2023 (arXiv 2306.06101), Alg. 4.
    """

    rule = staticmethod(reference.prodigy)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        safeguard_warmup: bool = False,
        slice_p: int = 11,
        bias_correction: bool = False,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        atan2: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        moments = stored(param.shape, group, "exp_avg", square="exp_avg_sq")
        return moments | self.statistics(param, group)

    def rate(self, h: SimpleNamespace) -> Tensor:
        """d lr, times Adam's bias correction where it is wanted."""
        beta1, beta2 = h.betas
        correction = (1 - beta2**h.t) ** 0.5 / (1 - beta1**h.t) if h.bias_correction else 1.0
        return h.d * (h.lr * correction)


class ProdigyFactored(Prodigy):
    """Prodigy with both moments as rank-1 factors, the first with one sign bit an element (SMMF).

    State: 0.50 bytes a parameter for bf16 weights.  Arguments are `Prodigy`'s.

    Source: `Prodigy`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    storage = "factored"


class LionProdigy(DistanceAdapted):
    """Lion that finds its rate (Prodigy); its momentum in fp32, and 1/11 of weights and sums.

    Every element moves by exactly d * lr.  State: 4.36 bytes a parameter for bf16 weights, 4.73 for
    fp32.

    Args:
        params: parameters or parameter groups.
        lr: multiplies d; as in `Prodigy`.
        betas: interpolation between momentum and gradient for the update, and decay of the
            momentum.
        beta3: decay of the sums that d comes from; none is the square root of the second beta.
        d0: d before the first step, below any sensible one.
        d_coef: multiplies the estimate of d.
        growth_rate: d may become at most this many times larger in a step; inf does not limit it.
        safeguard_warmup: leave lr out of the denominator of d.
        slice_p: d comes from every slice_p-th element of each parameter; 1 takes all.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - d * lr * weight_decay.
        features: options of every optimizer, `optim.features.Features`.

    fp16 weights, and d under ZeRO-1, are as in `Prodigy`.

    The gradient is multiplied by d in the momentum and in the update alike.  (adv_optm 0.1.4 does
    so in the momentum only, which makes the momentum vanish beside the gradient while d is small.)

    Source: Chen et al. 2023 (arXiv 2302.06675), Alg. 2; Mishchenko & Defazio 2023 (arXiv
    2306.06101), Alg. 4.
    """

    rule = staticmethod(reference.lion_prodigy)
    refuses: ClassVar[dict[str, str]] = {"growth_limit": "the norm of a sign does not grow"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        beta3: float | None = None,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        safeguard_warmup: bool = False,
        slice_p: int = 11,
        weight_decay: float = 0.01,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def bounds_updates(cls, group: Mapping[str, Any]) -> str:
        return "uses the sign of an average of gradients, whose size hardly matters"

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg") | self.statistics(param, group)
