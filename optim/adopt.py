"""ADOPT: Adam that normalises before it averages, in fp32 or with factored moments."""

from collections.abc import Iterable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, stored
from optim.features import Features
from optim.fused import FusedOptimizer


class Adopt(FusedOptimizer):
    """ADOPT, which normalises by the previous second moment; both moments in fp32.

    State: 8 bytes per parameter.  The first step only initialises the second moment.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the averages of the normalised gradient and of the squared gradient.
        eps: floor of the denominator, max(sqrt(v), eps).
        atan2: 4/pi atan2(g, sqrt v) instead of the clipped quotient: bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Taniguchi et al. 2024 (arXiv 2411.02853), Alg. 2.
    """

    rule = staticmethod(reference.adopt)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        atan2: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg", square="exp_avg_sq")


class AdoptFactored(Adopt):
    """ADOPT with both moments as rank-1 factors, the first with one sign bit per element (SMMF).

    State: 0.14 bytes per parameter.  The update uses the moments before they are factored, so
    factoring costs accuracy only in what is carried over.  An element whose gradient is exactly
    zero is not moved in that step: a rank-1 state would give it its neighbours' momentum.
    Arguments are `Adopt`'s.

    Source: `Adopt`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}


class AdoptFactoredAdEMAMix(FusedOptimizer):
    """ADOPT with a second, much slower average; all three moments as rank-1 factors (SMMF).

    State: 0.27 bytes per parameter.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the averages of the normalised gradient and of the squared gradient, and of
            the slow average of the normalised gradient.
        alpha: weight of the slow average.
        warmup_steps: steps over which alpha and the slow average's half-life grow to their values.
        eps: floor of the denominator, max(sqrt(v), eps).
        atan2: 4/pi atan2(g, sqrt v) instead of the clipped quotient: bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: `AdoptFactored`'s; Pagliardini et al. 2024 (arXiv 2409.03137), Alg. 1.
    """

    rule = staticmethod(reference.adopt)
    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float, float] = (0.9, 0.9999, 0.9999),
        alpha: float = 5.0,
        warmup_steps: int = 0,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        atan2: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg", "exp_avg_slow", square="exp_avg_sq")
