"""LoRA files as diffusers' pipelines save and load them: `unet.PATH.lora_A.weight`, with PEFT's
configuration of each part in the metadata; without it readers assume alpha = rank."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.config.method import TRAINABLE_PARTS
from trainer.errors import UserError
from trainer.formats.adapter import Lora
from trainer.formats.adapters import Adapters, are_loras, module_names, peft_config
from trainer.formats.names import canonical

METADATA = "lora_adapter_metadata"
STEM = "pytorch_lora_weights"  # the file name that diffusers writes and looks for
_SUFFIXES = {  # current ones, and those of 2023
    ".lora_A.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".alpha": "alpha",
}


def stem(run: str) -> str:
    """The stem of a run's file."""
    return STEM


def refuse(target: Path, base: str, adapters: Adapters) -> None:
    """Raise UserError if the format cannot hold these adapters."""
    if not are_loras(adapters):
        raise UserError(
            f"{target}: diffusers' format is for LoRAs, and these are LyCORIS's adapters; use "
            "kohya's, or merge them: python -m trainer.export FILE TARGET --merge --base=MODEL"
        )


def encode(
    adapters: Adapters, base: str, unet_config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """Adapters -> a file's tensors, whose names are the same for every model."""
    tensors: dict[str, Tensor] = {}
    for part, by_path in adapters.items():
        for path, adapter in by_path.items():
            assert isinstance(adapter, Lora)  # diffusers reads no others of these models
            name = f"{part}.{canonical(part, path)}"
            tensors[f"{name}.lora_A.weight"] = adapter.down
            tensors[f"{name}.lora_B.weight"] = adapter.up
            if adapter.magnitude is not None:
                # PEFT writes no `.weight` and reads both; transformers 5 needs `.weight`.
                shape = (1, -1, 1, 1) if adapter.down.ndim == 4 else (-1,)
                tensors[f"{name}.lora_magnitude_vector.weight"] = adapter.magnitude.reshape(shape)
    return tensors


def described(adapters: Adapters) -> dict[str, str]:
    """The format's own metadata: PEFT's configuration of each part."""
    options: dict[str, Any] = {}
    for part, by_path in adapters.items():
        config = peft_config({_short(part, path): a for path, a in by_path.items()}).to_dict()
        options |= {f"{part}.{key}": _plain(value) for key, value in config.items()}
    return {METADATA: json.dumps(options, sort_keys=True)}


def _short(part: str, path: str) -> str:
    """A text encoder's module name without the level that transformers 5 dropped: PEFT matches
    modules by suffix, so this name works with every version."""
    return path.removeprefix("text_model.") if part.startswith("text_encoder") else path


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def modules(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """The name in a file of every module of these models -> its part and own name."""
    return {
        f"{part}.{canonical(part, path)}": (part, path)
        for part, model in models.items()
        for path in module_names(model)
    }


def part_of(module: str) -> str | None:
    """The part that a module's name in a file begins with, if any."""
    part = module.partition(".")[0]
    return part if part in TRAINABLE_PARTS else None


def split(name: str) -> tuple[str, str | None]:
    """`unet.x.to_q.lora_A.weight` -> (`unet.x.to_q`, `down`)."""
    module, tensor = _split(name)
    part, _, path = module.partition(".")
    is_text = part.startswith("text_encoder")
    return (f"{part}.{canonical(part, path)}" if is_text else module), tensor


def _split(name: str) -> tuple[str, str | None]:
    old = re.fullmatch(r"(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", name)
    if old:
        module = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{module}", old[3]
    for suffix, tensor in _SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), tensor
    return name, None


class Alphas:
    """The alpha of each module, from a file's metadata."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        try:
            self._all: dict[str, Any] = json.loads(metadata.get(METADATA, "{}"))
        except ValueError as error:
            raise UserError(f"{where}: its metadata {METADATA} cannot be read: {error}") from error

    def of(self, part: str, path: str, rank: int) -> float:
        """The alpha for readers that divide by the rank; the rank itself if none is given."""
        alpha = self._all.get(f"{part}.lora_alpha", rank)
        for pattern, value in (self._all.get(f"{part}.alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):  # like PEFT: the first match
                alpha = value
                break
        return float(alpha) * (rank**0.5 if self._all.get(f"{part}.use_rslora") else 1.0)
