"""Low-rank adapters as plain tensors, read from PEFT's modules and written back into them."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.errors import UserError

NAME = "default"  # PEFT's name for an unnamed adapter


class OtherModel(UserError):
    """The LoRA's modules are not in this model, or have other shapes."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """up @ down * alpha / rank is added to a module's weight (Hu et al. 2021, eq. 3).

    alpha is for readers that divide by the rank.  If training divided by sqrt(rank) (rank
    stabilised, Kalajdzievski 2023), it is training's alpha * sqrt(rank): the same scale.
    """

    down: Tensor  # (rank, in); for a convolution (rank, in, kh, kw)
    up: Tensor  # (out, rank); for a convolution (out, rank, 1, 1)
    alpha: float
    magnitude: Tensor | None = None  # (out,): DoRA's norms of the weight's rows

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """What is added to the weight, before DoRA normalises it, in fp32: (out, in[, kh, kw])."""
        up, down = self.up.detach().float().flatten(1), self.down.detach().float().flatten(1)
        return (self.scale * (up @ down)).reshape(self.up.shape[0], *self.down.shape[1:])

    def to(self, dtype: torch.dtype | None) -> "Adapter":
        """The same adapter on the CPU, its tensors rounded to `dtype`; None: unchanged."""
        magnitude = self.magnitude
        return replace(
            self,
            down=self.down.to("cpu", dtype),
            up=self.up.to("cpu", dtype),
            magnitude=None if magnitude is None else magnitude.to("cpu", dtype),
        )


Adapters = dict[str, dict[str, Adapter]]  # part -> the module's name in it -> adapter


def of_models(models: Mapping[str, nn.Module], name: str = NAME) -> Adapters:
    """The adapters called `name` in PEFT's modules, with the scale at which they are applied.

    Raises UserError for adapters that LoRA files cannot hold (with a bias, or of an embedding).
    """
    return {
        part: {
            path: _of_layer(f"{part}.{path}", layer, name)
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and name in layer.r
        }
        for part, model in models.items()
    }


def _of_layer(path: str, layer: LoraLayer, name: str) -> Adapter:
    if name not in layer.lora_A:
        raise UserError(f"the adapter of {path} is of an embedding, which LoRA files cannot hold")
    down, up = layer.lora_A[name], layer.lora_B[name]
    if getattr(up, "bias", None) is not None:
        raise UserError(f"the adapter of {path} has a bias, which LoRA files cannot hold")
    is_dora = name in layer.lora_magnitude_vector
    return Adapter(
        down=down.get_parameter("weight").detach(),
        up=up.get_parameter("weight").detach(),
        alpha=float(layer.scaling[name]) * layer.r[name],
        magnitude=layer.lora_magnitude_vector[name].get_parameter("weight").detach().flatten()
        if is_dora
        else None,
    )


def module_names(model: nn.Module) -> list[str]:
    """The names of a model's Linear and convolution modules, whether wrapped by adapters or not."""
    names = []
    for name, module in model.named_modules():
        inside = ".base_layer" in name or ".lora_" in name
        if not inside and isinstance(module, nn.Linear | nn.Conv2d | LoraLayer):
            names.append(name)
    return names


@torch.no_grad()
def fill(models: Mapping[str, nn.Module], adapters: Adapters) -> None:
    """Copy the adapters' values into the models' PEFT modules, which have the same shapes."""
    for part, by_path in adapters.items():
        modules = dict(models[part].named_modules())
        for path, adapter in by_path.items():
            layer = modules[path]
            for target, value in (
                (layer.lora_A[NAME].weight, adapter.down),
                (layer.lora_B[NAME].weight, adapter.up),
            ):
                target.copy_(value.reshape(target.shape))
            if adapter.magnitude is not None:
                magnitude = layer.lora_magnitude_vector[NAME].weight
                magnitude.copy_(adapter.magnitude.reshape(magnitude.shape))


def commonest(adapters: Collection[Adapter]) -> tuple[int, float]:
    """The most common rank, and the most common alpha."""
    ranks = Counter(adapter.rank for adapter in adapters)
    alphas = Counter(adapter.alpha for adapter in adapters)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


def peft_config(adapters: dict[str, Adapter]) -> LoraConfig:
    """PEFT's configuration for a part's adapters, with full module names.

    Raises UserError if only some are DoRA: PEFT has one setting for all.
    """
    is_dora = {adapter.magnitude is not None for adapter in adapters.values()}
    if len(is_dora) > 1:
        raise UserError(
            "some of the LoRA's modules are DoRA and others are not; such a LoRA can only be "
            "merged: python -m trainer.export LORA TARGET --merge"
        )
    rank, alpha = commonest(adapters.values())
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too
        rank_pattern={n: a.rank for n, a in adapters.items() if a.rank != rank},
        alpha_pattern={n: a.alpha for n, a in adapters.items() if a.alpha != alpha},
        target_modules=sorted(adapters),
        use_dora=is_dora.pop(),
    )


@contextmanager
def attached(model: nn.Module, adapters: dict[str, Adapter], scale: float = 1.0) -> Iterator[None]:
    """Within the block the model, one part, computes with `scale` times what these adapters change.

    As in training, they are separate modules in fp32 beside the model's weights, which neither
    change nor lose anything in rounding, and may be quantized.  For DoRA the scale leads in a
    straight line from the model to it.
    """
    if not adapters or scale == 0:
        yield
        return
    config = peft_config(adapters)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        inject_adapter_in_model(config, model)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, LoraLayer)}
    try:
        for layer in layers.values():
            for own in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                own.float()
        fill({"": model}, {"": adapters})
        for layer in layers.values():
            if not config.use_dora:
                layer.scale_layer(scale)
            elif scale != 1:
                layer.register_forward_hook(partial(_towards, scale))  # type: ignore[attr-defined]
        yield
    finally:
        for name, layer in layers.items():
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, layer.get_base_layer())
        vars(model).pop("peft_config", None)  # PEFT's record of what it has added


def _towards(scale: float, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook: the point at `scale` on the line from what the base layer computes to the
    output."""
    return torch.lerp(layer.base_layer(*inputs), output, scale)
