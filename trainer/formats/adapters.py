"""The adapters of a model, read from PEFT's modules and written back into them."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from trainer.errors import UserError
from trainer.formats.adapter import NAME, Adapter, Lora
from trainer.formats.lycoris import Loha, Lokr

KINDS: tuple[type[Adapter], ...] = (Lora, Lokr, Loha)
_LAYERS = tuple(kind.layer for kind in KINDS)
_ATTRIBUTES = "|".join(name for kind in KINDS for name in kind.peft_names)
_PARAMETER = re.compile(rf"(.+)\.({_ATTRIBUTES})\.{NAME}(?:\.weight)?")


class OtherModel(UserError):
    """The adapters' modules are not in this model, or have other shapes."""


Adapters = dict[str, dict[str, Adapter]]  # part -> the module's name in it -> adapter


def of_models(models: Mapping[str, nn.Module], name: str = NAME) -> Adapters:
    """The adapters called `name` in PEFT's modules, with the scale at which they are applied.

    Raises UserError for adapters that files cannot hold (with a bias, or of an embedding).
    """
    return {
        part: {
            path: _kind_of_layer(layer).of_layer(f"{part}.{path}", layer, name)
            for path, layer in layers(model).items()
            if name in layer.r
        }
        for part, model in models.items()
    }


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's modules."""
    return {path: x for path, x in model.named_modules() if isinstance(x, _LAYERS)}


def _kind_of_layer(layer: Any) -> type[Adapter]:
    return next(kind for kind in KINDS if isinstance(layer, kind.layer))


def split(name: str) -> tuple[str, str] | None:
    """A parameter's name -> the name of PEFT's module, and its attribute there; None if it has
    none: to_q.lora_A.default.weight -> (to_q, lora_A)."""
    found = _PARAMETER.fullmatch(name)
    return (found[1], found[2]) if found else None


def of_method(name: str) -> type[Adapter]:
    """The kind of adapters that `method=` with this name trains."""
    return next(kind for kind in KINDS if kind.method.name == name)


def kind_of(tensors: Collection[str]) -> type[Adapter]:
    """The kind of an adapter whose tensors have these names."""
    others = (kind for kind in KINDS if kind is not Lora)
    return next((k for k in others if not set(tensors).isdisjoint(k.peft_names.values())), Lora)


def all_of(adapters: Adapters) -> list[Adapter]:
    """The adapters of all parts together."""
    return [adapter for by_path in adapters.values() for adapter in by_path.values()]


def are_loras(adapters: Adapters) -> bool:
    """Whether all of them are LoRAs, or DoRAs."""
    return all(isinstance(adapter, Lora) for adapter in all_of(adapters))


def title(adapters: Adapters) -> str:
    """What the adapters are, for a message: LoRA, LoKr, or LoKr and LoRA."""
    return _titles({*map(type, all_of(adapters))})


def module_names(model: nn.Module) -> list[str]:
    """The names of a model's Linear and convolution modules, whether wrapped by adapters or not."""
    names = []
    for name, module in model.named_modules():
        inside = ".base_layer" in name or ".lora_" in name
        if not inside and isinstance(module, (nn.Linear, nn.Conv2d, *_LAYERS)):
            names.append(name)
    return names


def fill(models: Mapping[str, nn.Module], adapters: Adapters) -> None:
    """Copy the adapters' values into the models' PEFT modules, which have the same shapes."""
    for part, by_path in adapters.items():
        modules = dict(models[part].named_modules())
        for path, adapter in by_path.items():
            adapter.fill(modules[path])


def peft_config(adapters: Mapping[str, Adapter]) -> PeftConfig:
    """PEFT's configuration for a part's adapters, with full module names.

    Raises UserError for a mixture that PEFT has no configuration for.
    """
    kinds = {type(adapter) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise UserError(
            f"its modules have adapters of several kinds ({_titles(kinds)}); such a file can only "
            "be merged: python -m trainer.export FILE TARGET --merge"
        )
    return kinds.pop().config(adapters)


def _titles(kinds: Collection[type[Adapter]]) -> str:
    return " and ".join(sorted(kind.method.title for kind in kinds))


@contextmanager
def attached(model: nn.Module, adapters: dict[str, Adapter], scale: float = 1.0) -> Iterator[None]:
    """Within the block the model, one part, computes with `scale` times what these adapters change.

    As in training, they are separate modules in fp32 beside the model's weights, which neither
    change nor lose anything in rounding, and may be quantized.
    """
    if not adapters or scale == 0:
        yield
        return
    config = peft_config(adapters)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        inject_adapter_in_model(config, model)
    adapted = layers(model)
    try:
        for path, adapter in adapters.items():
            adapter.apply(adapted[path], scale)
        yield
    finally:
        for name, layer in adapted.items():
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, layer.get_base_layer())
        vars(model).pop("peft_config", None)  # PEFT's record of what it has added
