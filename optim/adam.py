"""AdamW and AdEMAMix, with moments in fp32, in 8-bit blocks, or as factors and signs."""

from collections.abc import Iterable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, stored
from optim.features import Features
from optim.fused import FusedOptimizer


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay, both moments in fp32.

    State: 8 bytes per parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size; an update is at most about lr in each element.
        betas: decay of the averages of the gradient and of its square.
        eps: added to sqrt(v).
        atan2: 4/pi atan2(m, sqrt v) instead of m / (sqrt v + eps): bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

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
        atan2: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg", square="exp_avg_sq")


class AdamW8bit(AdamW):
    """AdamW with both moments in 8-bit codes, written with stochastic rounding.

    State: 2.02 bytes per parameter.  Arguments and source are `AdamW`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}


class AdamWFactored(AdamW):
    """AdamW with both moments as rank-1 factors, the first with one sign bit per element (SMMF).

    State: 0.14 bytes per parameter.  Arguments are `AdamW`'s; `AdoptFactored` explains factoring.

    Source: `AdamW`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}


class AdEMAMix(FusedOptimizer):
    """AdamW with a second, much slower average of the gradient, in fp32.

    State: 12 bytes per parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the averages of the gradient and of its square, and of the slow average.
        alpha: weight of the slow average.
        warmup_steps: steps over which alpha and the slow average's half-life grow to their values.
        eps: added to sqrt(v).
        atan2: 4/pi atan2(m, sqrt v) instead of m / (sqrt v + eps): bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Pagliardini et al. 2024 (arXiv 2409.03137), Alg. 1.
    """

    rule = staticmethod(reference.adam)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        warmup_steps: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        atan2: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg", "exp_avg_slow", square="exp_avg_sq")


class AdEMAMixFactored(AdEMAMix):
    """AdEMAMix with all three moments as rank-1 factors, two of them with sign bits (SMMF).

    State: 0.27 bytes per parameter.  Arguments are `AdEMAMix`'s.

    Source: `AdEMAMix`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}
