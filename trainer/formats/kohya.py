"""LoRA files as kohya's scripts, A1111 and ComfyUI use them, and LyCORIS's.

A name is a module's path with `_` for `.`, then the tensor: `lora_unet_..._to_q.lora_down.weight`,
`.lora_up.weight`, `.alpha` (0-d) and, for DoRA, `.dora_scale`; LyCORIS's `.lokr_w1`, `.hada_w1_a`,
...  As in kohya's scripts, the UNet's paths are sgm's for SDXL and diffusers' for Stable Diffusion
1.x; both are read for either model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.formats import diffusers_lora
from trainer.formats.adapter import Lora
from trainer.formats.adapters import KINDS, Adapters, are_loras, module_names
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
_TENSORS = {  # by how their names end
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **{name: name for kind in KINDS if kind is not Lora for name in kind.peft_names},  # LyCORIS's
}
_ENDINGS = {tensor: ending for ending, tensor in _TENSORS.items()}


def is_own(weights: Weights) -> bool:
    """Whether a LoRA file's names are in this format."""
    return any(name.startswith(("lora_unet_", "lora_te")) for name in weights)


def stem(run: str) -> str:
    """The stem of a run's file: not that of diffusers' file, even where case is ignored."""
    return f"{run}-kohya" if run.lower() == diffusers_lora.STEM else run


def refuse(target: Path, base: str, adapters: Adapters) -> None:
    """Raise UserError if the format has no names for this base model's modules."""
    if base not in PREFIXES:
        raise UserError(
            f"{target}: kohya's format is for SDXL and Stable Diffusion 1.x; "
            + ("use diffusers'" if are_loras(adapters) else "LyCORIS's adapters have no other")
        )


def encode(
    adapters: Adapters, base: str, unet_config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """Adapters -> a file's tensors.  base: as for `lora.save_lora`.  unet_config: of the UNet that
    they belong to."""
    tensors = {}
    for part, by_path in adapters.items():
        for path, adapter in by_path.items():
            name = PREFIXES[base][part] + _path(part, path, base, unet_config).replace(".", "_")
            for own, tensor in adapter.tensors().items():
                if own == "magnitude":
                    ones = [1] * (len(adapter.shape) - 1)
                    tensors[f"{name}.dora_scale"] = tensor.reshape(-1, *ones)
                else:
                    tensors[f"{name}.{_ENDINGS[own]}"] = tensor
            tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
    return tensors


def described(adapters: Adapters) -> dict[str, str]:
    """The format's own metadata: none."""
    return {}


def _path(part: str, path: str, base: str, unet_config: Mapping[str, Any] | None) -> str:
    if part != "unet":
        return canonical(part, path)
    return unet_name(path, dict(unet_config or {})) if base == "sdxl" else path


def split(name: str) -> tuple[str, str | None]:
    """`lora_unet_x_to_q.lora_down.weight` -> (`lora_unet_x_to_q`, `down`)."""
    module, _, ending = name.partition(".")
    return module, _TENSORS.get(ending)


def part_of(module: str) -> str | None:
    """The part that a module's name in a file begins with, if any."""
    parts = {prefix: part for named in PREFIXES.values() for part, prefix in named.items()}
    return next((part for prefix, part in parts.items() if module.startswith(prefix)), None)


def modules(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Every name that a file may use for a module of these models -> its part and own name."""
    named = {}
    for part, model in models.items():
        config: Any = model.config
        for path in module_names(model):
            if part == "unet":
                for name in (path, unet_name(path, config)):
                    named["lora_unet_" + name.replace(".", "_")] = (part, path)
                continue
            for prefixes in PREFIXES.values():
                if part in prefixes:
                    whole = canonical(part, path)
                    # Some writers drop this level.
                    for name in (whole, whole.removeprefix("text_model.")):
                        named[prefixes[part] + name.replace(".", "_")] = (part, path)
    return named
