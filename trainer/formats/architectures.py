"""The published architectures, and modules made from a configuration without weights.

A single file does not describe its architecture, so those of SDXL and Stable Diffusion 1.5 ship as
small JSON files (no download).  Both use the tokenizer that ships with the tiny SDXL.
"""

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.config import ASSETS
from trainer.errors import UserError
from trainer.formats.names import NOT_WEIGHTS, canonical
from trainer.formats.weights import Weights
from trainer.wording import counted

log = logging.getLogger(__name__)

PUBLISHED = ("sdxl", "sd15")
CLASSES: dict[str, type[nn.Module]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
WEIGHT_PARTS = tuple(CLASSES)
# Configuration keys that do not affect the computation.
COMPUTES_NOTHING = (
    "_diffusers_version",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
)


def folder(kind: str) -> Path:
    """The shipped configuration of a published architecture, laid out like a diffusers folder."""
    return ASSETS / "architectures" / kind


@cache
def config(kind: str, part: str) -> dict[str, Any]:
    """A published part's configuration (do not change it)."""
    name = {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}
    path = folder(kind) / name.get(part, f"{part}/config.json")
    return json.loads(path.read_text(encoding="utf-8"))


def tokenizer_folder(part: str) -> Path:
    """CLIP's tokenizer: `tokenizer` pads with the end token, SDXL's `tokenizer_2` with "!"."""
    return ASSETS / "tiny_sdxl" / part


def empty(part: str, settings: dict[str, Any]) -> nn.Module:
    """The module that `settings` describes, its parameters on the meta device."""
    cls: Any = CLASSES[part]
    with torch.device("meta"):
        if part.startswith("text_encoder"):
            return cls(CLIPTextConfig(**settings))
        return cls.from_config(settings)


def is_published(kind: str, part: str, settings: dict[str, Any]) -> bool:
    """Whether `settings` describe the published part of this kind."""
    return _complete(part, settings) == _published(kind, part)


@cache
def _published(kind: str, part: str) -> dict[str, Any]:
    return _complete(part, config(kind, part))


def _complete(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration with its defaults filled in, without keys that compute nothing."""
    described: Any = empty(part, settings).config
    every = described.to_dict() if part.startswith("text_encoder") else dict(described)
    return {
        key: _plain(value)
        for key, value in every.items()
        if key not in COMPUTES_NOTHING and not key.startswith("_")
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shapes(part: str, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of such a part, by its name in a diffusers folder."""
    return dict(_shapes(part, json.dumps(settings)))


@cache
def _shapes(part: str, settings: str) -> dict[str, tuple[int, ...]]:
    state = empty(part, json.loads(settings)).state_dict()
    return {canonical(part, name): tuple(tensor.shape) for name, tensor in state.items()}


def compare(part: str, weights: Weights, wanted: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError for the first tensor that is missing or has another shape, or, in a UNet, is
    not in the architecture; in other parts extra tensors only cause a warning."""
    for name, shape in wanted.items():
        if name not in weights:
            raise UserError(f"{where}: the {part} lacks {name}; the file is incomplete")
        if weights[name].shape != shape:
            raise UserError(
                f"{where}: {name} of the {part} is {weights[name].shape}, and {shape} in this "
                "architecture; it belongs to another model"
            )
    spare = [name for name in weights if name not in wanted and not name.endswith(NOT_WEIGHTS)]
    if spare and part == "unet":
        raise UserError(
            f"{where}: the unet has {spare[0]}, which this architecture does not; it belongs to "
            "another model"
        )
    if spare:
        what = f"tensors of the {part} are not used"
        log.warning("%s: %s, such as %s", where, counted(len(spare), what), spare[0])


def filled(
    part: str,
    settings: dict[str, Any],
    weights: Weights,
    dtype: torch.dtype,
    where: str,
    compress: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The part with `weights` in `dtype`, on the CPU, loaded one tensor at a time; in eval mode.

    compress: is called with each layer as soon as its weight is there.
    Raises UserError if `weights` (named as in a diffusers folder) are incomplete.
    """
    module = empty(part, settings)
    state = module.state_dict()
    name_in_module = {canonical(part, name): name for name in state}
    wanted = {name: tuple(state[name_in_module[name]].shape) for name in name_in_module}
    compare(part, weights, wanted, where)
    for name in wanted:
        # A copy: the module must not share memory with a mapped file.
        tensor = weights[name].read().to(dtype, copy=True).contiguous()
        path, _, last = name_in_module[name].rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._parameters:
            owner.register_parameter(last, nn.Parameter(tensor))
        else:
            owner.register_buffer(last, tensor)
        if compress and last == "weight":
            compress(owner)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # not saved: the module computes it itself
            _restore_positions(module, name, buffer)
    return module.eval()


def _restore_positions(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    owner, _, last = name.rpartition(".")
    assert last == "position_ids", f"{name} is not known"
    positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    module.get_submodule(owner).register_buffer(last, positions, persistent=False)
