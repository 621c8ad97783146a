"""Schedule-Free AdamW: an average of the weights takes the place of a learning-rate schedule."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from optim import reference
from optim.codecs import Codec, nonnegative, signed, smmf_view, split
from optim.features import Features
from optim.fused import FusedOptimizer
from optim.share import Share

_PULLED = "an update also draws the weights towards their average, whatever the gradient"


class AdamWScheduleFree(FusedOptimizer):
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
    refuses: ClassVar[dict[str, str]] = {
        "grams": _PULLED,
        "cautious": _PULLED,
        "growth_limit": _PULLED,
        "cautious_decay": _PULLED,
    }

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
