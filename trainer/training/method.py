"""What is trained: every weight (`full`) or adapters (`lora`, `lokr`, `loha`), of the UNet and
optionally of the text encoders."""

import logging
import re

import torch
from diffusers.training_utils import cast_training_params
from peft import inject_adapter_in_model
from torch import Tensor, nn

from optim import rng
from trainer.config import AdapterConfig, MethodConfig, RankConfig
from trainer.config.method import TRAINABLE_PARTS, rank_of
from trainer.errors import UserError
from trainer.formats import adapters
from trainer.models.model import Model
from trainer.models.quantization import Quantized
from trainer.streams import Stream
from trainer.training import groups, start

log = logging.getLogger(__name__)

_ADAPTED = (nn.Linear, nn.Conv2d)


def attach(config: MethodConfig, model: Model, seed: int, start_from: str | None = None) -> None:
    """Make the parameters that `config` trains require gradients; add adapters first (fp32, and
    without any effect, or with the values of the file `start_from`).

    A text encoder's layers whose output is unused are not trained and get no adapter.  (kohya's
    scripts write one of zeros, which readers of LoRA files do not need.)
    Raises UserError for a part that the model lacks or a target that matches no module.
    """
    _require_gradients(config, model)
    if not isinstance(config, AdapterConfig):
        return
    layers = _trainable_layers(config, model)
    modules = _adapted_layers(config, layers)
    ranks = _ranks(config, modules)
    for part in config.train:
        _add_adapters(config, part, model.trained_parts[part], modules[part], ranks, seed)
    if start_from:
        found, spare = start.read(start_from, model, layers)
        start.refuse_others(model.trained_parts, found, layers)
        adapters.fill(model.trained_parts, found)
        log.info("adapters start from %s", start_from)
        if spare:
            log.info("  leaving out %d for layers whose output is unused", spare)


def check(config: MethodConfig, model: Model, start_from: str | None = None) -> None:
    """Refuse targets and rules that match nothing in the model, and start adapters that differ from
    the run's: before encoding, which may take hours, and before the UNet is loaded."""
    if isinstance(config, AdapterConfig) or config.rules:
        empty = attached_on_meta(config, model)
        groups.assigned(nn.ModuleDict(empty.trained_parts), config.rules)
        if isinstance(config, AdapterConfig) and start_from:
            with torch.device("meta"):
                bare = model.on_meta(config.train)
                _require_gradients(config, bare)
            layers = _trainable_layers(config, bare)
            found, _ = start.read(start_from, bare, layers)
            start.refuse_others(empty.trained_parts, found, layers)


def attached_on_meta(config: MethodConfig, model: Model) -> Model:
    """The model as `attach` will make it, without any values."""
    with torch.device("meta"):
        empty = model.on_meta(config.train)
        attach(config, empty, seed=0)
    return empty


def _require_gradients(config: MethodConfig, model: Model) -> None:
    """Require gradients of the trained parts, except of layers whose output is unused."""
    for part in config.train:
        model.trained_parts[part].requires_grad_(True).train()
    if model.text_encoder:
        model.text_encoder.freeze_unused()


def saved_tensors(model: Model) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, by part and name (unet.conv_in.weight): those that
    training changes, and adapters' that `method.rules` freezes, which may be of
    `method.start_from`."""
    return {
        f"{part}.{name}": parameter.detach()
        for part, module in model.trained_parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or adapters.split(name)
    }


def trained_parameters(model: Model) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by part and name."""
    return {
        f"{part}.{name}": parameter
        for part, module in model.trained_parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def restore(model: Model, weights: dict[str, Tensor]) -> None:
    """Restore checkpointed tensors.  Raises UserError, before any is written, if names, shapes or
    dtypes differ."""
    own = saved_tensors(model)
    for name in sorted(own.keys() | weights.keys()):
        here, there = (
            f"{x.dtype} {tuple(x.shape)}" if x is not None else "absent"
            for x in (own.get(name), weights.get(name))
        )
        if here != there:
            raise UserError(
                f"the checkpoint does not fit the model: {name} is {there} in the checkpoint and "
                f"{here} in the model"
            )
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _trainable_layers(config: AdapterConfig, model: Model) -> dict[str, list[str]]:
    """The linear and convolution layers of each trained part that may have adapters: those whose
    output is used (all of a quantized UNet)."""
    return {
        part: [
            name
            for name, layer in model.trained_parts[part].named_modules()
            if isinstance(layer, Quantized)
            or (isinstance(layer, _ADAPTED) and layer.weight.requires_grad)
        ]
        for part in config.train
    }


def _adapted_layers(config: AdapterConfig, layers: dict[str, list[str]]) -> dict[str, list[str]]:
    """The layers of each part that the configured targets select."""
    keys = {part: "targets" if part == "unet" else "text_targets" for part in config.train}
    return {
        part: _matching(layers[part], part, key, getattr(config, key)) for part, key in keys.items()
    }


def _ranks(config: AdapterConfig, modules: dict[str, list[str]]) -> dict[str, RankConfig]:
    """The modules, by part and name, whose rank is not `method.rank`.

    Raises UserError for a pattern that matches none, or only modules of earlier patterns.
    """
    names = [f"{part}.{name}" for part, found in modules.items() for name in found]
    chosen = {name: rank_of(config.ranks, name) for name in names}
    for number, one in enumerate(config.ranks):
        if not any(found is one for found in chosen.values()):
            raise UserError(
                f"method.ranks[{number}]: {one.pattern} matches no adapted module that earlier "
                f"patterns leave (modules are named like {names[0]}); correct or remove it"
            )
    return {name: one for name, one in chosen.items() if one}


def _add_adapters(
    config: AdapterConfig,
    part: str,
    module: nn.Module,
    layers: list[str],
    ranks: dict[str, RankConfig],
    seed: int,
) -> None:
    """Add adapters to `layers`; nothing else in the module is trained.  ranks: `_ranks`."""
    kind = adapters.of_method(config.name)
    number = () if part == "unet" else (TRAINABLE_PARTS.index(part),)
    own = {name: ranks[f"{part}.{name}"] for name in layers if f"{part}.{name}" in ranks}
    shared = {
        "r": config.rank,
        "target_modules": layers,
        "rank_pattern": {name: one.rank for name, one in own.items()},
        "alpha_pattern": {name: one.alpha for name, one in own.items() if one.alpha is not None},
    }
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(rng.mix(seed, Stream.ADAPTER, *number) >> 1)
        inject_adapter_in_model(kind.new(config, shared), module.requires_grad_(False))
        for layer in adapters.layers(module).values():
            kind.prepare(layer)
    cast_training_params(module, torch.float32)


def _matching(layers: list[str], part: str, key: str, patterns: list[str]) -> list[str]:
    """A part's trainable `layers` whose names end with a match of a pattern."""
    found: set[str] = set()
    for pattern in patterns:
        end = re.compile(rf"(^|\.)({pattern})$")
        matched = [name for name in layers if end.search(name)]
        if not matched:
            raise UserError(
                f"method.{key}={patterns}: {pattern} matches no linear or convolution layer of the "
                f"{part.replace('_', ' ')} whose output is used"
            )
        found.update(matched)
    return sorted(found)
