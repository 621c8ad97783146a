"""Models on the hub: which names may be theirs, and their download, only of what training reads.

No ONNX or Flax files, and no single files beside a pipeline's folders.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UserError, reason

log = logging.getLogger(__name__)

_PICKLED = ("*.bin", "*.bin.index.json")  # in repositories older than safetensors
_VAE = ("config.json", "vae/config.json")  # in a VAE's own repository, and in a pipeline


def why_missing(option: str, name: str) -> str | None:
    """The error for a `name` that is neither on disk nor a valid name of a hub repository."""
    is_pair = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    is_repository = is_pair and not name.endswith((".safetensors", ".ckpt"))
    if is_repository or Path(name).expanduser().exists():
        return None
    return (
        f"{option}={name} does not exist; name a folder in diffusers layout, a .safetensors or "
        ".ckpt file, or a hub repository (owner/name)"
    )


def pipeline(name: str, variant: str | None, option: str, with_weights: bool = True) -> Path:
    """The folder of a pipeline's snapshot, downloaded if necessary; without weights, only
    tokenizers and configurations.

    Parts without files of `variant` are downloaded in plain form, and as .bin files if they have no
    others.  Raises UserError that names `option` if the repository cannot be loaded.
    """
    from trainer.formats.architectures import WEIGHT_PARTS  # it imports diffusers

    wanted = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    wanted += [f"{part}/config.json" for part in WEIGHT_PARTS]
    if not with_weights:
        return _fetch(name, wanted, None, option)
    folder = _fetch(name, wanted + _weights_of(WEIGHT_PARTS, variant), variant, option)
    there = [part for part in WEIGHT_PARTS if (folder / part).is_dir()]
    if without := _without(folder, there, f"*.{variant}*.safetensors") if variant else []:
        folder = _fetch(name, _weights_of(without, None), None, option)
    if without := _without(folder, there, "*.safetensors"):
        pickled = [f"{part}/{ending}" for part in without for ending in _PICKLED]
        folder = _fetch(name, pickled, None, option)
    return folder


def _without(folder: Path, parts: Iterable[str], pattern: str) -> list[str]:
    return [part for part in parts if not any((folder / part).glob(pattern))]


def vae(name: str, with_weights: bool = True) -> Path:
    """The same for the VAE of model.vae: from its own repository, where its files are at the top
    level, or from a pipeline."""
    weights = [*_weights_of(["vae"], None), "diffusion_pytorch_model.safetensors"]
    return _fetch(name, [*_VAE, *(weights if with_weights else [])], None, "model.vae")


def _weights_of(parts: Iterable[str], variant: str | None) -> list[str]:
    """Patterns for these parts' weights, whole or in shards, and for the shards' index."""
    kind = f".{variant}" if variant else ""
    indexes = {f"*.safetensors.index{kind}.json", f"*{kind}.safetensors.index.json"}
    files = [f"*{kind}*.safetensors" if kind else "*.safetensors", *sorted(indexes)]
    return [f"{part}/{pattern}" for part in parts for pattern in files]


def _fetch(name: str, wanted: list[str], variant: str | None, option: str) -> Path:
    from huggingface_hub import snapshot_download

    if wrong := why_missing(option, name):
        raise UserError(wrong)
    unwanted = [] if variant else ["*.fp16[.-]*", "*.non_ema[.-]*"]
    try:
        log.info("model: %s from the hub, or its cache", name)
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise UserError(
            f"{option}={name} is not a folder or file here, and cannot be loaded from the hub "
            f"({reason(error)}); name a diffusers folder, or a .safetensors file"
        ) from error
