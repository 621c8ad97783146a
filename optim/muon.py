"""Muon: momentum steps that are orthogonalized as matrices."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from optim import idle, orthogonal, reference
from optim.codecs import Codec, stored
from optim.features import Features
from optim.fused import FusedOptimizer
from optim.newton_schulz import is_matrix, parted

_ELEMENTWISE = "choosing or turning single elements would undo the orthogonalization"


class Muon(FusedOptimizer):
    """SGD with Nesterov momentum, each matrix's step orthogonalized (Muon); momentum in fp32.

    State: 4 bytes per parameter of a matrix, 8 per other parameter.

    A step U D V^T becomes U V^T: it is equally long in all directions, where Adam's and SGD's
    mostly go along a few.  Convolutions are matrices O x (I*kh*kw).  1-D tensors are stepped by
    AdamW, with moments of the same `storage` and the same lr.

    Five iterations cost about 30 min(R, C) multiplications and additions per element of an (R, C)
    matrix, 10^14 for the SDXL UNet: a fraction of a second on a GPU, and half an hour on a CPU.

    Args:
        params: parameters or parameter groups.
        lr: step size.
        momentum: decay of the momentum sum m <- momentum * m + g of matrices.
        nesterov: orthogonalize g + momentum * m instead of m.
        ns_steps: Newton-Schulz iterations; with fewer, small singular values stay small.
        adjust_lr_fn: a step's factor besides lr, as in torch.optim.Muon: "match_rms_adamw" is
            0.2 sqrt(max(R, C)), which makes learning rates AdamW's; "original" is
            sqrt(max(1, R / C)).
        betas: decay of the averages of the gradient and of its square, for 1-D tensors.
        eps: added to sqrt(v), for 1-D tensors.
        weight_decay: decoupled decay; a step multiplies the weights by 1 - lr * weight_decay.
        features: options shared by all optimizers, `optim.features.Features`.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et
    al. 2025 (arXiv 2502.16982), section 2.2.
    """

    rule = staticmethod(reference.muon)
    refuses: ClassVar[dict[str, str]] = {
        "orthograd": "its steps are orthogonalized as matrices, whatever is along the weights",
        "grams": _ELEMENTWISE,
        "cautious": _ELEMENTWISE,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **features: Unpack[Features],
    ) -> None:
        super().__init__(params, locals())

    def idle_options(self) -> list[str]:
        return idle.orthogonalizing(self.param_groups) + super().idle_options()

    @classmethod
    def bounds_updates(cls, group: Mapping[str, Any]) -> str:
        return "gives each matrix a step of one length, whatever the size of its gradient"

    def scratch_bytes(self, device_type: str) -> int:
        matrices, _ = parted(self._places())
        trained = [param.numel() for _, _, param in matrices if param.requires_grad]
        return orthogonal.scratch_bytes(trained, device_type)

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Codec]:
        if not is_matrix(tuple(param.shape)):
            return stored(param.shape, group, "exp_avg", square="exp_avg_sq")
        return stored(param.shape, group, "exp_avg") if group["momentum"] else {}

    def layout(self, param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        shape = tuple(param.shape)
        return (shape[0], prod(shape[1:])) if is_matrix(shape) else super().layout(param, group)


class Muon8bit(Muon):
    """Muon with its momentum in 8-bit codes, written with stochastic rounding.

    State: 1.02 bytes per parameter.  Arguments and source are `Muon`'s.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "8bit"}


class MuonFactored(Muon):
    """Muon with its momentum as rank-1 factors and one sign bit per element (SMMF).

    State: 0.13 bytes per parameter.  Arguments are `Muon`'s.

    Source: `Muon`'s; Park & Lee 2024 (arXiv 2412.08894), Alg. 1-4.
    """

    own_defaults: ClassVar[dict[str, Any]] = {"storage": "factored"}
