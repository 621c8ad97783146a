"""Adopt with factored moments: Adam-like steps for an eighth of a byte a parameter."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from optim import reference
from optim.codecs import Codec, Dense, Factored, FactoredSign, square_view
from optim.fused import FusedOptimizer


class AdoptFactored(FusedOptimizer):
    """ADOPT with both moments as rank-1 factors, the first with one sign bit an element (SMMF).

    Matrices and convolutions keep 0.13-0.14 bytes a parameter; 1-D tensors, which are few and
    matter, keep fp32 moments. The update uses the moments before they are factored, so factoring
    costs accuracy only in what is carried over.  An element whose gradient is exactly zero is not
    moved in that step: in a rank-1 state its momentum is its neighbours'.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the averages of the normalised gradient and of the squared gradient.
        eps: floor of the denominator, max(sqrt(v), eps).
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        stochastic_rounding: write bf16 weights without bias; fp32 and fp16 weights are not
            affected.
        seed: of the rounding.

    Source: Taniguchi et al. 2024 (arXiv 2411.02853), Alg. 2; Park & Lee 2024 (arXiv 2412.08894),
    Alg. 1-4.
    """

    rule = staticmethod(reference.adopt_factored)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(params, locals())

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape = tuple(param.shape)
        view = square_view(param.numel()) if param.ndim > 1 else None
        if view is None:
            return {"exp_avg": Dense(shape), "exp_avg_sq": Dense(shape)}
        return {"exp_avg": FactoredSign(shape, view), "exp_avg_sq": Factored(shape, view)}
