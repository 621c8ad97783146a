"""What is trained: every weight of the UNet (`full`) or adapters on it (`lora`), and how the result
is written for others."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from optim import rng
from trainer import disk
from trainer.config import LoraConfig
from trainer.errors import UserError
from trainer.streams import Stream


def attach(config: Any, pipeline: StableDiffusionXLPipeline, seed: int) -> None:
    """Make the parameters that `config` trains require gradients; for LoRA, add them first (fp32,
    up-projections zero)."""
    unet = pipeline.unet
    if not isinstance(config, LoraConfig):
        unet.requires_grad_(True)
        return
    names = [name for name, _ in unet.named_modules()]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"method.targets={config.targets}: no module of the UNet is called {target}"
            )
    adapter = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(rng.mix(seed, Stream.ADAPTER) >> 1)
        unet.add_adapter(adapter)
    cast_training_params(unet, torch.float32)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put checkpointed tensors back.  Raises UserError, before any is written, when names, shapes
    or dtypes differ."""
    own = trained_tensors(model)
    for name in sorted(own.keys() | weights.keys()):
        here, there = (
            f"{x.dtype} {tuple(x.shape)}" if x is not None else "absent"
            for x in (own.get(name), weights.get(name))
        )
        if here != there:
            raise UserError(
                f"the checkpoint does not fit the model: {name} is {there} in it and {here} here"
            )
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def export(config: Any, pipeline: StableDiffusionXLPipeline, folder: Path) -> Path:
    """Write the result in diffusers format: the whole pipeline to `folder/model`, or the adapter to
    `folder/lora`.

    The adapter's file carries rank and alpha, without which a reader would assume alpha = rank.
    """
    if not isinstance(config, LoraConfig):
        with disk.whole_folder(folder / "model") as temporary:
            pipeline.save_pretrained(temporary)
        return folder / "model"
    adapter = pipeline.unet.peft_config["default"]
    with disk.whole_folder(folder / "lora") as temporary:
        pipeline.save_lora_weights(
            temporary,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=adapter.to_dict(),
        )
    return folder / "lora"
