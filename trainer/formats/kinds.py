"""Identify a checkpoint file by its tensors' names and shapes; for a model that cannot be trained,
the error says what it is and what to do."""

from pathlib import Path

from trainer.errors import UserError
from trainer.formats.names import PREFIXES
from trainer.formats.weights import Weights

_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_BARE_UNET = (
    "input_blocks.0.0.weight",
    "conv_in.weight",
    "diffusion_model.input_blocks.0.0.weight",
)
_OTHERS = {  # name prefixes that no other model uses
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "a Flux",
    "double_blocks.": "a Flux",
    "joint_blocks.": "a Stable Diffusion 3",
    "cond_stage_model.model.": "a Stable Diffusion 2",
    "control_model.": "a ControlNet",
    "edm_": "an SDXL of EDM's parametrisation (CosXL, Playground 2.5)",
    "conditioner.embedders.0.model.": "the SDXL refiner",
}
_LORA = ("lora_unet_", "lora_te", "unet.", "text_encoder.", "text_encoder_2.", "base_model.model.")
_ADAPTERS = {  # by how their tensors' names end
    "LoRA": (".lora_down.weight", ".lora_A.weight"),
    "LoHa": (".hada_w1_a",),
    "LoKr": (".lokr_w1", ".lokr_w1_a"),
}


def adapters_in(weights: Weights) -> str | None:
    """What the file holds instead of a model, a LoRA, a LoHa or a LoKr; None for a model."""
    for kind, endings in _ADAPTERS.items():
        if any(name.endswith(endings) for name in weights):
            return kind
    is_other = any(name.startswith(_LORA) and "lora" in name.lower() for name in weights)
    return "LoRA" if is_other else None


def has_unet(weights: Weights) -> bool:
    """Whether the file holds a UNet as whole checkpoints do; other parts may be missing."""
    return _CONV_IN in weights


def of_checkpoint(weights: Weights, where: Path) -> str:
    """`sdxl` or `sd15`, by the file's text encoders.  Raises UserError for other models."""
    if kind := adapters_in(weights):
        raise UserError(
            f"{where} is a {kind}, not a model; name the checkpoint that it belongs to, an SDXL or "
            "Stable Diffusion 1.5 one, as model.path"
        )
    for prefix, what in _OTHERS.items():
        if any(name.startswith(prefix) for name in weights):
            raise UserError(
                f"{where} is {what} checkpoint; as single files, only SDXL (base) and Stable "
                "Diffusion 1.x can be read"
            )
    if _CONV_IN not in weights:
        if any(name in weights for name in _BARE_UNET):
            raise UserError(
                f"{where} holds only a UNet; put it into the unet folder of a model in diffusers "
                "layout, and name that folder"
            )
        some = next(iter(weights), "no tensor")
        raise UserError(
            f"{where} is not a Stable Diffusion checkpoint: it has {some}, but no {_CONV_IN}"
        )
    for kind, prefixes in PREFIXES.items():
        if any(name.startswith(prefixes["text_encoder"]) for name in weights):
            channels = weights[_CONV_IN].shape[1]
            check_channels(channels, where)
            _all_parts(weights, kind, where)
            return kind
    raise UserError(
        f"{where} has a UNet but no text encoder (conditioner.embedders.0.transformer.* or "
        "cond_stage_model.transformer.*); use the whole checkpoint, or a diffusers folder"
    )


def check_channels(channels: int, where: Path) -> None:
    """Refuse a UNet with inputs besides the noisy latent.  channels: its first convolution's."""
    if channels != 4:
        what = {9: "an inpainting model", 8: "an image-editing model"}.get(channels, "another kind")
        raise UserError(
            f"{where}: its UNet takes {channels} channels, so it is {what}; only models with "
            "latents of 4 channels can be trained: use the base model"
        )


def _all_parts(weights: Weights, kind: str, where: Path) -> None:
    for part, prefix in PREFIXES[kind].items():
        if not any(name.startswith(prefix) for name in weights):
            raise UserError(
                f"{where} has no {part} ({prefix}*); use the whole checkpoint, or a diffusers "
                "folder"
            )
