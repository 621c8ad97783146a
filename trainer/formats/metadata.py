"""Metadata of checkpoint and LoRA files: prediction type, terminal SNR, and the configurations of
parts that are not the published ones."""

import inspect
import json
import logging
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers

from trainer.errors import UserError
from trainer.formats import architectures, stream
from trainer.formats.adapters import Adapters, commonest

log = logging.getLogger(__name__)

RESOLUTION = "modelspec.resolution"
TRAINER = "trainer"  # JSON: how a run of this trainer made it
CONFIGS = "low_memory_trainer.configs"  # JSON: part -> its configuration
V_PRED, ZTSNR = "v_pred", "ztsnr"  # empty tensors that ComfyUI looks for

_NOISE = {  # the keys of a scheduler's configuration that define the noise, and their defaults
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SPEC = {  # modelspec's architecture name, and the resolution it was trained at
    "sdxl": ("stable-diffusion-xl-v1-base", 1024),
    "sd15": ("stable-diffusion-v1", 512),
}
# LyCORIS's arguments for DoRA with one scale per row of the weight.
_DORA = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
BASE_VERSION = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}


def noise(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's configuration that defines the noise a model is trained on."""
    return {key: scheduler.get(key, default) for key, default in _NOISE.items()}


def marks(scheduler: dict[str, Any]) -> list[str]:
    """The empty tensors that mark a single file's prediction type and terminal SNR."""
    of = noise(scheduler)
    if of["prediction_type"] != "v_prediction":
        return []
    return [V_PRED, ZTSNR] if of["rescale_betas_zero_snr"] else [V_PRED]


def marked_scheduler(
    scheduler: dict[str, Any], names: Container[str], metadata: dict[str, str]
) -> dict[str, Any]:
    """`scheduler` with the changes that a file's marks imply.

    `v_pred` and `ztsnr` are empty tensors; `modelspec.prediction_type` is `epsilon` or `v`.
    """
    kind = metadata.get("modelspec.prediction_type", "")
    if V_PRED not in names and not kind.startswith("v"):
        return scheduler
    marked = scheduler | {"prediction_type": "v_prediction"}
    return marked | zero_snr(scheduler) if ZTSNR in names else marked


def scheduler_with(lora: Path, described: Mapping[str, str], own: dict[str, Any]) -> dict[str, Any]:
    """The scheduler of a model with a LoRA: the model's `own`, changed to the noise that the LoRA
    was trained with if its metadata, `described`, says that it predicts v."""
    says = described.get("ss_v_parameterization", described.get("modelspec.prediction_type"))
    if says is None:
        return own
    if says not in ("True", "v"):
        if noise(own)["prediction_type"] == "v_prediction":
            log.warning(
                "%s was trained to predict noise, and its model predicts v; the model's scheduler "
                "is used",
                lora,
            )
        return own
    is_zero = described.get("ss_zero_terminal_snr") == "True"
    changed = marked_scheduler(own, [V_PRED, ZTSNR] if is_zero else [V_PRED], {})
    if noise(changed) == noise(own):
        return own
    log.info("%s: with the scheduler that the LoRA was trained with (v-prediction)", lora)
    return changed


def zero_snr(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that give a scheduler's configuration zero terminal SNR (Lin et al. 2023,
    arXiv 2305.08891): betas rescaled, sampling from the last timestep on ("trailing").

    A class that cannot rescale, such as PNDM, becomes DDIM, which by default, unlike the others,
    clips predicted latents to [-1, 1]; that is turned off.
    """
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    options = inspect.signature(getattr(diffusers, scheduler["_class_name"])).parameters
    if "rescale_betas_zero_snr" in options:
        return changes
    return changes | {"_class_name": "DDIMScheduler", "clip_sample": False}


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
    marked = marked_scheduler(published, marks(configs["scheduler"]), {})
    if other or noise(marked) != noise(configs["scheduler"]):
        other["scheduler"] = configs["scheduler"]
    key = "force_zeros_for_empty_prompt"
    if configs["index"].get(key, False) != architectures.config(kind, "index").get(key, False):
        other["index"] = architectures.config(kind, "index") | {
            key: configs["index"].get(key, False)
        }
    unet_size = configs["unet"].get("sample_size") or 0
    levels = len(configs["vae"]["block_out_channels"]) - 1
    side = unet_size * 2**levels or _SPEC[kind][1]
    is_v = noise(configs["scheduler"])["prediction_type"] == "v_prediction"
    described = _modelspec(_SPEC[kind][0], title, side)
    described["modelspec.prediction_type"] = "v" if is_v else "epsilon"
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


def prediction(scheduler: dict[str, Any]) -> dict[str, str]:
    """A LoRA's metadata on the noise it was trained with, which whoever loads it must set: the keys
    of modelspec and of kohya's scripts."""
    of = noise(scheduler)
    is_v = of["prediction_type"] == "v_prediction"
    return {
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "ss_v_parameterization": str(is_v),
        "ss_zero_terminal_snr": str(bool(of["rescale_betas_zero_snr"])),
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
    every = [adapter for by_path in adapters.values() for adapter in by_path.values()]
    rank, alpha = commonest(every)
    is_dora = any(adapter.magnitude is not None for adapter in every)
    described = {
        "ss_network_module": "lycoris.kohya" if is_dora else "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps(_DORA if is_dora else {}),
        "ss_output_name": title,
        stream.SSHS: "",
    }
    if kind not in _SPEC:
        return described
    described |= {"ss_base_model_version": BASE_VERSION[kind], "ss_v2": "False"}
    architecture, side = _SPEC[kind]
    return described | _modelspec(f"{architecture}/lora", title, side)
