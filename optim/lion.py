"""Lion: the sign of an interpolated momentum, kept in fp32, in 8-bit blocks, or as factors."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, stored
from optim.features import Features
from optim.fused import FusedOptimizer


class Lion(FusedOptimizer):
    """The sign of an interpolated momentum; momentum in fp32.

    Every element moves by exactly lr.  State: 4 bytes per parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size; three to ten times smaller than AdamW's.
        betas: interpolation between momentum and gradient for the update, and decay of the
            momentum.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Chen et al. 2023 (arXiv 2302.06675), Alg. 2.
    """

    rule = staticmethod(reference.lion)
    refuses: ClassVar[dict[str, str]] = {"growth_limit": "the norm of a sign does not grow"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def bounds_updates(cls, group: Mapping[str, Any]) -> str:
        return "uses the sign of an average of gradients, whose size hardly matters"

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg")


class Lion8bit(Lion):
    """Lion with its momentum in 8-bit codes, written with stochastic rounding.

    State: 1.02 bytes per parameter.  Arguments and source are `Lion`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}


class LionFactored(Lion):
    """Lion with its momentum as rank-1 factors and one sign bit per element (SMMF).

    State: 0.13 bytes per parameter.  Arguments are `Lion`'s.

    Source: `Lion`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}
