"""Schedule-Free AdamW: an average of the weights takes the place of a learning-rate schedule, and
with Prodigy's estimate no rate is chosen either."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from optim import reference
from optim.codecs import Codec, Exact, nonnegative, signed, smmf_view, split
from optim.features import Features, wide
from optim.fused import FusedOptimizer
from optim.prodigy import DistanceAdapted
from optim.share import Share

_PULLED = "an update also draws the weights towards their average, whatever the gradient"


class ScheduleFree(FusedOptimizer):
    """What the optimizers below have in common: the gap y - z as a moment, and
    `eval()` and `train()`, which put x or y into the model (`AdamWScheduleFree`).
    """

    refuses: ClassVar[dict[str, str]] = {
        "grams": _PULLED,
        "cautious": _PULLED,
        "growth_limit": _PULLED,
        "cautious_decay": _PULLED,
    }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # Saved with every state: which weights the model had.
        self.param_groups[-1].setdefault("train_mode", True)

    @classmethod
    def contradiction(cls, group: Mapping[str, Any]) -> str | None:
        if group["betas"][0] == 0:
            return (
                "cannot have betas[0]=0: its weights would be z, from which the average is not "
                "known; use betas=(0.9, ...)"
            )
        return super().contradiction(group)

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape, storage = tuple(param.shape), group["storage"]
        view = smmf_view(storage, shape, group["factor_1d"])
        # Signs and factors would not tell where the average is.
        gap = signed("8bit" if storage == "factored" else storage, shape, view)
        return {"gap": gap, "exp_avg_sq": nonnegative(storage, shape, view)}

    def eval(self) -> None:
        """Put the average into the model."""
        self._switch(is_training=False)

    def train(self) -> None:
        """Put the weights of the next gradient back, after `eval`."""
        self._switch(is_training=True)

    @torch.no_grad()
    def _switch(self, is_training: bool) -> None:
        """x = y + (1 - beta1) / beta1 (y - z)."""
        for group, param, state in self._allocated():
            if group.get("train_mode", True) != is_training:
                gap = self.moments(param, group)["gap"].decode(split(state, "gap"))
                share = 1 / group["betas"][0] - 1
                param.copy_(param.float() + (-share if is_training else share) * gap)
        for group in self.param_groups:
            group["train_mode"] = is_training

    def _step(self, share: Share) -> None:
        if not all(group.get("train_mode", True) for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: the model has the averaged weights; call the optimizer's "
                "train() before the next gradient"
            )
        super()._step(share)


class AdamWScheduleFree(ScheduleFree):
    """AdamW whose weights are averaged instead of its rate lowered (Schedule-Free); state in fp32.

    State: 8 bytes per parameter.

    While it trains, the weights are y, between the average x and a sequence z that AdamW steps
    without momentum; `eval()` puts x into the model, to be evaluated or saved, and `train()` puts y
    back (rounded to the weights' dtype).  The rate should be constant after a warm-up.  z is not
    stored: the state is the gap y - z, which needs less precision, and the second moment.

    Every z counts alike in the average, also those of a warm-up.

    Args:
        params: parameters or parameter groups.
        lr: step size; larger than AdamW's, as it is not lowered in the end.
        betas: how far y is from z to x, and the decay of the average of the gradient's square.
        eps: added to sqrt(v).
        weight_decay: decoupled decay; a step subtracts lr * weight_decay * y from z, and with it a
            share of that from y and x.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Defazio et al. 2024 (arXiv 2405.15682), Alg. 1.
    """

    rule = staticmethod(reference.schedule_free)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())


class AdamW8bitScheduleFree(AdamWScheduleFree):
    """Schedule-Free AdamW with its state in 8-bit codes, written with stochastic rounding.

    State: 2.02 bytes per parameter.  The gap sums over the whole run, and so does its rounding.  In
    thousands of noisy steps the average is less precise than with storage="bf16" (4 bytes), which
    is as good as fp32.  Arguments and source are `AdamWScheduleFree`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}


class AdamWFactoredScheduleFree(AdamWScheduleFree):
    """Schedule-Free AdamW with its gap in 8-bit codes and its second moment as rank-1 factors.

    State: 1.01 bytes per parameter.  Its average is as precise as `AdamW8bitScheduleFree`'s.
    Arguments are `AdamWScheduleFree`'s.

    Source: `AdamWScheduleFree`'s; Park & Lee 2024 (SMMF, arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}


class ProdigyScheduleFree(DistanceAdapted, ScheduleFree):
    """Schedule-Free AdamW that finds its rate (Prodigy): neither rate nor schedule; state in fp32.

    State: 8.36 bytes a parameter for bf16 weights, 8.73 for fp32.

    AdamW's steps of z have the rate d * lr, and each z weighs the square of its rate in the average
    x, so that those from before d was found hardly count.  `eval()` and `train()` are
    `AdamWScheduleFree`'s; no schedule is needed, nor a warm-up.

    d is `d_coef` times a lower estimate of the distance to the solution, from how far y has moved,
    as the gradients are taken at y.  z moves about twice as far, so `d_coef` is 2, where Prodigy
    has 1.

    Args:
        params: parameters or parameter groups.
        lr: multiplies d; leave it at 1.  Each group has its own, as in `Prodigy`; at 0 only the
            second moment goes on.
        betas: how far y is from z to x, and the decay of the average of the gradient's square.
        beta3: decay of the sums that d comes from; None is the square root of the second beta.
        d0: d before the first step, below any sensible one.
        d_coef: multiplies the estimate of d; the way to tune the method, 1 to 4.
        growth_rate: d may become at most this many times larger in a step; inf does not limit it.
        safeguard_warmup: leave lr out of the denominator of d, so that a warm-up does not inflate
            the estimate.
        slice_p: d comes from every slice_p-th element of each parameter; 1 takes all.
        eps: added to sqrt(v).
        weight_decay: decoupled decay; a step subtracts d * lr * weight_decay * y from z, and with
            it a share of that from y and x.
        features: options of every optimizer, `optim.features.Features`.

    All groups share d, and so d0, d_coef, growth_rate and slice_p.  fp16 weights, and d under
    ZeRO-1, are as in `Prodigy`.

    Sources: Defazio et al. 2024 (arXiv 2405.15682), Alg. 1; Mishchenko & Defazio 2023 (arXiv
    2306.06101), Alg. 4.
    """

    rule = staticmethod(reference.prodigy_schedule_free)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        d0: float = 1e-6,
        d_coef: float = 2.0,
        growth_rate: float = math.inf,
        safeguard_warmup: bool = False,
        slice_p: int = 11,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        total = {"weight_sum": Exact((), wide(param.device))}
        return super().moments(param, group) | self.statistics(param, group) | total


class ProdigyFactoredScheduleFree(ProdigyScheduleFree):
    """Schedule-Free Prodigy with its gap in 8-bit codes and its second moment as rank-1 factors.

    State: 1.38 bytes a parameter for bf16 weights.  After thousands of noisy steps its average is
    several times less precise than `ProdigyScheduleFree`'s with storage="bf16" (4.36 bytes), whose
    precision is fp32's.  Arguments are `ProdigyScheduleFree`'s.

    Sources: `ProdigyScheduleFree`'s; Park & Lee 2024 (SMMF, arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}
