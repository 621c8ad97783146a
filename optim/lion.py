"""Lion: the sign of an interpolated momentum, one fp32 moment."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optim import reference
from optim.codecs import Codec, Dense
from optim.fused import FusedOptimizer


class Lion(FusedOptimizer):
    """The sign of an interpolated momentum, which is kept in fp32.

    Every element moves by exactly lr.  State: 4 bytes a parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size; three to ten times smaller than AdamW's.
        betas: interpolation between momentum and gradient for the update, and decay of the
            momentum.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        stochastic_rounding: write bf16 weights without bias; fp32 and fp16 weights are not
            affected.
        seed: of the rounding.

    Source: Chen et al. 2023 (arXiv 2302.06675), Alg. 2.
    """

    rule = staticmethod(reference.lion)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, locals())

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return {"exp_avg": Dense(tuple(param.shape))}
