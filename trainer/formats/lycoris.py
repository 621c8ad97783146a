"""LyCORIS's adapters, Kronecker and Hadamard products of small matrices (Yeh et al. 2024, arXiv
2309.14859), as LyCORIS names and scales them.

LyCORIS, PEFT, ComfyUI (comfy/weight_adapter), A1111 and Forge (extensions-builtin/Lora) and kohya's
scripts (networks/lokr.py, loha.py) agree on the tensors' names and on their product.  They multiply
it by alpha / rank, with the rank of `lokr_w2_b`, else of `lokr_w1_b`; of `hada_w1_b`.  Two whole
factors of a LoKr have no rank, and the scale 1: readers ignore alpha then.  LyCORIS writes the
configured rank as alpha, and so does this trainer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Self

import peft
import torch
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from torch import Tensor, nn

from trainer.config import LohaConfig, LokrConfig
from trainer.errors import UserError
from trainer.formats.adapter import NAME, Adapter


def _alike(*names: str) -> dict[str, str]:
    """Names that PEFT and LyCORIS share."""
    return {name: name for name in names}


@dataclass(frozen=True, kw_only=True)
class _Lycoris(Adapter):
    """A product of two factors, each a matrix, or (`_a`, `_b`) two smaller ones, for convolutions
    perhaps with a core (Tucker's decomposition, which is read but not trained)."""

    algo: ClassVar[str]  # LyCORIS's name

    own: Mapping[str, Tensor]  # by LyCORIS's names, which are PEFT's

    @classmethod
    def of(cls, where: str, tensors: Mapping[str, Tensor], alpha: float | None) -> Self:
        if "magnitude" in tensors:
            raise UserError(
                f"{where} is a {cls.method.title} with DoRA's scales, which cannot be read"
            )
        adapter = cls(own=dict(tensors), alpha=1.0 if alpha is None else alpha)
        try:
            _, rank = adapter.shape, adapter.rank
        except KeyError as error:
            raise UserError(f"{where} has no {error.args[0]}; the file is damaged") from error
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {_by(x.shape)}" for name, x in tensors.items())
            raise UserError(f"{where} has matrices that do not fit together: {shapes}") from error
        return adapter if alpha is not None else replace(adapter, alpha=float(rank))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.own)

    @property
    def shape(self) -> tuple[int, ...]:
        sketch = {name: tensor.to("meta") for name, tensor in self.own.items()}
        return tuple(replace(self, own=sketch).delta().shape)

    def __str__(self) -> str:
        names = [name for name in self.peft_names if name in self.own]
        shapes = ", ".join(f"{name} {_by(self.own[name].shape)}" for name in names)
        return f"{self.method.title} of {shapes}, scale {self.scale:g}"

    def apply(self, layer: Any, scale: float) -> None:
        """Its own tensors replace PEFT's, which may have other shapes."""
        for name in self.peft_names:
            held: nn.ParameterDict = getattr(layer, name)
            if NAME in held:
                device = held.pop(NAME).device
        for name, tensor in self.own.items():
            value = tensor.to(device, torch.float32)
            getattr(layer, name)[NAME] = nn.Parameter(value, requires_grad=False)
        layer.scaling[NAME] = scale * self.scale

    @classmethod
    def prepare(cls, layer: Any) -> None:
        # As in LyCORIS two whole factors are not scaled, whereas PEFT scales them.
        layer.scaling[NAME] = cls.of_layer("", layer).scale
        # In training PEFT draws and reads a number for a dropout of 0, which has no value in a
        # rehearsal and ends a compiled graph.
        layer.training = False

    @classmethod
    def options(cls, adapters: Collection[Any]) -> str | None:
        is_tucker = any("_t" in name for adapter in adapters for name in adapter.own)
        return None if is_tucker else ""

    @classmethod
    def network(cls, adapters: Collection[Any]) -> tuple[str, dict[str, str]]:
        return "lycoris.kohya", {"algo": cls.algo}

    def _product(self, a: str, b: str, core: str) -> Tensor:
        """a @ b in fp32, or with the core (r, r, kh, kw) of a convolution: (out, in, kh, kw)."""
        left, right = (self.own[name].detach().float() for name in (a, b))
        if core not in self.own:
            return left @ right.flatten(1)
        return torch.einsum("ijkl,io,jn->onkl", self.own[core].detach().float(), left, right)


@dataclass(frozen=True, kw_only=True)
class Lokr(_Lycoris):
    """scale * kron(w1, w2) is added to the weight; w1 (a, b), w2 (c, d[, kh, kw]), for a weight
    (a * c, b * d[, kh, kw])."""

    method = LokrConfig
    algo = "lokr"
    layer = LoKrLayer
    peft_names = _alike(
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
        *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )

    @classmethod
    def trained(cls, where: str, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Self:
        adapter = cls.of(where, tensors, alpha)
        return replace(adapter, alpha=float(rank)) if adapter.is_whole else adapter

    @property
    def is_whole(self) -> bool:
        """Whether neither factor is a product itself."""
        return "lokr_w1" in self.own and "lokr_w2" in self.own

    @property
    def rank(self) -> int:
        if self.is_whole:
            return max(1, round(self.alpha))  # as it was configured
        name = "lokr_w1_b" if "lokr_w2" in self.own else "lokr_w2_b"
        return self.own[name].shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.is_whole else self.alpha / self.rank

    def delta(self) -> Tensor:
        w1, w2 = (
            self.own[name].detach().float()
            if name in self.own
            else self._product(f"{name}_a", f"{name}_b", core)
            for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
        )
        return self.scale * torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())

    @classmethod
    def options(cls, adapters: Collection["Lokr"]) -> str | None:
        if super().options(adapters) is None:
            return None
        largest = max(side for adapter in adapters for side in adapter._w1_sides)
        for factor, both in product((largest, -1), (False, True)):
            if all(adapter._is_of(factor, both) for adapter in adapters):
                given = "null" if factor == -1 else factor
                return f"method.factor={given} method.decompose_both={str(both).lower()}"
        return None

    @property
    def _w1_sides(self) -> tuple[int, int]:
        """The sides of w1."""
        whole = "lokr_w1" in self.own
        left, right = ("lokr_w1", "lokr_w1") if whole else ("lokr_w1_a", "lokr_w1_b")
        return self.own[left].shape[0], self.own[right].shape[1]

    def _is_of(self, factor: int, both: bool) -> bool:
        """Whether PEFT makes factors like these (decompose_factor, decompose_both).  (Of a
        convolution d may be d * kh * kw, which for most factors is as good.)"""
        (a, c), (b, d) = (factorization(side, factor) for side in self.shape[:2])
        is_first_whole = not both or self.rank >= max(a, b) / 2
        is_second_whole = self.rank >= max(c, d) / 2
        wholes = ("lokr_w1" in self.own, "lokr_w2" in self.own)
        return self._w1_sides == (a, b) and wholes == (is_first_whole, is_second_whole)

    @classmethod
    def config(cls, adapters: Mapping[str, Any]) -> peft.LoKrConfig:
        return peft.LoKrConfig(r=1, alpha=1, target_modules=sorted(adapters))

    @classmethod
    def new(cls, method: LokrConfig, shared: Mapping[str, Any]) -> peft.LoKrConfig:
        return peft.LoKrConfig(
            **shared,
            alpha=method.alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too
            decompose_factor=method.factor or -1,
            decompose_both=method.decompose_both,
            init_weights="lycoris",  # w2, or w2_b, is zero
        )


@dataclass(frozen=True, kw_only=True)
class Loha(_Lycoris):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element, is added to the weight; `_a`
    (out, rank), `_b` (rank, in * kh * kw)."""

    method = LohaConfig
    algo = "loha"
    layer = LoHaLayer
    peft_names = _alike(
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        *("hada_t1", "hada_t2"),
    )

    @property
    def rank(self) -> int:
        return self.own["hada_w1_b"].shape[0]

    def delta(self) -> Tensor:
        first, second = (
            self._product(f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)
        )
        return self.scale * first * second

    @classmethod
    def config(cls, adapters: Mapping[str, Any]) -> peft.LoHaConfig:
        return peft.LoHaConfig(r=1, alpha=1, target_modules=sorted(adapters))

    @classmethod
    def new(cls, method: LohaConfig, shared: Mapping[str, Any]) -> peft.LoHaConfig:
        return peft.LoHaConfig(**shared, alpha=method.alpha)  # type: ignore[arg-type]

    @classmethod
    @torch.no_grad()
    def prepare(cls, layer: Any) -> None:
        """Draw the initial matrices as LyCORIS does.  PEFT's are smaller by the square root of a
        layer's width, so learning rates that are known to work would be far too low."""
        super().prepare(layer)
        deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        for name, deviation in deviations.items():
            getattr(layer, name)[NAME].normal_().mul_(deviation)


def _by(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
