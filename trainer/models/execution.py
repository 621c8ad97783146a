"""Where the model runs, and options that save memory or time and change results by rounding at
most.

runtime.gradient_checkpointing  activations inside a block are computed again in the backward
                                pass instead of kept: the same bits, a third more time
runtime.channels_last           channels-last activations for convolutions.  Weights are unchanged,
                                because the optimizers' engine needs them contiguous and would
                                copy others at every step
runtime.compile=regional        torch.compile of the transformer block, once for all of them
model.compute=bfloat16          fp32 weights, bf16 matrix products (autocast)
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.system import processes

log = logging.getLogger(__name__)

COMPILER = "inductor"  # torch.compile's backend


def device_of(name: str) -> torch.device:
    """The device for `runtime.device`: auto is the GPU if there is one; each process has its
    own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.world_size() > 1:
        name = f"cuda:{processes.local_rank()}"
    return torch.device(name)


def use_device(name: str) -> torch.device:
    """Make this torch's current device, which events and other packages' kernels use; returns
    it."""
    device = device_of(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; to a GPU through pinned memory, so that the host need not wait for the GPU's
    earlier work."""
    if device.type == "cuda" and x.is_cpu:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def prepare(config: Config, parts: Mapping[str, Any], device: torch.device) -> None:
    """Configure the parts that are trained: diffusers' UNet, transformers' encoders."""
    runtime, unet = config.runtime, parts["unet"]
    if runtime.gradient_checkpointing:
        for name, part in parts.items():
            if name == "unet":  # trained or not: text encoders' gradients pass through it
                part.enable_gradient_checkpointing()
            elif any(p.requires_grad for p in part.parameters()):
                # The name in transformers 5, which warns about that of 4.
                named = getattr(part, "activation_checkpointing_enable", None)
                (named or part.gradient_checkpointing_enable)({"use_reentrant": False})
    if runtime.channels_last:
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_to_channels_last)
    if runtime.compile == "regional":
        unet.compile_repeated_blocks(backend=COMPILER)
    if config.model.compute == "bfloat16":
        autocast(unet, device.type)
    kinds = {type(processor).__name__ for processor in unet.attn_processors.values()}
    fused = kinds <= {"AttnProcessor2_0"}
    log.info(
        "  attention: %s",
        "torch's scaled_dot_product_attention" if fused else ", ".join(sorted(kinds)),
    )


def _to_channels_last(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert a convolution's input; the output has the same layout, which attention loses."""
    return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])


def autocast(unet: Any, device_type: str) -> None:
    """Make every forward pass of the UNet, in training and sampling, compute in bf16; results have
    the weights' dtype.

    Each weight is used once per pass, so autocast's cache would only keep bf16 copies of them all:
    5.1 GB for SDXL, with or without gradient checkpointing.
    """
    forward, dtype = unet.forward, unet.dtype

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False):
            output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(x.to(dtype) for x in output)
        output.sample = output.sample.to(dtype)
        return output

    unet.forward = call
