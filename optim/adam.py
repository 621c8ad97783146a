"""AdamW: the yardstick, with both moments in fp32."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optim import reference
from optim.codecs import Codec, Dense
from optim.fused import FusedOptimizer


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay, both moments in fp32.

    State: 8 bytes a parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size; an update is at most about lr in each element.
        betas: decay of the averages of the gradient and of its square.
        eps: added to sqrt(v).
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        stochastic_rounding: write bf16 weights without bias; fp32 and fp16 weights are not
            affected.
        seed: of the rounding.

    Source: Kingma & Ba 2014 (arXiv 1412.6980), Alg. 1; Loshchilov & Hutter 2017 (arXiv 1711.05101),
    Alg. 2.
    """

    rule = staticmethod(reference.adam)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, locals())

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape = tuple(param.shape)
        return {"exp_avg": Dense(shape), "exp_avg_sq": Dense(shape)}
