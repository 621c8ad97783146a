"""LoRA files as diffusers' pipelines save and load them: `unet.PATH.lora_A.weight`, with PEFT's
configuration of each part in the metadata; without it readers assume alpha = rank."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.config.method import TRAINABLE_PARTS
from trainer.errors import UserError
from trainer.formats.adapters import Adapter, Adapters, OtherModel, module_names, peft_config
from trainer.formats.names import canonical
from trainer.formats.weights import Weights

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


def encode(adapters: Adapters) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Adapters -> a file's tensors and its metadata."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for part, found in adapters.items():
        for path, adapter in found.items():
            name = f"{part}.{canonical(part, path)}"
            tensors[f"{name}.lora_A.weight"] = adapter.down
            tensors[f"{name}.lora_B.weight"] = adapter.up
            if adapter.magnitude is not None:
                # PEFT writes no `.weight` and reads both; transformers 5 needs `.weight`.
                shape = (1, -1, 1, 1) if adapter.down.ndim == 4 else (-1,)
                tensors[f"{name}.lora_magnitude_vector.weight"] = adapter.magnitude.reshape(shape)
        if found:
            config = peft_config({_short(part, path): a for path, a in found.items()}).to_dict()
            described |= {f"{part}.{key}": _plain(value) for key, value in config.items()}
    return tensors, {METADATA: json.dumps(described, sort_keys=True)}


def _short(part: str, path: str) -> str:
    """A text encoder's module name without the level that transformers 5 dropped: PEFT matches
    modules by suffix, so this name works with every version."""
    return path.removeprefix("text_model.") if part.startswith("text_encoder") else path


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def decode(
    weights: Weights, metadata: Mapping[str, str], models: Mapping[str, nn.Module], where: str
) -> Adapters:
    """A file's tensors -> adapters of the models' modules.  Raises UserError for a module that the
    models lack, or a tensor that is not part of a LoRA."""
    known = {
        f"{part}.{canonical(part, path)}": (part, path)
        for part, model in models.items()
        for path in module_names(model)
    }
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, lazy in weights.items():
        base, what = _split(name)
        part = name.partition(".")[0]
        if part.startswith("text_encoder"):
            base = f"{part}.{canonical(part, base.removeprefix(f'{part}.'))}"
        if what is None:
            raise UserError(
                f"{where}: {name} is of an unknown kind; only LoRA and DoRA can be read"
            )
        if base not in known:
            raise OtherModel(
                f"{where}: {name} belongs to the {part}, which this model lacks or method.train "
                "leaves out"
                if part in TRAINABLE_PARTS and part not in models
                else (
                    f"{where}: {base} matches no module of this model; the LoRA is for another "
                    "model"
                )
            )
        grouped.setdefault(base, {})[what] = lazy.read()
    alphas = _Alphas(metadata, where)
    adapters: Adapters = {}
    for base, tensors in grouped.items():
        part, path = known[base]
        adapters.setdefault(part, {})[path] = _adapter(
            f"{where}: {base}", tensors, part, path, alphas
        )
    return adapters


def _split(name: str) -> tuple[str, str | None]:
    """`unet.x.to_q.lora_A.weight` -> (`unet.x.to_q`, `down`)."""
    old = re.fullmatch(r"(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", name)
    if old:
        module = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{module}", old[3]
    for suffix, what in _SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), what
    return name, None


class _Alphas:
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


def _adapter(
    where: str, tensors: dict[str, Tensor], part: str, path: str, alphas: _Alphas
) -> Adapter:
    for what in ("down", "up"):
        if what not in tensors:
            raise UserError(f"{where} has no {what} projection; the file is damaged")
    down, up = tensors["down"], tensors["up"]
    magnitude = tensors.get("magnitude")
    own_alpha = tensors.get("alpha")
    return Adapter(
        down=down,
        up=up,
        alpha=alphas.of(part, path, down.shape[0]) if own_alpha is None else float(own_alpha),
        magnitude=None if magnitude is None else magnitude.flatten(),
    )
