"""The result of a run: the trained model or adapter in the formats of other programs.

Each file is read back and compared with the trained tensors (`trainer.formats`).
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import (
    DTYPES,
    AdapterConfig,
    Config,
    LokrConfig,
    MethodConfig,
    words_of,
)
from trainer.errors import UserError
from trainer.formats import lora, metadata, schedulers, thumbnail, writing
from trainer.models.model import Model
from trainer.system import disk

log = logging.getLogger(__name__)


def check(method: MethodConfig, model: Model) -> None:
    """Raise UserError for a format that the model has no layout in, before anything is trained."""
    instead = "" if "diffusers" in words_of(method, "export") else "method=lora "
    for form in method.export:
        if form != "diffusers" and model.origin.kind == "other":
            raise UserError(
                f"method.export={method.export}: {form} is for SDXL and Stable Diffusion 1.x, and "
                f"{model.origin} is another model; set {instead}method.export=[diffusers]"
            )


def write(
    config: Config,
    name: str,
    model: Model,
    folder: Path,
    step: int,
    counted: Mapping[str, Any],
) -> list[Path]:
    """Write the result in the formats of `method.export`; returns the files and folders written.

    A full fine-tune: `diffusers`, the whole pipeline in `folder/model`; `single_file`,
    `folder/NAME.safetensors`.  A LoRA: `kohya`, `folder/lora/NAME.safetensors`; `diffusers`,
    `folder/lora/pytorch_lora_weights.safetensors` (a run of that name has NAME-kohya beside it).
    counted: further metadata of a LoRA, on its data.
    Raises UserError if a file cannot be written, or does not read back equal.
    """
    method = config.method
    dtype = None if method.export_dtype is None else DTYPES[method.export_dtype]
    parts: dict[str, Any] = {part: model.trained_parts[part] for part in method.train}
    if not isinstance(method, AdapterConfig) and model.vae_origin is not model.origin:
        parts["vae"] = model.vae_origin
    more_metadata = described(asdict(config), step, counted)
    written = []
    for form in method.export:
        if isinstance(method, AdapterConfig):
            target = folder / "lora" / f"{lora.FORMATS[form].stem(name)}.safetensors"
            told = more_metadata | schedulers.described_lora(model.scheduler)
            lora.save_lora(target, form, parts, model.origin.kind, dtype, told)
        elif form == "single_file":
            target = folder / f"{name}.safetensors"
            told = of_model(more_metadata)
            writing.save_single_file(target, model.origin, parts, model.scheduler, dtype, told)
        else:
            target = folder / "model"
            writing.save_folder(target, model.origin, parts, model.scheduler, dtype)
        written.append(target)
    if isinstance(method, AdapterConfig) and model.scheduler != model.origin.config("scheduler"):
        written.append(_write_scheduler(model, folder / "lora/scheduler"))
    return written


def _write_scheduler(model: Model, folder: Path) -> Path:
    """Write the scheduler that an adapter was trained with, for which LoRA formats have no
    place."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.scheduler, indent=2) + "\n"
    disk.replace_text(folder / "scheduler_config.json", text)
    log.warning("load this adapter with the scheduler in %s", folder)
    return folder


def described(
    config: dict[str, Any], step: int, counted: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Metadata: how it was trained, under the keys of kohya's scripts, which model managers show,
    the words of `method.metadata`, and the public part of the configuration under a key of our own.

    counted: more of kohya's keys, on the data; none if unknown.
    """
    model, data = config["model"], config["data"]
    side = max(data.get("resolutions") or [data["resolution"]])
    resolution = f"{side}x{side}"
    known: dict[str, Any] = {
        "ss_steps": step,
        "ss_optimizer": config["optim"]["name"],
        "ss_learning_rate": config["optim"].get("lr", ""),
        "ss_lr_scheduler": config["schedule"]["name"],
        "ss_seed": config["seed"],
        "ss_resolution": resolution,
        "ss_sd_model_name": Path(model["path"]).name,
        "ss_batch_size_per_device": data["batch_size"],
        "ss_mixed_precision": "bf16" if "bfloat16" in (model["dtype"], model["compute"]) else "no",
        "ss_network_args": _lycoris_arguments(config["method"]),
        metadata.RESOLUTION: resolution,
        metadata.TRAINER: json.dumps({"config": _public(config), "step": step}),
        **(counted or {}),
    }
    told = {key: str(value) for key, value in known.items() if value is not None}
    return told | _words(config["method"].get("metadata") or {})


def _lycoris_arguments(method: Mapping[str, Any]) -> str | None:
    """The arguments with which LyCORIS trains such a LoKr; None for other methods."""
    if method["name"] != LokrConfig.name:
        return None
    both = {"decompose_both": "True"} if method["decompose_both"] else {}
    return json.dumps({"algo": "lokr", "factor": str(method["factor"] or -1), **both})


def of_model(described: Mapping[str, str]) -> dict[str, str]:
    """The part of `described` that is for a whole model: without kohya's keys, and without the
    resolution, as a model has its own."""
    others = ("ss_", metadata.RESOLUTION)
    return {key: value for key, value in described.items() if not key.startswith(others)}


def _words(given: Mapping[str, str | None]) -> dict[str, str]:
    """`method.metadata` under modelspec's keys."""
    words = {key: word for key, word in given.items() if word is not None}
    if "thumbnail" in words:
        try:
            words["thumbnail"] = thumbnail.data_url(words["thumbnail"])
        except UserError as error:  # moved since the run began; no reason to lose the result
            log.warning("%s; the file gets no thumbnail", error)
            del words["thumbnail"]
    return {f"modelspec.{key}": word for key, word in words.items()}


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is private or of no use elsewhere (paths, captions, prompts)
    or has its own keys.  Of model paths the last part is kept."""
    public = copy.deepcopy(config)
    public["method"].pop("metadata", None)
    for private in ("resume", "log"):
        del public[private]
    for private in ("path", "sources", "cache", "caption_prefix", "caption_suffix"):
        del public["data"][private]
    for group, key in (("model", "path"), ("model", "vae"), ("method", "start_from")):
        if public[group].get(key):
            public[group][key] = Path(public[group][key]).name
    return public
