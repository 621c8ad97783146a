"""LOMO and AdaLomo: SGD and Adafactor that free each gradient as soon as it is used.

Their papers fuse the step into the backward pass (`optim.fuse_backward`; in the trainer,
`runtime.fused_backward`, which `optim=lomo` and `optim=adalomo` set).  The weights do not depend on
it: stepped after the backward pass they are the same, bit for bit.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from optim import reference
from optim.adafactor import Adafactor
from optim.codecs import Codec
from optim.features import Features
from optim.fused import FusedOptimizer


class Lomo(FusedOptimizer):
    """SGD without momentum, for the fused backward: keeps only counters (LOMO).

    State: 16 bytes a tensor.

    The paper's clip by the global norm needs an extra backward pass for the norm; it is not
    offered.  grad_clip clips each tensor's gradient.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Lv et al. 2023 (arXiv 2306.09782), Alg. 1.
    """

    rule = staticmethod(reference.sgd)
    refuses: ClassVar[dict[str, str]] = {
        "storage": "it has no moments to store",
        "factor_1d": "it has no moments to factor",
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        *,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        return {}


class AdaLomo(Adafactor):
    """Adafactor with each tensor's step relative to its RMS, for the fused backward (AdaLomo).

    State on the SDXL UNet: 18.7 MB.

    It is `Adafactor` with other defaults: beta2 = 1 - t^-0.8 and scale_parameter.  Its paper's
    "grouped update normalization" is these two: the update is clipped to RMS 1 (clip_threshold),
    then multiplied by max(eps[1], RMS(weights)), a tensor at a time.  Two differences from the
    authors' code: weight decay here is by lr alone (there by lr times that RMS), and convolutions
    are factored as matrices.  lr is relative to the weights: 0.01 moves a tensor by at most about
    1 % of its RMS.  Arguments are `Adafactor`'s.

    Source: Lv et al. 2023 (arXiv 2310.10195), Alg. 1.
    """

    rule = staticmethod(reference.adafactor)
    own_defaults: ClassVar[dict[str, Any]] = {"lr": 1e-2, "beta2": None, "scale_parameter": True}
