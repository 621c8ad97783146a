"""A run's checkpoint as its result: the original model with the trained tensors, or a LoRA."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import (
    DTYPES,
    FullConfig,
    ModelConfig,
    NoiseConfig,
    RankConfig,
    of_saved,
    schema_of,
    with_usual,
)
from trainer.config.method import rank_of
from trainer.errors import UserError
from trainer.export import extraction, loras, models
from trainer.export.request import Request
from trainer.formats import adapters, schedulers, writing
from trainer.formats.hub import why_missing
from trainer.formats.names import canonical
from trainer.formats.weights import Weights, of_file
from trainer.models.model import Model
from trainer.objective.trained_scheduler import scheduler_config
from trainer.storage import checkpoint, result

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Saved:
    """What an export needs from a checkpoint."""

    folder: Path
    model: ModelConfig  # that training started from
    sketch: str  # of that model
    noise: NoiseConfig
    method: dict[str, Any]
    metadata: dict[str, str]
    parts: dict[str, Weights]  # as they are exported


def convert(folder: Path, request: Request) -> None:
    """Export a checkpoint; --base and --variant name the original model if that has moved."""
    saved = _saved(folder)
    if _averages(folder, saved.method):
        log.info("exporting the averaged weights")
    has_adapters = saved.method["name"] != FullConfig.name
    if has_adapters:
        kind = schema_of("method", saved.method["name"]).title
        request.refuse_extract(f"{folder} is a {kind}'s checkpoint")
    else:
        request.refuse_merge(f"{folder} is a checkpoint of a full fine-tune")
        request.refuse_rank(f"{folder} is a checkpoint of a full fine-tune")
    _locate(saved, request)
    if request.merge and request.base is None:
        request = with_original(_original(saved), request)
    (_export_lora if has_adapters else _export_model)(saved, request)


def original(folder: Path, request: Request) -> Model:
    """The model that this checkpoint's run started from.  Raises UserError if that is not there any
    more, or has changed."""
    saved = _saved(folder)
    _locate(saved, request)
    return _original(saved)


def with_original(model: Model, request: Request) -> Request:
    """A request to merge, which names no --base, with this model as the base."""
    log.info("merging into the model that the run started from: %s", model.config.path)
    return replace(request, base=model.config.path, variant=model.config.variant)


def _locate(saved: _Saved, request: Request) -> None:
    """Take the place of the original model from the request, if it says so."""
    if request.base is None and why_missing("model.path", saved.model.path):
        raise UserError(
            f"the model that {saved.folder} started from is no longer at {saved.model.path}; give "
            "its new location: --base=MODEL"
        )
    saved.model.path = request.base or saved.model.path
    saved.model.variant = request.variant or saved.model.variant


def _saved(folder: Path) -> _Saved:
    record = checkpoint.verified(folder, without="optimizer.pt")
    try:
        config = record["config"]
        groups = ("model", "data", "noise", "method", "schedule")
        config |= {group: with_usual(group, config[group]) for group in groups}
        return _Saved(
            folder=folder,
            model=of_saved("model", ModelConfig, config["model"]),
            sketch=record["model"],
            noise=of_saved("noise", NoiseConfig, config["noise"]),
            method=config["method"],
            metadata=result.described(config, record["step"], record.get("counted")),
            parts=_by_part(_exported_weights(folder, config["method"])),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is from another version: {error}") from error


def _export_lora(saved: _Saved, request: Request) -> None:
    base = loras.base_model(saved.model.path, saved.model.variant, request.merge)
    own = base.config("scheduler")
    trained = scheduler_config(saved.noise, own)
    if not request.merge:  # a merged model has its own scheduler
        _warn_of_noise(trained, own)
    held = _adapters_of(saved.parts, saved.method)
    told = saved.metadata | schedulers.described_lora(trained)
    loras.write(saved.folder, request, "kohya", base, held, told)


def _export_model(saved: _Saved, request: Request) -> None:
    model = _original(saved)
    base = model.origin
    scheduler = scheduler_config(saved.noise, model.scheduler)
    tuned = {
        part: {canonical(part, name): lazy for name, lazy in weights.items()}
        for part, weights in saved.parts.items()
    }
    if request.extract:
        whole = {part: base.weights(part) | weights for part, weights in tuned.items()}
        whole["vae"] = model.vae_origin.weights("vae")
        extraction.write(saved.folder, request, base, whole, scheduler, saved.metadata)
        return
    parts: dict[str, writing.PartSource] = {
        part: _in_training(saved.model, part, base.weights(part)) | weights
        for part, weights in tuned.items()
    }
    if model.vae_origin is not base:
        parts["vae"] = model.vae_origin
    models.write(request, base, parts, scheduler, result.of_model(saved.metadata))


def _in_training(config: ModelConfig, part: str, weights: Weights) -> Weights:
    """The original weights of a trained part in the dtype that they had in the run, as its own
    result has those that were not trained."""
    dtype = DTYPES[config.dtype if part == "unet" else config.text_dtype]
    return {
        name: lazy.to(dtype) if lazy.dtype.is_floating_point else lazy
        for name, lazy in weights.items()
    }


def _original(saved: _Saved) -> Model:
    """The model that training started from.  Raises UserError if another one is in its place."""
    model = Model(saved.model, torch.device("cpu"), option="--base")
    if saved.sketch != model.sketch():
        raise UserError(
            f"the model at {saved.model.path} is not the one that {saved.folder} started from, so "
            "the untrained weights would be wrong; give the location of the original: --base=MODEL"
        )
    return model


def _warn_of_noise(trained: dict[str, Any], own: dict[str, Any]) -> None:
    """Warn if a LoRA was trained with another noise schedule than its model's."""
    if schedulers.noise(trained) != schedulers.noise(own):
        log.warning(
            "the adapter needs another noise schedule than the model's: load it with the scheduler "
            "in the run's lora/scheduler"
        )


def _averages(folder: Path, method: dict[str, Any]) -> Weights:
    """A checkpoint's averaged weights; none if it has none, or `method.ema.export` does not ask for
    them.  (An optimizer's own average is always exported.)"""
    path, ema = folder / "average.safetensors", method.get("ema")
    is_wanted = path.is_file() and (ema is None or ema["export"] == "average")
    return of_file(path)[0] if is_wanted else {}


def _exported_weights(folder: Path, method: dict[str, Any]) -> Weights:
    """A checkpoint's tensors as its run would export them: the averages if it has some and would
    export them, in the weights' dtype."""
    weights = of_file(folder / "weights.safetensors")[0]
    averages = _averages(folder, method)
    return weights | {name: lazy.to(weights[name].dtype) for name, lazy in averages.items()}


def _by_part(weights: Weights) -> dict[str, Weights]:
    """A checkpoint's tensors (`unet.conv_in.weight`), part by part."""
    parts: dict[str, Weights] = {}
    for name, lazy in weights.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = lazy
    return parts


def _adapters_of(parts: dict[str, Weights], method: dict[str, Any]) -> adapters.Adapters:
    """PEFT's parameters (`PATH.lora_A.default.weight`) and the run's options -> adapters."""
    kind = adapters.of_method(method["name"])
    ranks = [RankConfig(**one) for one in method.get("ranks", [])]
    held: adapters.Adapters = {}
    for part, weights in parts.items():
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, lazy in weights.items():
            if found := adapters.split(name):
                path, attribute = found
                tensors.setdefault(path, {})[kind.peft_names[attribute]] = lazy.read()
        for path, of_path in tensors.items():
            own = rank_of(ranks, f"{part}.{path}")
            rank = method["rank"] if own is None else own.rank
            alpha = method["alpha"] if own is None or own.alpha is None else own.alpha
            alpha *= rank**0.5 if method.get("rslora") else 1.0
            adapter = kind.trained(f"{part}.{path}", of_path, rank, alpha)
            held.setdefault(part, {})[path] = adapter
    return held
