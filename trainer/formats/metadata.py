"""What files say about themselves: prediction type and terminal SNR, and the parts' configurations
where they are not the published ones."""

import inspect
import json
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers

from trainer.errors import UserError
from trainer.formats import architectures, stream
from trainer.formats.adapters import Adapters, commonest

RESOLUTION = "modelspec.resolution"
TRAINER = "trainer"  # JSON: how a run of ours trained it
CONFIGS = "low_memory_trainer.configs"  # JSON: part -> its configuration
V_PRED, ZTSNR = "v_pred", "ztsnr"  # empty tensors that ComfyUI looks for

_NOISE = {  # what of a scheduler's configuration decides the noise, and what it is by default
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SPEC = {  # modelspec's architecture, and the side of the pictures it was trained on
    "sdxl": ("stable-diffusion-xl-v1-base", 1024),
    "sd15": ("stable-diffusion-v1", 512),
}
# As LyCORIS's arguments say it: a scale for each row of the weight.
_DORA = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
BASE_VERSION = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}


def noise(scheduler: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler's configuration says of the noise that a model is trained on."""
    return {key: scheduler.get(key, default) for key, default in _NOISE.items()}


def marks(scheduler: dict[str, Any]) -> list[str]:
    """The empty tensors that say in a single file what its UNet predicts."""
    of = noise(scheduler)
    if of["prediction_type"] != "v_prediction":
        return []
    return [V_PRED, ZTSNR] if of["rescale_betas_zero_snr"] else [V_PRED]


def marked_scheduler(
    scheduler: dict[str, Any], names: Container[str], metadata: dict[str, str]
) -> dict[str, Any]:
    """`scheduler` with what a file's marks change in it.

    `v_pred` and `ztsnr` are empty tensors; `modelspec.prediction_type` is `epsilon` or `v`.
    """
    kind = metadata.get("modelspec.prediction_type", "")
    if V_PRED not in names and not kind.startswith("v"):
        return scheduler
    marked = scheduler | {"prediction_type": "v_prediction"}
    return marked | zero_snr(scheduler) if ZTSNR in names else marked


def zero_snr(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that give a scheduler's configuration zero terminal SNR (Lin et al. 2023,
    arXiv 2305.08891): betas rescaled, sampling from the last timestep on ("trailing").

    A class that cannot rescale, such as PNDM, becomes DDIM, which can; and which unless told would
    clip to [-1, 1] what it predicts of latents, as others do not.
    """
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    options = inspect.signature(getattr(diffusers, scheduler["_class_name"])).parameters
    if "rescale_betas_zero_snr" in options:
        return changes
    return changes | {"_class_name": "DDIMScheduler", "clip_sample": False}


def stored_configs(metadata: dict[str, str], where: Path) -> dict[str, dict[str, Any]]:
    """The configurations that a file of ours carries; none in others."""
    if CONFIGS not in metadata:
        return {}
    try:
        found = json.loads(metadata[CONFIGS])
        if not all(isinstance(found[part], dict) for part in found):
            raise TypeError("no configurations by name")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: its metadata {CONFIGS} cannot be read: {error}") from error
    return {
        part: found[part]
        for part in found
        if part in (*architectures.WEIGHT_PARTS, "scheduler", "index")
    }


def checkpoint(kind: str, configs: dict[str, dict[str, Any]], title: str) -> dict[str, str]:
    """The metadata of a whole model in one file: modelspec 1.0.1, and the configurations that the
    published ones do not say.  configs: of every part, `scheduler` and `index`.

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
    """What a LoRA's metadata says of the noise that it was trained on, which whoever loads it must
    set: modelspec's key, and those of kohya's scripts."""
    of = noise(scheduler)
    is_v = of["prediction_type"] == "v_prediction"
    return {
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "ss_v_parameterization": str(is_v),
        "ss_zero_terminal_snr": str(bool(of["rescale_betas_zero_snr"])),
    }


def carried(described: Mapping[str, str]) -> dict[str, str]:
    """What a LoRA's metadata says of its training and its title, for another file of it.

    What is of the file itself is not: the hashes of its tensors.
    """
    return {
        key: value
        for key, value in described.items()
        if key.startswith(("ss_", "modelspec.", TRAINER)) and key != stream.HASH
    }


def lora(kind: str, adapters: Adapters, title: str) -> dict[str, str]:
    """The metadata of a LoRA: modelspec, and of kohya's `ss_` keys those that programs sort by.
    What was trained on (`ss_tag_frequency`) is not told."""
    every = [adapter for found in adapters.values() for adapter in found.values()]
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
