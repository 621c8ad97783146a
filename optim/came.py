"""CAME: Adafactor with a first moment that is divided by how far updates stray from it."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, Dense, Factored, matrix_view, signed
from optim.features import Features
from optim.fused import FusedOptimizer


class CAME(FusedOptimizer):
    """Adafactor with momentum, damped where updates deviate from it (CAME); momentum in fp32.

    State: 4 bytes per parameter.  The second moment of an (R, C) matrix and its instability, the
    average of (u - m)^2, are kept as R + C means each.  1-D tensors, and others that factors would
    not make smaller, keep the second moment in full, in fp32, and step by the first moment alone.
    `storage` applies to the first moment.

    As in the paper, averages have no bias correction, so with these betas a
    matrix's first update has an RMS of up to 11 lr: (1 - b1) / (b1 sqrt(1 - b3)).

    The authors' package, came_pytorch, differs in two ways.  It factors the last two dimensions of
    a convolution (O, I, kh, kw), which keeps more numbers than a kernel of 1x1 has weights; here
    it is read as O x (I*kh*kw).  And, as the paper does, it adds eps to what is averaged; here it
    is added where the average divides, so that a row without gradients stays exactly zero.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        betas: decay of the averages of the clipped update, of the squared gradient, and of the
            instability.
        eps: added to the second moment and to the instability (to each of their factors) where
            they divide.
        clip_threshold: largest RMS of the normalised gradient before it is averaged; None
            disables clipping.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Luo et al. 2023 (arXiv 2307.02047), Alg. 2.
    """

    rule = staticmethod(reference.came)
    float8: ClassVar[bool] = False  # are the means stored as codes?
    refuses: ClassVar[dict[str, str]] = {"factor_1d": "1-D second moments are not factored here"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        *,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    @classmethod
    def contradiction(cls, group: Mapping[str, Any]) -> str | None:
        if group["betas"][0] == 0:
            return (
                "cannot have betas[0]=0: its steps are divided by how far updates are from their "
                "average, which would be 0; use Adafactor, which averages no updates"
            )
        return super().contradiction(group)

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape = tuple(param.shape)
        view = matrix_view(shape)
        first = signed(group["storage"], shape, view)
        if view is None:
            return {"exp_avg_sq": Dense(shape), "exp_avg": first}
        means = Factored(shape, view, self.float8)
        return {"exp_avg_sq": means, "exp_avg": first, "exp_avg_res": means}


class CAME8bit(CAME):
    """CAME with its momentum and its means in 8-bit codes, written with stochastic rounding.

    State: 1.02 bytes per parameter.  Row and column means are stored as in `Adafactor8bit`, the
    first moment as signed 8-bit floats.  Arguments and source are `CAME`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}
    float8 = True
