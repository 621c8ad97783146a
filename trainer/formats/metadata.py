"""Metadata of checkpoint and LoRA files: modelspec, kohya's keys, and the configurations of parts
that are not the published ones."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.formats import architectures, schedulers, stream
from trainer.formats.adapter import Adapter, commonest
from trainer.formats.adapters import Adapters, all_of

log = logging.getLogger(__name__)

RESOLUTION = "modelspec.resolution"
TRAINER = "trainer"  # JSON: how a run of this trainer made it
CONFIGS = "low_memory_trainer.configs"  # JSON: part -> its configuration

_SPEC = {  # modelspec's architecture name, and the resolution it was trained at
    "sdxl": ("stable-diffusion-xl-v1-base", 1024),
    "sd15": ("stable-diffusion-v1", 512),
}
BASE_VERSION = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}


def stored_configs(metadata: dict[str, str], where: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a file written by this trainer carries; {} for other files."""
    if CONFIGS not in metadata:
        return {}
    try:
        configs = json.loads(metadata[CONFIGS])
        if not all(isinstance(configs[part], dict) for part in configs):
            raise TypeError("no configurations by name")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: its metadata {CONFIGS} cannot be read: {error}") from error
    return {
        part: configs[part]
        for part in configs
        if part in (*architectures.WEIGHT_PARTS, "scheduler", "index")
    }


def checkpoint(kind: str, configs: dict[str, dict[str, Any]], title: str) -> dict[str, str]:
    """The metadata of a whole model in one file: modelspec 1.0.1, and the configurations that
    differ from the published ones.  configs: of every part, `scheduler` and `index`.

    https://github.com/Stability-AI/ModelSpec
    """
    other = {
        part: settings
        for part, settings in configs.items()
        if part in architectures.WEIGHT_PARTS
        and not architectures.is_published(kind, part, settings)
    }
    published = architectures.config(kind, "scheduler")
    own, told = configs["scheduler"], schedulers.described(configs["scheduler"])
    marked = schedulers.marked(published, schedulers.marks(own), told)
    is_said = schedulers.noise(marked) == schedulers.noise(own) and not schedulers.is_flow(own)
    if other or not is_said:
        other["scheduler"] = own
    key = "force_zeros_for_empty_prompt"
    if configs["index"].get(key, False) != architectures.config(kind, "index").get(key, False):
        other["index"] = architectures.config(kind, "index") | {
            key: configs["index"].get(key, False)
        }
    unet_size = configs["unet"].get("sample_size") or 0
    levels = len(configs["vae"]["block_out_channels"]) - 1
    side = unet_size * 2**levels or _SPEC[kind][1]
    described = _modelspec(_SPEC[kind][0], title, side) | told
    return described | ({CONFIGS: json.dumps(other)} if other else {})


def _modelspec(architecture: str, title: str, side: int) -> dict[str, str]:
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        RESOLUTION: f"{side}x{side}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        stream.HASH: "",
    }


def carried(described: Mapping[str, str]) -> dict[str, str]:
    """A LoRA's metadata on its training and title, for another file with the same LoRA.

    Hashes of the tensors are left out: they belong to the file itself.
    """
    return {
        key: value
        for key, value in described.items()
        if key.startswith(("ss_", "modelspec.", TRAINER)) and key != stream.HASH
    }


def without_rank(described: Mapping[str, str]) -> dict[str, str]:
    """A LoRA's metadata without what it says of ranks, for a LoRA of another rank."""
    old = ("ss_network_dim", "ss_network_alpha", "ss_network_args")
    return {key: value for key, value in described.items() if key not in old}


def lora(kind: str, adapters: Adapters, title: str) -> dict[str, str]:
    """The metadata of a LoRA: modelspec, and those of kohya's `ss_` keys that programs sort by.
    The training data (`ss_tag_frequency`) is not disclosed."""
    every = all_of(adapters)
    rank, alpha = commonest(every)
    kinds: Counter[type[Adapter]] = Counter(type(adapter) for adapter in every)
    most = kinds.most_common(1)[0][0]
    module, arguments = most.network([adapter for adapter in every if type(adapter) is most])
    described = {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(arguments),
        "ss_output_name": title,
        stream.SSHS: "",
    }
    if kind not in _SPEC:
        return described
    described |= {"ss_base_model_version": BASE_VERSION[kind], "ss_v2": "False"}
    architecture, side = _SPEC[kind]
    return described | _modelspec(f"{architecture}/lora", title, side)
