"""SGD: no state without momentum, one moment with it."""

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, stored
from optim.features import Features
from optim.fused import FusedOptimizer


class SGD(FusedOptimizer):
    """Gradient descent with (Nesterov) momentum in fp32.

    State: 4 bytes per parameter, none when momentum = 0.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        momentum: decay of the momentum sum m <- momentum * m + g.
        nesterov: step along g + momentum * m instead of m.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning".
    """

    rule = staticmethod(reference.sgd)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return stored(param.shape, group, "exp_avg") if group["momentum"] else {}
