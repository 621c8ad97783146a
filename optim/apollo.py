"""APOLLO: moments of a random projection of the gradient, which only set a step's length."""

from collections.abc import Iterable
from math import prod
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from optim import idle, reference
from optim.codecs import Codec, Dense, Factored, Float8, matrix_view, nonnegative, signed, smmf_view
from optim.features import Features
from optim.fused import FusedOptimizer
from optim.portion import SCRATCH_BYTES, Portion, kind_of
from optim.projection import parted, projected_shape


class Apollo(FusedOptimizer):
    """The gradient, scaled by Adam's step for a random projection of it (APOLLO).

    State: 8 rank / min(R, C) bytes per parameter of an (R, C) matrix, a quarter of that with
    storage="8bit".

    The gradient's smaller dimension, of length D, is projected to `rank` numbers: P G is (rank, L)
    where L is the larger one, as in the paper.  Convolutions are O x (I*kh*kw).  Adam's moments are
    kept only for P G; the weights follow G itself, with each of its L channels scaled by how much
    Adam lengthens or shortens its projection.  P is drawn from counters at every step
    (`optim/projection.py`) and is not part of the state.  1-D tensors, and matrices for which the
    rank would save nothing (rank >= D), are stepped by AdamW with moments of the same `storage`.
    If that is all of them, a warning says so (`IdleOption`).

    growth_limit defaults to 1.01, as in Fira, and only applies to projected tensors.  It limits
    bias-corrected updates, before weight decay.  After a small update, steps grow by 1 % each: if
    gradient norms vary much from step to step (a batch of one), they stay smaller than lr, above
    all without a first moment; growth_limit=None disables it.  Moments are kept when P changes,
    as in the paper.  An unusable element counts as 0 in its projection, and a channel without any
    usable one keeps its moments.  A scaled gradient only points along the gradient, so cautious and
    grams only affect tensors that are not projected, and residual.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        rank: rows of the projection.
        scale: an update is multiplied by sqrt(scale).  Projecting D to rank numbers makes steps of
            sqrt(rank / D) times AdamW's; "auto" is D / rank, which undoes that, so that an update's
            RMS is about lr in layers of every width.  The paper uses 1, and 128 for APOLLO-Mini.
        scaling: "channel" scales each channel separately, "tensor" all by the ratio of whole norms.
        update_gap: steps between redraws of P.
        projection: elements of P: "gaussian" (`optim.rng.normals`) or "sign" (-1 and 1, faster).
        residual: map Adam's step for P G back to the weights, and scale only the part of G outside
            the rows of P, which are made orthonormal (Fira).  The growth limit then acts on that
            part.  It runs on the torch backend.
        betas: decay of the averages of P G and of its square.
        eps: added to sqrt(v).
        atan2: 4/pi atan2(m, sqrt v) instead of m / (sqrt v + eps): bounded, and without eps.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Zhu et al. 2024 (arXiv 2412.05270), Alg. 1; Chen et al. 2024 (Fira, arXiv 2410.01623).
    """

    rule = staticmethod(reference.apollo)
    own_defaults: ClassVar[dict[str, Any]] = {"growth_limit": 1.01}
    dense: ClassVar[str] = "AdamW"  # steps the tensors that are not projected

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int = 256,
        scale: float | int | str = "auto",
        scaling: Literal["channel", "tensor"] = "channel",
        update_gap: int = 200,
        projection: Literal["gaussian", "sign"] = "gaussian",
        residual: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        atan2: bool = False,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def idle_options(self) -> list[str]:
        return idle.rank(self.param_groups, self.dense) + super().idle_options()

    def scratch_bytes(self, device_type: str) -> int:
        wide, _ = parted(self._places())
        sizes = [
            Portion.bytes_of(place, kind_of(place, place[2].dtype, place[2].dtype))
            for place in wide
            if place[2].requires_grad
        ]
        return min(sum(sizes), max([SCRATCH_BYTES[device_type], *sizes]))

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape, storage = tuple(param.shape), group["storage"]
        view = smmf_view(storage, shape, group["factor_1d"])
        if (sides := projected_shape(shape, group["rank"])) is not None:
            shape = (group["rank"], sides[1])
            view = matrix_view(shape) if storage == "factored" else None
        return {
            "exp_avg": signed(storage, shape, view),
            "exp_avg_sq": nonnegative(storage, shape, view),
        }

    def codecs(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        codecs = super().codecs(param, group)
        if projected_shape(tuple(param.shape), group["rank"]) is None:
            codecs.pop("update_norm", None)  # only scaled gradients have a growth limit
        return codecs

    def layout(self, param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        shape = tuple(param.shape)
        if projected_shape(shape, group["rank"]) is None:
            return super().layout(param, group)
        return shape[0], prod(shape[1:])


class ApolloMini(Apollo):
    """APOLLO with a projection of rank 1 and one scale per tensor; moments in bf16.

    State on the SDXL UNet: 15.1 MB, or 7.6 with storage="8bit".  At rank 1 the projection says
    little about a single channel, so all channels share one scale.  Arguments and source are
    `Apollo`'s.
    """

    rule = staticmethod(reference.apollo)
    own_defaults: ClassVar[dict[str, Any]] = {"rank": 1, "scaling": "tensor", "storage": "bf16"}


class Adafactor8bitApollo(Apollo):
    """APOLLO over Adafactor: 8-bit row and column means of the squared projection, no first moment.

    State on the SDXL UNet: 8.8 MB.  The projection P G (rank, L) is stepped as `Adafactor8bit`
    steps a matrix, with rank + L means in 8-bit codes and no first moment; G itself, scaled to that
    step, is growth-limited and then clipped.  If the projection has a single row, its second moment
    is kept in full, in the same codes.  beta1 keeps a first moment of the projection's step (before
    the clip, which applies to the whole update), in `storage`.  1-D tensors and matrices for which
    the rank would save nothing are stepped by `Adafactor8bit`.

    Args:
        beta1: decay of a first moment of the projection's step; None keeps none.
        beta2: fixed decay of the second moment, bias-corrected; None uses 1 - t^beta2_decay.
        beta2_decay: exponent of that schedule; used only where beta2 is None.
        eps: added to the second moment (to each of its factors) where it divides.
        clip_threshold: largest RMS of a tensor's update before lr; None disables clipping.

    Source: `Apollo`'s; Shazeer & Stern 2018 (arXiv 1804.04235), Alg. 4 and 5.
    """

    rule = staticmethod(reference.adafactor_apollo)
    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}
    dense = "Adafactor8bit"
    refuses: ClassVar[dict[str, str]] = {"factor_1d": "1-D second moments are not factored here"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int = 256,
        scale: float | int | str = "auto",
        scaling: Literal["channel", "tensor"] = "channel",
        update_gap: int = 200,
        projection: Literal["gaussian", "sign"] = "gaussian",
        residual: bool = False,
        beta1: float | None = None,
        beta2: float | None = 0.999,
        beta2_decay: float = -0.8,
        eps: float = 1e-30,
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        FusedOptimizer.__init__(self, params, locals())

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        shape = low = tuple(param.shape)
        dense: Codec = Dense(shape)
        if (sides := projected_shape(shape, group["rank"])) is not None:
            low = (group["rank"], sides[1])
            dense = Float8(low)
        view = matrix_view(low)
        codecs = {"exp_avg_sq": dense if view is None else Factored(low, view, float8=True)}
        if group["beta1"] is not None:
            codecs["exp_avg"] = signed(group["storage"], low, view)
        return codecs
