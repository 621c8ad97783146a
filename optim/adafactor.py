"""Adafactor: the second moment as row and column means, in fp32 or in 8-bit codes."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from optim import reference
from optim.codecs import Codec, Dense, Factored, matrix_view, signed
from optim.features import Features
from optim.fused import FusedOptimizer


class Adafactor(FusedOptimizer):
    """Adafactor: row and column means of the squared gradient in fp32, no first moment by default.

    The learning rate is external and beta2 fixed unless asked otherwise.  State on the SDXL UNet:
    18.7 MB.

    The second moment of an (R, C) matrix is kept as R + C means.  1-D tensors keep it in full, in
    fp32.  `storage` applies to the first moment, if there is one.

    Args:
        params: parameters or parameter groups.
        lr: step size; with relative_step, its upper bound.
        beta1: decay of a first moment of the clipped update; None keeps no first moment.
        beta2: fixed decay of the second moment, bias-corrected; None uses 1 - t^beta2_decay.
        beta2_decay: exponent of that schedule; used only where beta2 is None.
        eps: added to the second moment (to each of its factors) where it divides, and floor of
            RMS(weights) for scale_parameter.
        clip_threshold: largest RMS of a tensor's update before lr; None disables clipping.
        clip_norm: the RMS compared with clip_threshold: "exact" is this update's, "lagged" the
            previous step's, before its clip, so that a fused kernel need not wait; a tensor's first
            update is then not clipped.
        conv_view: the matrix that a convolution (O, I, kh, kw) is factored as: "flatten" is
            O x (I*kh*kw); "last2" is O*I matrices kh x kw, as torch.optim.Adafactor has it.  It is
            there for comparison: it keeps 977 MB for the SDXL UNet instead of 18.7, and runs on
            the torch backend.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        relative_step: use min(lr, 1/sqrt(t)) as the step size; the paper has lr=1e-2 with it, and
            scale_parameter.
        scale_parameter: multiply a tensor's step by max(eps[1], RMS(weights)).
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Shazeer & Stern 2018 (arXiv 1804.04235), Alg. 4 (matrices), Alg. 5 (vectors).
    """

    rule = staticmethod(reference.adafactor)
    float8: ClassVar[bool] = False  # are the means stored as codes?
    refuses: ClassVar[dict[str, str]] = {"factor_1d": "1-D second moments are not factored here"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        beta1: float | None = None,
        beta2: float | None = 0.999,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        clip_norm: Literal["exact", "lagged"] = "exact",
        conv_view: Literal["flatten", "last2"] = "flatten",
        weight_decay: float = 0.0,
        relative_step: bool = False,
        scale_parameter: bool = False,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape = tuple(param.shape)
        view: tuple[int, ...] | None = matrix_view(shape)
        if group["conv_view"] == "last2" and len(shape) > 2:
            view = shape
        codecs: dict[str, Codec] = {
            "exp_avg_sq": Dense(shape) if view is None else Factored(shape, view, self.float8)
        }
        if group["beta1"] is not None:
            codecs["exp_avg"] = signed(group["storage"], shape, matrix_view(shape))
        if group["clip_threshold"] is not None and group["clip_norm"] == "lagged":
            codecs["update_rms"] = Dense(())
        return codecs


class Adafactor8bit(Adafactor):
    """Adafactor with its means in 8-bit codes, written with stochastic rounding.

    State on the SDXL UNet: 9.5 MB.  A mean of zero is stored exactly.

    Row and column means are stored as 8-bit floats (`optim.codecs.Float8`), the optional first
    moment as those with a sign (`optim.codecs.SignedFloat8`, 1.008 bytes a parameter); 1-D tensors
    keep an fp32 second moment.  The update uses the second moment before it is coded.
    Arguments and source are `Adafactor`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}
    float8 = True
