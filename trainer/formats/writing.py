"""Writing a whole model, as a diffusers folder or as one file: trained parts from memory, others
from the original model, one tensor at a time.  Every tensor is read back and compared."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import UserError
from trainer.formats import architectures, metadata, names, proof, schedulers, stream
from trainer.formats.folder import find_weights, weights_name
from trainer.formats.origin import Origin
from trainer.formats.single_file import SingleFile
from trainer.formats.weights import Weights, of_module, of_tensors
from trainer.system import disk

log = logging.getLogger(__name__)


PartSource = nn.Module | Weights | Origin  # a module, a part's tensors, or another model


def save_folder(
    target: Path,
    origin: Origin,
    parts: Mapping[str, PartSource],
    scheduler: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a pipeline in diffusers layout to `target`.

    parts: the parts to replace, by name: modules, or tensors named as in a diffusers folder, or
    another origin from which the part (a VAE, say) is taken.  All others are copied from `origin`.
    scheduler: its configuration, if it is not the origin's.  dtype: of all weights except the
    VAE's, which keep their own; None keeps the dtype of every part.
    Raises UserError if it cannot be written, or does not read back equal.
    """
    scheduler = scheduler or origin.config("scheduler")
    sources, configs = _sources(origin, parts)
    count = 0
    with disk.whole_folder(target) as temporary:
        for part, weights in sources.items():
            folder = temporary / part
            folder.mkdir()
            dtypes = _dtypes(part, weights, dtype)
            stream.write(folder / weights_name(part), weights, {}, dtypes)
            config = configs[part]
            if part.startswith("text_encoder"):
                config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
                floating = next(iter(dtypes.values()))
                config["dtype"] = str(floating).removeprefix("torch.")
            _write_json(folder / "config.json", config)
            count += proof.same(find_weights(folder, part, None)[0], weights, dtypes, str(target))
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler/scheduler_config.json", scheduler)
        index = origin.index | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        _write_json(temporary / "model_index.json", _carry_over(origin, index, temporary))
    log.info("%s: %d tensors read back, all equal", target, count)
    return target


def save_single_file(
    target: Path,
    origin: Origin,
    parts: Mapping[str, PartSource],
    scheduler: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    more_metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the model as one .safetensors file, with the names that A1111, ComfyUI and kohya's
    scripts read.  Arguments and errors are those of `save_folder`.

    more_metadata: added to the file's own (`modelspec.*`, and the configurations of parts that do
    not have the published architecture).
    """
    if origin.kind not in names.PREFIXES:
        raise UserError(
            f"{target}: a single file can hold SDXL or Stable Diffusion 1.x; write this model as a "
            "diffusers folder"
        )
    scheduler = scheduler or origin.config("scheduler")
    prefixes = names.PREFIXES[origin.kind]
    sources, configs = _sources(origin, parts)
    single: Weights = {}
    dtypes: dict[str, torch.dtype] = {}
    for part, weights in sources.items():
        entries = names.table(part, weights, configs[part])
        renamed = names.to_single(weights, entries, prefixes[part])
        single |= renamed
        dtypes |= _dtypes(part, renamed, dtype)
    single |= origin.unused()
    single |= of_tensors({name: torch.zeros(0) for name in schedulers.marks(scheduler)})
    configs |= {"scheduler": scheduler, "index": origin.index}
    described = metadata.checkpoint(origin.kind, configs, target.stem) | dict(more_metadata or {})
    with disk.whole_file(target) as temporary:
        stream.write(temporary, single, described, dtypes)
        written = SingleFile(temporary)
        count = sum(
            proof.same(written.weights(part), weights, _dtypes(part, weights, dtype), str(target))
            for part, weights in sources.items()
        )
        if schedulers.noise(written.config("scheduler")) != schedulers.noise(scheduler):
            raise proof.NotProved(f"{target}, read back: it has another noise schedule")
    log.info("%s: %d tensors read back, all equal", target, count)
    return target


def _sources(
    origin: Origin, parts: Mapping[str, PartSource]
) -> tuple[dict[str, Weights], dict[str, dict[str, Any]]]:
    """Every part's tensors by their names in a diffusers folder, and its configuration.

    Raises UserError if the tensors do not match the configuration.
    """
    sources, configs = {}, {}
    for part in architectures.WEIGHT_PARTS:
        if not origin.has(part):
            continue
        source = parts.get(part, origin)
        config = origin.config(part)
        if isinstance(source, nn.Module):
            weights = of_module(source)
        elif isinstance(source, dict):
            weights = source
        else:
            weights, config = source.weights(part), source.config(part)
        if any(".base_layer." in name for name in weights):
            raise UserError(f"the {part} has adapters in it; write them as a LoRA, or merge them")
        weights = {names.canonical(part, name): lazy for name, lazy in weights.items()}
        wanted = architectures.shapes(part, config)
        architectures.compare(part, weights, wanted, str(origin))
        sources[part] = {name: weights[name] for name in wanted}
        configs[part] = config
    return sources, configs


def _dtypes(part: str, weights: Weights, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type that each tensor is written in.

    A VAE keeps its own: SDXL's overflows in fp16, and which VAE this is cannot be determined.
    """
    if dtype is None or part == "vae":
        return {name: lazy.dtype for name, lazy in weights.items()}
    return {
        name: dtype if lazy.dtype.is_floating_point else lazy.dtype
        for name, lazy in weights.items()
    }


def _carry_over(origin: Origin, index: dict[str, Any], target: Path) -> dict[str, Any]:
    """Copy tokenizers and the pipeline's other parts; returns `index` without those missing."""
    kept = dict(index)
    for part, entry in index.items():
        if (target / part).exists() or not isinstance(entry, list) or entry[-1] is None:
            continue
        folder = origin.folder(part)
        if folder.is_dir():
            shutil.copytree(folder, target / part)
        else:  # a safety checker that the hub has and training did not fetch
            kept[part] = [None, None]
    return kept


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
