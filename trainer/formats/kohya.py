"""LoRA files as kohya's scripts, A1111 and ComfyUI use them.

A name is a module's path with `_` for `.`, then the tensor: `lora_unet_..._to_q.lora_down.weight`,
`.lora_up.weight`, `.alpha` (0-d) and, for DoRA, `.dora_scale`.  As in kohya's scripts, the UNet's
paths are sgm's for SDXL and diffusers' for Stable Diffusion 1.x; both are read for either model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.formats.adapters import Adapter, Adapters, OtherModel, module_names
from trainer.formats.names import canonical, unet_name
from trainer.formats.weights import Weights

PREFIXES = {
    "sdxl": {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te2_",
    },
    "sd15": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
}
_OTHER_KINDS = {  # other adapters (LyCORIS etc.), by their tensors' suffix
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "lora_mid.weight": "a Tucker-decomposed LoCon",
    "diff": "a full difference",
    "diff_b": "a difference of biases",
    "w_norm": "a norm's weight",
    "a1.weight": "GLoRA",
}
_WANTED = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")


def is_own(weights: Weights) -> bool:
    """Whether a LoRA file's names are in this format."""
    return any(name.startswith(("lora_unet_", "lora_te")) for name in weights)


def encode(
    adapters: Adapters, kind: str, unet_config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """Adapters -> a file's tensors.  unet_config: of the UNet that they belong to."""
    tensors = {}
    for part, found in adapters.items():
        for path, adapter in found.items():
            name = PREFIXES[kind][part] + _path(part, path, kind, unet_config).replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = adapter.down
            tensors[f"{name}.lora_up.weight"] = adapter.up
            tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
            if adapter.magnitude is not None:
                ones = [1] * (adapter.down.ndim - 1)
                tensors[f"{name}.dora_scale"] = adapter.magnitude.reshape(-1, *ones)
    return tensors


def _path(part: str, path: str, kind: str, unet_config: Mapping[str, Any] | None) -> str:
    if part != "unet":
        return canonical(part, path)
    return unet_name(path, dict(unet_config or {})) if kind == "sdxl" else path


def decode(weights: Weights, models: Mapping[str, nn.Module], where: str) -> Adapters:
    """A file's tensors -> adapters of the models' modules.  Raises UserError for a module that the
    models lack, or a tensor that is not part of a LoRA."""
    known = _known(models)
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, lazy in weights.items():
        base, _, what = name.partition(".")
        if what not in _WANTED:
            kind = _OTHER_KINDS.get(what)
            raise UserError(
                f"{where}: {name} is "
                + (f"of {kind}; only LoRA and DoRA can be read" if kind else "of an unknown kind")
            )
        if base not in known:
            raise OtherModel(f"{where}: {_stranger(base, models)}")
        grouped.setdefault(base, {})[what] = lazy.read()
    adapters: Adapters = {}
    for base, tensors in grouped.items():
        part, path = known[base]
        adapters.setdefault(part, {})[path] = _adapter(f"{where}: {base}", tensors)
    return adapters


def _known(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every name that a file may use for a module of these models -> its part and own name."""
    known = {}
    for part, model in models.items():
        config: Any = model.config
        for path in module_names(model):
            if part == "unet":
                for name in (path, unet_name(path, config)):
                    known["lora_unet_" + name.replace(".", "_")] = (part, path)
                continue
            for prefixes in PREFIXES.values():
                if part in prefixes:
                    whole = canonical(part, path)
                    # Some writers drop this level.
                    for name in (whole, whole.removeprefix("text_model.")):
                        known[prefixes[part] + name.replace(".", "_")] = (part, path)
    return known


def _stranger(base: str, models: Mapping[str, nn.Module]) -> str:
    for prefixes in PREFIXES.values():
        for part, prefix in prefixes.items():
            if base.startswith(prefix) and part not in models:
                return (
                    f"{base} belongs to the {part}, which this model lacks or method.train leaves "
                    "out"
                )
    return f"{base} matches no module of this model; the LoRA is for another model"


def _adapter(where: str, tensors: dict[str, Tensor]) -> Adapter:
    for what in ("lora_down.weight", "lora_up.weight"):
        if what not in tensors:
            raise UserError(f"{where}.{what} is missing; the file is damaged")
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    magnitude = tensors.get("dora_scale")
    if magnitude is not None:
        if magnitude.shape[0] != up.shape[0] or magnitude.numel() != up.shape[0]:
            raise UserError(
                f"{where}.dora_scale is {tuple(magnitude.shape)}: it scales the weight's columns, "
                "and DoRA here scales its rows; it cannot be read"
            )
        magnitude = magnitude.flatten()
    alpha = float(tensors["alpha"]) if "alpha" in tensors else float(down.shape[0])
    return Adapter(down=down, up=up, alpha=alpha, magnitude=magnitude)
