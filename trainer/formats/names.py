"""Tensor names in diffusers' folders and in a single checkpoint file: one table for both
directions.

A single file uses the names of the code that Stable Diffusion and SDXL were published with: `sgm`'s
for the UNet, `ldm`'s for the VAE, Hugging Face's for the first text encoder, and for SDXL's second
one OpenCLIP's, which has q, k and v in one matrix and the projection transposed.

Diffusers' names here are those in its folders: a text encoder's begin with `text_model.`, which
transformers 5 dropped from the module (`canonical`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.formats.weights import Lazy, Weights

PREFIXES = {  # of each part's tensors in a single file
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd15": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
}

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# Names in old files -> current ones.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
NOT_WEIGHTS = ("position_ids", "logit_scale")  # not used for encoding text


Form = Literal["same", "conv", "transposed", "fused"]


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """One tensor of a single file: its name there, and the diffusers tensors that it holds.

    same: one, unchanged.  conv: a Linear's matrix as a 1x1 convolution.  transposed: a matrix,
    transposed.  fused: three, concatenated along rows.
    """

    single: str
    own: tuple[str, ...]
    form: Form = "same"


def canonical(part: str, name: str) -> str:
    """A module's name for one of its tensors or submodules -> its name in a diffusers folder."""
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection")):
        return f"text_model.{name}"
    if part == "vae" and ".attentions." in name:
        head, _, tail = name.rpartition(".")
        start, _, last = head.rpartition(".")
        if last in _OLD_VAE_ATTENTION:
            return f"{start}.{_OLD_VAE_ATTENTION[last]}.{tail}"
    return name


def unet_name(name: str, config: dict[str, Any]) -> str:
    """A UNet's tensor or submodule: diffusers' name -> sgm's, without the prefix."""
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise UserError(f"a UNet with layers_per_block={layers} has no single-file form")
    per_level = layers + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\..+)?", name):
        side, i, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5] or ""
        if kind == "downsamplers":
            return f"input_blocks.{per_level * (i + 1)}.0.op" + rest.removeprefix(".conv")
        if kind == "upsamplers":  # it comes after the level's last resnet and its attention
            index = 2 if config["up_block_types"][i].startswith("CrossAttn") else 1
            return f"output_blocks.{per_level * i + layers}.{index}{rest}"
        block = f"input_blocks.{1 + per_level * i + j}" if side == "down" else ""
        block = block or f"output_blocks.{per_level * i + j}"
        return f"{block}.1{rest}" if kind == "attentions" else f"{block}.0{_inside(rest, _RESNET)}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)(\..+)?", name):
        kind, j, rest = match[1], int(match[2]), match[3] or ""
        if kind == "attentions":
            return f"middle_block.1{rest}"
        return f"middle_block.{2 * j}{_inside(rest, _RESNET)}"
    return _inside(f".{name}", _UNET)[1:]


def _vae_name(name: str, config: dict[str, Any]) -> str:
    levels = len(config["block_out_channels"])
    if match := re.fullmatch(
        r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name
    ):
        coder, side, i, kind, j, rest = match.groups()
        level = f"{coder}.{side}.{i if side == 'down' else levels - 1 - int(i)}"
        if kind != "resnets":
            return f"{level}.{kind.removesuffix('rs')}.{rest}".replace("sample.0.", "sample.")
        return f"{level}.block.{j}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d+)\.(.+)", name):
        coder, kind, j, rest = match.groups()
        if kind == "attentions":
            return f"{coder}.mid.attn_{int(j) + 1}" + _inside(f".{rest}", _VAE_ATTENTION)
        return f"{coder}.mid.block_{int(j) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    return name.replace("conv_norm_out", "norm_out")


def _inside(rest: str, names: dict[str, str]) -> str:
    """`.conv1.weight` -> `.in_layers.2.weight`: rename the leading submodule."""
    for own, single in names.items():
        if rest == f".{own}" or rest.startswith(f".{own}."):
            return f".{single}{rest.removeprefix(f'.{own}')}"
    return rest


def table(part: str, names: Iterable[str], config: dict[str, Any]) -> list[TensorNames]:
    """The entries of a part's tensors, given their names in a diffusers folder."""
    if part == "unet":
        return [TensorNames(single=unet_name(name, config), own=(name,)) for name in names]
    if part == "vae":
        entries = [TensorNames(single=_vae_name(name, config), own=(name,)) for name in names]
        return [_as_convolution(entry) for entry in entries]
    if part == "text_encoder_2":
        return _openclip(names)
    return [TensorNames(single=name, own=(name,)) for name in names]


def _as_convolution(entry: TensorNames) -> TensorNames:
    is_matrix = re.search(r"\.attn_\d+\.(q|k|v|proj_out)\.weight$", entry.single)
    return TensorNames(single=entry.single, own=entry.own, form="conv") if is_matrix else entry


def _openclip(names: Iterable[str]) -> list[TensorNames]:
    entries = []
    for name in names:
        if name in _OPENCLIP:
            form: Form = "transposed" if name == "text_projection.weight" else "same"
            entries.append(TensorNames(single=_OPENCLIP[name], own=(name,), form=form))
            continue
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
        if not match:
            raise UserError(f"text_encoder_2: {name} has no name in a single file")
        block, rest = f"transformer.resblocks.{match[1]}", match[2]
        qkv = re.fullmatch(r"self_attn\.(q|k|v)_proj\.(weight|bias)", rest)
        if qkv is None:
            single = block + _inside(f".{rest}", _OPENCLIP_LAYER)
            entries.append(TensorNames(single=single, own=(name,)))
        elif qkv[1] == "q":
            own = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
            single = f"{block}.attn.in_proj_{qkv[2]}"
            entries.append(TensorNames(single=single, own=own, form="fused"))
    return entries


def to_single(own: Weights, entries: list[TensorNames], prefix: str) -> Weights:
    """A part's tensors, renamed and reshaped for a single file."""
    return {prefix + entry.single: _single(entry, own) for entry in entries}


def _single(entry: TensorNames, own: Weights) -> Lazy:
    first = own[entry.own[0]]
    if entry.form == "fused":
        shape = (3 * first.shape[0], *first.shape[1:])
        return Lazy(
            shape=shape,
            dtype=first.dtype,
            read=lambda: torch.cat([own[name].read() for name in entry.own]),
        )
    if entry.form == "conv":
        shape = (*first.shape, 1, 1)
        return Lazy(shape=shape, dtype=first.dtype, read=lambda: first.read().reshape(shape))
    if entry.form == "transposed":
        return Lazy(shape=first.shape[::-1], dtype=first.dtype, read=lambda: first.read().t())
    return first


def to_own(single: Weights, entries: list[TensorNames], prefix: str) -> Weights:
    """A part's tensors from a single file, with diffusers' names and shapes; those that the file
    lacks are left out."""
    weights: Weights = {}
    for entry in entries:
        if lazy := single.get(prefix + entry.single):
            weights |= _own(entry, lazy)
    return weights


def _own(entry: TensorNames, lazy: Lazy) -> Weights:
    if entry.form == "fused":
        rows = lazy.shape[0] // 3 if lazy.shape else 0
        third = (rows, *lazy.shape[1:])
        return {
            name: Lazy(
                shape=third,
                dtype=lazy.dtype,
                read=partial(_rows, lazy, i * rows, (i + 1) * rows),
            )
            for i, name in enumerate(entry.own)
        }
    read, shape = lazy.read, lazy.shape
    if entry.form == "conv" and shape[2:] == (1, 1):
        shape = shape[:2]
        changed = Lazy(shape=shape, dtype=lazy.dtype, read=lambda: _matrix(read()))
    elif entry.form == "transposed":
        changed = Lazy(shape=shape[::-1], dtype=lazy.dtype, read=lambda: read().t())
    else:
        changed = lazy
    return {entry.own[0]: changed}


def _rows(lazy: Lazy, start: int, end: int) -> Tensor:
    return lazy.read()[start:end]


def _matrix(convolution: Tensor) -> Tensor:
    return convolution.reshape(convolution.shape[:2])
