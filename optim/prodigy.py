"""Prodigy: Adam or Lion that finds its learning rate, from how far the weights have moved.

d, a lower estimate of the distance to the solution, multiplies the learning rate.  It is one number
for all parameters, so a step uses the d of the steps before it, and updates it once, at the end of
`step()`: each parameter keeps its own share of the two sums whose ratio is the estimate
(`optim.reference.travelled`), and the shares are added in the parameters' order, regardless of the
order in which they were stepped.  A parameter without a gradient keeps its share.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from optim import reference
from optim.codecs import Bf16, Codec, Dense, Exact, stored
from optim.features import Features, wide
from optim.fused import FusedOptimizer
from optim.options import learning_rate
from optim.share import Share

_LOWEST_LR = 0.1  # a lower lr is taken for another optimizer's, set by mistake


class DistanceAdapted(FusedOptimizer):
    """What the optimizers below have in common: d and its estimate.

    `group["d"]` of every group is the same 0-d tensor, on the parameters' device, in fp64 if that
    has it; `group["d_max"]` is the largest estimate so far.  No step reads them on the host.
    """

    common: ClassVar[tuple[str, ...]] = ("d0", "d_coef", "growth_rate", "slice_p")
    shared: ClassVar[tuple[str, ...]] = ("d", "d_max")
    _has_moved = False  # has a step learned anything since d was last estimated?

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `FusedOptimizer.add_param_group`; the group shares d with the others, and leaves that
        of an optimizer whose group it was."""
        if isinstance(param_group, dict):
            theirs = {name for name in self.shared if isinstance(param_group.get(name), Tensor)}
            if theirs:  # the dict is that optimizer's
                param_group = {k: x for k, x in param_group.items() if k not in theirs}
        super().add_param_group(param_group)
        self._complete()

    def _complete(self) -> None:
        super()._complete()
        for name in self.shared:
            known = next((group[name] for group in self.param_groups if name in group), None)
            if known is None:
                first = self.param_groups[0]
                params = first["params"]
                device = params[0].device if params else torch.device("cpu")
                known = torch.tensor(first["d0"], dtype=wide(device), device=device)
            for group in self.param_groups:
                group[name] = known

    def idle_options(self) -> list[str]:
        """As `FusedOptimizer.idle_options`, and a line for an lr too low to find d with."""
        low = [group["lr"] for group in self.param_groups if 0 < float(group["lr"]) < _LOWEST_LR]
        return super().idle_options() + [
            f"lr={lr:g} multiplies the rate that is found, and with less than {_LOWEST_LR} hardly "
            "anything is found; leave lr at 1 and let a schedule scale it"
            for lr in sorted({*map(float, low)})
        ]

    def statistics(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        """How a parameter's data for the estimate is stored: every `slice_p`-th initial weight, and
        the sum of the gradients of these.  In bf16 the sum needs stochastic rounding: it decays by
        less than half a spacing a step."""
        shape = (-(-param.numel() // group["slice_p"]),)
        return {
            "start": Exact(shape, param.dtype),
            "grad_sum": Dense(shape) if param.dtype == torch.float32 else Bf16(shape),
            "numerator": Exact((), wide(param.device)),
            "denominator": Exact((), wide(param.device)),
        }

    def compensates(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Also for fp16 weights, which have no stochastic rounding: rounded to nearest, a step of
        d0 does not move them, and d learns nothing from weights that do not move."""
        unbiased = group["rounding"] == "stochastic" and param.dtype == torch.float16
        return unbiased or super().compensates(param, group)

    def end_step(self) -> None:
        """Update d: Mishchenko & Defazio 2023 (arXiv 2306.06101), Alg. 4, d_hat and d, with
        prodigyopt's `growth_rate`.  Where nothing was learned since the last update (no gradient,
        or lr 0), it stays."""
        if not self._has_moved:
            return
        self._has_moved = False
        states = [state for _, _, state in self._allocated()]
        first = states[0]["numerator"]
        numerator, denominator = (
            torch.stack([state[name].to(first) for state in states]).sum()
            for name in ("numerator", "denominator")
        )
        group = self.param_groups[0]
        if group["d"].device != first.device:  # the weights were moved before the first step
            for name in self.shared:
                moved = group[name].to(first)
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
        self._has_moved = False  # the saved d includes the saved sums, or the next one will

    def _step(self, share: Share) -> None:
        super()._step(share)
        self._has_moved = self._has_moved or any(map(_may_learn, share.groups))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_has_moved": self._has_moved}


def _may_learn(group: dict[str, Any]) -> bool:
    """Whether a step changes the sums that d comes from: lr is not 0, as far as that is known
    without waiting for a device."""
    lr = group["lr"]
    return (isinstance(lr, Tensor) and lr.device.type != "cpu") or learning_rate(lr) > 0


class Prodigy(DistanceAdapted):
    """AdamW that finds its rate (Prodigy); both moments in fp32, and 1/11 of weights and sums.

    State: 8.36 bytes a parameter for bf16 weights, 8.73 for fp32.

    Args:
        params: parameters or parameter groups.
        lr: multiplies d; leave it at 1 and let a schedule scale it.  Each group has its own: it
            scales the group's steps and, equally, its share of both sums that d comes from.  While
            it is 0, the group's weights, averages and share stay unchanged.
        betas: decay of the averages of the gradient and of its square.
        beta3: decay of the sums that d comes from; None is the square root of the second beta.
        d0: d before the first step, below any sensible one.
        d_coef: multiplies the estimate of d; the way to tune the method, 0.5 to 2.
        growth_rate: d may become at most this many times larger in a step; inf does not limit it.
        safeguard_warmup: leave lr out of the denominator of d, so that a warm-up does not inflate
            the estimate.
        slice_p: d comes from every slice_p-th element of each parameter; 1 takes all.
        bias_correction: correct both moments as Adam does; the step is then longer, and so are the
            sums' terms.  It counts all steps, also those with lr 0.
        eps: d * eps is added to sqrt(v).
        atan2: 4/pi atan2(m, sqrt v) in place of m / (sqrt v + d eps): bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - d * lr * weight_decay.
        features: options of every optimizer, `optim.features.Features`.

    fp16 weights keep their rounding error, in 2 more bytes a parameter, unless rounding="nearest":
    then they may never move, and neither may d.

    All groups share d, and so d0, d_coef, growth_rate and slice_p.  d depends on the parameters
    that the optimizer has: where ZeRO-1 (ZeroRedundancyOptimizer) gives each process a share of
    them, each finds another d, and the result depends on the number of processes.  Under DDP every
    process has them all, and all find the same d.

    prodigyopt 1.1.2 updates d before the weights and uses the new one only in d * eps; this uses
    one d for the whole step.  It also does not count leading steps with lr 0 for its
    bias correction.  All else is equal.

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


class ProdigyFactored(Prodigy):
    """Prodigy with both moments as rank-1 factors, the first with one sign bit an element (SMMF).

    State: 0.50 bytes a parameter for bf16 weights.  Arguments are `Prodigy`'s.

    Source: `Prodigy`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}


class LionProdigy(DistanceAdapted):
    """Lion that finds its rate (Prodigy); its momentum in fp32, and 1/11 of weights and sums.

    Every element moves by exactly d * lr.  State: 4.36 bytes a parameter for bf16 weights, 4.73 for
    fp32.

    Args:
        params: parameters or parameter groups.
        lr: multiplies d; as in `Prodigy`.
        betas: interpolation between momentum and gradient for the update, and decay of the
            momentum.
        beta3: decay of the sums that d comes from; None is the square root of the second beta.
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
