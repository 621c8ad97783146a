"""An adapter: what training adds to the weight of one linear layer or convolution, as tensors.

Each kind is a class, `Lora` here, `Lokr` and `Loha` in `lycoris`, which knows its weight's change
and PEFT's module for it.  Whoever reads, writes, merges or draws with adapters asks the adapter.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from trainer.config import LoraConfig
from trainer.errors import UserError

NAME = "default"  # PEFT's name for an unnamed adapter
# LyCORIS's arguments for DoRA with one scale per row of the weight.
_DORA = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}


@dataclass(frozen=True, kw_only=True)
class Adapter(ABC):
    """scale * a product of its tensors is added to a module's weight."""

    method: ClassVar[type[Any]]  # that trains it: a dataclass of trainer.config
    layer: ClassVar[type[BaseTunerLayer]]  # PEFT's module with such an adapter
    peft_names: ClassVar[Mapping[str, str]]  # that module's attributes -> names in `tensors`

    alpha: float  # what readers divide by the rank

    @classmethod
    @abstractmethod
    def of(cls, where: str, tensors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The adapter of these tensors, named as in `tensors`.  alpha: None is the rank.

        Raises UserError, beginning with `where`, if one is missing or they do not fit together.
        """

    @classmethod
    def trained(cls, where: str, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Self:
        """The adapter of these tensors of a run with this rank and alpha."""
        return cls.of(where, tensors, alpha)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names under which formats know them."""

    @classmethod
    def of_layer(cls, where: str, layer: Any, name: str = NAME) -> Self:
        """The adapter called `name` in PEFT's module.

        Raises UserError, beginning with `where`, if files cannot hold it.
        """
        tensors = {
            own: values(getattr(layer, attribute)[name]).detach()
            for attribute, own in cls.peft_names.items()
            if name in getattr(layer, attribute)
        }
        rank = layer.r[name]
        return cls.trained(where, tensors, rank, float(layer.scaling[name]) * rank)

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The delta's: (out, in[, kh, kw]), or (out, in * kh * kw)."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the weight, before DoRA normalises it, in fp32: `shape`."""

    def merged(self, weight: Tensor, scale: float) -> Tensor:
        """weight + scale * (the weight that the adapter makes of it - weight), in fp32."""
        before = weight.float()
        return before + scale * self.delta().reshape(before.shape)

    @abstractmethod
    def __str__(self) -> str:
        """What must be equal for a PEFT module to hold it with its effect."""

    def to(self, dtype: torch.dtype | None) -> Self:
        """The same adapter on the CPU, its tensors rounded to `dtype`; None: unchanged."""
        rounded = {name: tensor.to("cpu", dtype) for name, tensor in self.tensors().items()}
        return self.of("", rounded, self.alpha)

    @classmethod
    @abstractmethod
    def config(cls, adapters: Mapping[str, Any]) -> peft.PeftConfig:
        """PEFT's configuration for such adapters, by the full names of their modules."""

    @classmethod
    @abstractmethod
    def new(cls, method: Any, shared: Mapping[str, Any]) -> peft.PeftConfig:
        """PEFT's configuration for adapters to train.

        method: the options of `method=`.  shared: the modules, ranks and alphas of their own.
        """

    @classmethod
    def prepare(cls, layer: Any) -> None:
        """Give PEFT's module, made by `new`, the values and the scale that training starts with,
        where PEFT's are others."""
        return

    @torch.no_grad()
    def fill(self, layer: Any) -> None:
        """Copy its values into PEFT's module, whose tensors have its shapes."""
        own = self.tensors()
        for attribute, name in self.peft_names.items():
            if name in own:
                target = values(getattr(layer, attribute)[NAME])
                target.copy_(own[name].reshape(target.shape))

    @abstractmethod
    def apply(self, layer: Any, scale: float) -> None:
        """Let PEFT's module, made by `config`, compute with `scale` times what this changes, in
        fp32."""

    @classmethod
    @abstractmethod
    def options(cls, adapters: Collection[Any]) -> str | None:
        """Options of `method=` of a run with such adapters, besides ranks and targets; None if no
        run has them."""

    @classmethod
    @abstractmethod
    def network(cls, adapters: Collection[Any]) -> tuple[str, dict[str, str]]:
        """The module of kohya's scripts that trains such adapters, and its arguments."""


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """up @ down * alpha / rank is added to the weight (Hu et al. 2021, eq. 3).

    alpha is for readers that divide by the rank.  If training divided by sqrt(rank) (rank
    stabilised, Kalajdzievski 2023), it is training's alpha * sqrt(rank): the same scale.
    """

    method = LoraConfig
    layer = LoraLayer
    peft_names: ClassVar[Mapping[str, str]] = {
        "lora_A": "down",
        "lora_B": "up",
        "lora_magnitude_vector": "magnitude",
    }

    down: Tensor  # (rank, in); for a convolution (rank, in, kh, kw)
    up: Tensor  # (out, rank); for a convolution (out, rank, 1, 1)
    magnitude: Tensor | None = None  # (out,): DoRA's norms of the weight's rows

    @classmethod
    def of(cls, where: str, tensors: Mapping[str, Tensor], alpha: float | None) -> Self:
        for kind in ("down", "up"):
            if kind not in tensors:
                raise UserError(f"{where} has no {kind} projection; the file is damaged")
        down, up, magnitude = tensors["down"], tensors["up"], tensors.get("magnitude")
        if down.shape[0] != up.shape[1]:
            raise UserError(f"{where} has rank {down.shape[0]} down and {up.shape[1]} up")
        return cls(
            down=down,
            up=up,
            alpha=float(down.shape[0]) if alpha is None else alpha,
            magnitude=None if magnitude is None else magnitude.flatten(),
        )

    def tensors(self) -> dict[str, Tensor]:
        own = {"down": self.down, "up": self.up}
        return own if self.magnitude is None else own | {"magnitude": self.magnitude}

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        up, down = self.up.detach().float().flatten(1), self.down.detach().float().flatten(1)
        return (self.scale * (up @ down)).reshape(self.shape)

    def merged(self, weight: Tensor, scale: float) -> Tensor:
        """DoRA's weight is magnitude * V / |V|, V = weight + delta, with norms of V's rows (Liu et
        al. 2024, eq. 5); the scale goes from the weight to it in a straight line."""
        if self.magnitude is None:
            return super().merged(weight, scale)
        before = weight.float()
        direction = before + self.delta().reshape(before.shape)
        norm = direction.flatten(1).norm(dim=1)
        ratio = (self.magnitude.float() / norm).reshape(-1, *[1] * (before.ndim - 1))
        return before + scale * (ratio * direction - before)

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}{', DoRA' * (self.magnitude is not None)}"

    @classmethod
    def of_layer(cls, where: str, layer: Any, name: str = NAME) -> Self:
        if name not in layer.lora_A:
            raise UserError(f"the adapter of {where} is of an embedding, which files cannot hold")
        if getattr(layer.lora_B[name], "bias", None) is not None:
            raise UserError(f"the adapter of {where} has a bias, which LoRA files cannot hold")
        return super().of_layer(where, layer, name)

    @classmethod
    def config(cls, adapters: Mapping[str, "Lora"]) -> peft.LoraConfig:
        """Raises UserError if only some are DoRA: PEFT has one setting for all."""
        is_dora = {adapter.magnitude is not None for adapter in adapters.values()}
        if len(is_dora) > 1:
            raise UserError(
                "some of the LoRA's modules are DoRA and others are not; such a LoRA can only be "
                "merged: python -m trainer.export LORA TARGET --merge"
            )
        rank, alpha = commonest(adapters.values())
        return peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too
            rank_pattern={n: a.rank for n, a in adapters.items() if a.rank != rank},
            alpha_pattern={n: a.alpha for n, a in adapters.items() if a.alpha != alpha},
            target_modules=sorted(adapters),
            use_dora=is_dora.pop(),
        )

    @classmethod
    def new(cls, method: LoraConfig, shared: Mapping[str, Any]) -> peft.LoraConfig:
        return peft.LoraConfig(
            **shared,
            lora_alpha=method.alpha,  # type: ignore[arg-type]
            use_rslora=method.rslora,
            use_dora=method.dora,
            lora_dropout=method.dropout,
        )

    @classmethod
    @torch.no_grad()
    def prepare(cls, layer: Any) -> None:
        """Set DoRA's magnitudes to the norms of each output's weights, in fp32.  PEFT computes them
        in the weights' dtype but divides by fp32 norms, so an untrained adapter would change a bf16
        model."""
        for magnitude in layer.lora_magnitude_vector.float().parameters():
            norms = layer.get_base_layer().weight.float().flatten(1).norm(dim=1)
            magnitude.copy_(norms.view_as(magnitude))

    def apply(self, layer: Any, scale: float) -> None:
        """For DoRA the scale leads in a straight line from the model to it."""
        for attribute in self.peft_names:
            getattr(layer, attribute).float()
        self.fill(layer)
        if self.magnitude is None:
            layer.scale_layer(scale)
        elif scale != 1:
            layer.register_forward_hook(partial(_towards, scale))

    @classmethod
    def options(cls, adapters: Collection["Lora"]) -> str | None:
        is_dora = {adapter.magnitude is not None for adapter in adapters}
        if len(is_dora) > 1:
            return None
        return f"method.rslora=false method.dora={str(is_dora.pop()).lower()}"

    @classmethod
    def network(cls, adapters: Collection["Lora"]) -> tuple[str, dict[str, str]]:
        if any(adapter.magnitude is not None for adapter in adapters):
            return "lycoris.kohya", _DORA
        return "networks.lora", {}


def values(held: Any) -> Tensor:
    """The tensor in an item of PEFT's modules: a parameter, or a module with a weight."""
    return held if isinstance(held, Tensor) else held.get_parameter("weight")


def commonest(adapters: Collection[Adapter]) -> tuple[int, float]:
    """The most common rank, and the most common alpha."""
    ranks = Counter(adapter.rank for adapter in adapters)
    alphas = Counter(adapter.alpha for adapter in adapters)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


def _towards(scale: float, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook: the point at `scale` on the line from what the base layer computes to the
    output."""
    return torch.lerp(layer.base_layer(*inputs), output, scale)
