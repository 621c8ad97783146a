"""Conversion of models and LoRAs between formats: identifying what a path holds, and writing it."""

import logging
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from trainer.config import ModelConfig, NoiseConfig
from trainer.config.model import why_missing
from trainer.errors import UserError
from trainer.formats import (
    adapters,
    architectures,
    diffusers_lora,
    kinds,
    kohya,
    lora,
    metadata,
    writing,
)
from trainer.formats.metadata import BASE_VERSION
from trainer.formats.names import canonical
from trainer.formats.weights import PICKLED, Weights, of_file
from trainer.models import origin
from trainer.models.model import Model
from trainer.objective import noise
from trainer.reporting import report
from trainer.storage import checkpoint, result

log = logging.getLogger(__name__)

_LORA_NAME = f"{diffusers_lora.STEM}.safetensors"


def convert(
    source: str,
    target: Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    base: str | None = None,
    variant: str | None = None,
) -> None:
    """Write `source` as `target`; the arguments are those of `python -m trainer.export`.

    Raises UserError for what cannot be read, written or verified.
    """
    kind = getattr(torch, dtype) if dtype else None
    _check_target(target)
    named = Path(source).expanduser()
    path = _in_run(named)
    if (path / "checkpoint.json").is_file():
        _export_checkpoint(path, target, form, kind, base, variant)
    elif (path / _LORA_NAME).is_file():
        _export_lora(path / _LORA_NAME, target, form, kind, base, variant)
    elif path.is_file() and kinds.is_lora(of_file(path)[0]):
        if path != named:  # the same default for a run's result as for its checkpoints
            form = form or "kohya"
        _export_lora(path, target, form, kind, base, variant)
    else:
        if wrong := why_missing("SOURCE", source):
            raise UserError(wrong)
        if base:
            raise UserError(f"--base={base} has no effect: {path} is a model, not a LoRA")
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise UserError(
                f"{path} is not a model, LoRA or run: it has no model_index.json, no {_LORA_NAME} "
                "and no checkpoint"
            )
        found = origin.at(str(path) if path.exists() else source, variant, "SOURCE")
        _write_model(target, found, {}, form, kind)


def _check_target(target: Path) -> None:
    """Refuse a target that exists, or whose suffix is that of a file type that is not written."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; name another target, or remove it")
    ending = target.suffix
    if ending != ".safetensors" and ending.lower() in (".safetensors", ".sft", *PICKLED):
        raise UserError(
            f"{target} ends in {ending}: single files are written as .safetensors; name it "
            f"{target.with_suffix('.safetensors').name}, or drop the suffix for a folder"
        )


def _in_run(path: Path) -> Path:
    """What to convert for a run's folder: its model, its LoRA, or its last checkpoint."""
    if not path.is_dir() or (path / "model_index.json").is_file():
        return path
    every = checkpoint.completed(path / "checkpoints") or checkpoint.completed(path)
    found = path / "model"
    if not (found / "model_index.json").is_file():
        loras = (path / "lora").glob("*.safetensors")
        first = min(loras, key=lambda file: (file.name == _LORA_NAME, file.name), default=None)
        if not first:
            return (every or [path])[-1]
        found = first
    if every and checkpoint.step_of(every[-1]) > (step := _finished(path)):
        log.warning(
            "%s is from step %d, and the run has continued since; use %s for its last checkpoint",
            found,
            step,
            every[-1],
        )
    return found


def _finished(run: Path) -> float:
    """The step of a run's result; infinite if unknown."""
    step = report.result_step(report.read_summary(run))
    return math.inf if step is None else step


def _write_model(
    target: Path,
    found: origin.Origin,
    parts: dict[str, writing.Given],
    form: str | None,
    dtype: torch.dtype | None,
    scheduler: dict[str, Any] | None = None,
    more_metadata: dict[str, str] | None = None,
) -> None:
    """more_metadata: for a single file; a folder has none."""
    if form == "kohya":
        raise UserError(
            f"--format=kohya is for LoRAs, and {found} is a model: use diffusers or single_file"
        )
    form = form or ("single_file" if target.suffix == ".safetensors" else "diffusers")
    log.info("%s -> %s (%s)", found, target, form)
    if form == "diffusers":
        writing.save_folder(target, found, parts, scheduler, dtype)
        return
    _must_be_safetensors(target)
    writing.save_single_file(target, found, parts, dtype, scheduler, more_metadata)


def _must_be_safetensors(target: Path) -> None:
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors, the format that is written")


def _export_lora(
    path: Path,
    target: Path,
    form: str | None,
    dtype: torch.dtype | None,
    base: str | None,
    variant: str | None,
) -> None:
    found = _base_of(path, base, variant)
    held = lora.read(path, _empty(found))
    weights, described = of_file(path)
    form = form or ("diffusers" if kohya.is_own(weights) else "kohya")
    _write_lora(path, target, form, dtype, found, held, metadata.carried(described))


def _write_lora(
    source: Path,
    target: Path,
    form: str,
    dtype: torch.dtype | None,
    base: origin.Origin,
    held: adapters.Adapters,
    more_metadata: dict[str, str],
) -> None:
    """more_metadata: added to the file's own."""
    if form == "single_file":
        raise UserError(
            f"--format=single_file is for models, and {source} is a LoRA: use kohya or diffusers"
        )
    _must_be_safetensors(target)
    log.info("%s -> %s (a LoRA in %s format)", source, target, form)
    lora.save_lora(target, form, _empty(base), base.kind, dtype, more_metadata, adapters=held)


def _base_of(path: Path, base: str | None, variant: str | None) -> origin.Origin:
    """The base model of a LoRA."""
    if base is None:
        version = of_file(path)[1].get("ss_base_model_version", "")
        named = [kind for kind, known in BASE_VERSION.items() if version.startswith(known)]
        fits = [kind for kind in named or BASE_VERSION if _fits(path, kind)]
        if len(fits) == 1:
            base = fits[0]
        elif known := _trained_on(path):
            base, own = known
            variant = variant or own
            log.info("base model of the LoRA: %s (from its run's config.yaml)", base)
        else:
            raise UserError(
                f"{path} fits {' and '.join(fits) or 'neither SDXL nor Stable Diffusion 1.5'}; "
                "name its base model: --base=MODEL"
            )
    return _named(base, variant)


def _named(base: str, variant: str | None = None) -> origin.Origin:
    """The model that --base names."""
    is_published = base in architectures.PUBLISHED
    path = str(architectures.folder(base)) if is_published else base
    return origin.at(path, variant, "--base")


def _trained_on(path: Path) -> tuple[str, str | None] | None:
    """The model that a LoRA in a run's `lora` folder was trained on, and its variant, from the
    run's configuration; None for a file that is in no run."""
    above = path.resolve().parents  # RUN/lora, or RUN/results/STEP/lora
    run = next((p for p in above[1:4] if (p / "config.yaml").is_file()), None)
    if above[0].name != "lora" or run is None:
        return None
    try:
        model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
        return str(model["path"]), model.get("variant")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _fits(path: Path, kind: str) -> bool:
    try:
        lora.read(path, _empty(_named(kind)))
    except adapters.OtherModel:
        return False
    return True


@cache  # takes a second for SDXL
def _empty(found: origin.Origin) -> dict[str, nn.Module]:
    """The parts of a model that a LoRA may adapt, without weights."""
    return {
        part: architectures.empty(part, found.config(part))
        for part in architectures.WEIGHT_PARTS
        if found.has(part) and part != "vae"
    }


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


def _export_checkpoint(
    folder: Path,
    target: Path,
    form: str | None,
    dtype: torch.dtype | None,
    base: str | None,
    variant: str | None,
) -> None:
    """Export a run's checkpoint: its original model with the trained tensors, or a LoRA.

    base, variant: the original model's location and variant, if they have changed.
    """
    saved = _saved(folder)
    if base is None and why_missing("model.path", saved.model.path):
        raise UserError(
            f"the model that {folder} started from is no longer at {saved.model.path}; give its "
            "new location: --base=MODEL"
        )
    saved.model.path = base or saved.model.path
    saved.model.variant = variant or saved.model.variant
    export = _export_saved_lora if saved.method["name"] == "lora" else _export_saved_model
    export(saved, target, form, dtype)


def _saved(folder: Path) -> _Saved:
    record = checkpoint.verified(folder, without="optimizer.pt")
    try:
        config = record["config"]
        return _Saved(
            folder=folder,
            model=ModelConfig(**config["model"]),
            sketch=record["model"],
            noise=NoiseConfig(**config["noise"]),
            method=config["method"],
            metadata=result.described(config, record["step"]),
            parts=_by_part(_exported_weights(folder, config["method"].get("ema"))),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder} is from another version: {error}") from error


def _export_saved_lora(
    saved: _Saved, target: Path, form: str | None, dtype: torch.dtype | None
) -> None:
    found = _named(saved.model.path, saved.model.variant)
    own = found.config("scheduler")
    trained = noise.scheduler_config(saved.noise, own)
    _warn_of_noise(trained, own)
    held = _adapters_of(saved.parts, saved.method)
    told = saved.metadata | metadata.prediction(trained)
    _write_lora(saved.folder, target, form or "kohya", dtype, found, held, told)


def _export_saved_model(
    saved: _Saved, target: Path, form: str | None, dtype: torch.dtype | None
) -> None:
    model = Model(saved.model, torch.device("cpu"), option="--base")
    if saved.sketch != model.sketch():
        raise UserError(
            f"the model at {saved.model.path} is not the one that {saved.folder} started from, so "
            "the untrained weights would be wrong; give the location of the original: --base=MODEL"
        )
    found = model.origin
    parts: dict[str, writing.Given] = {
        part: found.weights(part) | {canonical(part, name): lazy for name, lazy in weights.items()}
        for part, weights in saved.parts.items()
    }
    if model.vae_origin is not found:
        parts["vae"] = model.vae_origin
    scheduler = noise.scheduler_config(saved.noise, model.scheduler)
    trainer = {metadata.TRAINER: saved.metadata[metadata.TRAINER]}
    _write_model(target, found, parts, form, dtype, scheduler, trainer)


def _warn_of_noise(trained: dict[str, Any], own: dict[str, Any]) -> None:
    """Warn if a LoRA was trained with another noise schedule than its model's."""
    if metadata.noise(trained) != metadata.noise(own):
        log.warning(
            "the adapter needs another noise schedule than the model's: load it with the scheduler "
            "in the run's lora/scheduler"
        )


def _exported_weights(folder: Path, ema: dict[str, Any] | None) -> Weights:
    """A checkpoint's tensors as its run would export them: the averages if `method.ema.export` asks
    for them, in the weights' dtype."""
    weights = of_file(folder / "weights.safetensors")[0]
    if not ema or ema["export"] != "average":
        return weights
    log.info("exporting the averaged weights (method.ema.export)")
    averages = of_file(folder / "average.safetensors")[0]
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
    ending = f".{adapters.NAME}.weight"
    held: adapters.Adapters = {}
    for part, weights in parts.items():
        for name, lazy in weights.items():
            if not name.endswith(f".lora_A{ending}"):
                continue
            path = name.removesuffix(f".lora_A{ending}")
            rank = lazy.shape[0]
            magnitude = weights.get(f"{path}.lora_magnitude_vector{ending}")
            held.setdefault(part, {})[path] = adapters.Adapter(
                down=lazy.read(),
                up=weights[f"{path}.lora_B{ending}"].read(),
                alpha=method["alpha"] * (rank**0.5 if method.get("rslora") else 1.0),
                magnitude=None if magnitude is None else magnitude.read().flatten(),
            )
    return held
