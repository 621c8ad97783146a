"""Frozen weights in 8 or 4 bits (`model.quantization`), under a LoRA in full precision.

The weights of linear layers and convolutions are stored as codes, with one scale for each block of
64 weights (block-wise quantization: Dettmers et al. 2022, arXiv 2110.02861).  A layer decodes its
weights when it computes, and again for the gradient of its input, so that only one layer's weights
exist in full at a time, with or without gradient checkpointing.

    int8   round(w / s), s = max |w| / 127 in the block             8.25 bits a weight
    nf4    the nearest of 16 quantiles of a normal distribution,    4.25 bits a weight
           times s = max |w| (QLoRA: Dettmers et al. 2023, arXiv 2305.14314, section 3)

The scales have the model's dtype (here bf16).  A layer whose weights are no multiple of 64, or that
does not pad by a number of zeros, stays as it is.  A compiled block keeps its decoded weights for
the backward pass, and so does DoRA with dropout, unless they are recomputed (checkpointing).
"""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

_BLOCK = 64
# The levels of NF4: QLoRA, appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Quantized(nn.Module, ABC):
    """A layer with codes instead of a weight; `weight` decodes them."""

    codes: Tensor  # (n,) int8, or (n / 2,) uint8 with two codes each, the first in the high bits
    scales: Tensor  # (n / 64, 1) in the dtype of the weights
    pairs: Tensor | None  # (256, 2): what a byte of NF4 stands for
    shape: torch.Size  # of the weight

    @property
    def weight(self) -> Tensor:
        """The decoded weight, in its own shape and dtype; made anew each time."""
        if self.pairs is None:
            levels = self.codes.to(self.scales.dtype)
        else:
            levels = F.embedding(self.codes.int(), self.pairs)
        return levels.view(-1, _BLOCK).mul_(self.scales).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self))

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """What the layer computes."""

    @abstractmethod
    def gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        """The gradient of its input, which has this shape; grad: of its output."""


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[override]  # weight: read-only
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        return grad @ self.weight.to(grad.dtype)


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[override]
    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """A plain convolution: PEFT makes an adapter's with the class of the layer it adapts.
        Without arguments, as copy and pickle call it: one of this class."""
        return nn.Conv2d(*sizes, **options) if sizes or options else object.__new__(cls)

    def product(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def gradient(self, shape: torch.Size, grad: Tensor) -> Tensor:
        weight = self.weight.to(grad.dtype)
        if grad.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        how: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(list(shape), weight, grad, *how)


class _Product(torch.autograd.Function):
    """A layer's product, which keeps no weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.gradient(ctx.shape, grads[0]), None


_CLASSES: dict[type[nn.Module], type[Quantized]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
}


@torch.no_grad()
def quantize(layer: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Replace the weight of a linear layer or a convolution by codes, on `device` (None: where the
    weight is); leave other modules alone.  kind: int8, nf4.

    The module stays the same object and becomes a subclass of its class, as with
    torch.nn.utils.parametrize: whoever looks for `nn.Linear` finds it.
    """
    made = _CLASSES.get(type(layer))
    if made is None or layer.get_parameter("weight").numel() % _BLOCK:
        return
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return
    weight = layer.get_parameter("weight").detach().to(device)
    del layer._parameters["weight"]
    layer.__class__ = made
    quantized = cast(Quantized, layer)
    quantized.shape, pairs = weight.shape, None
    blocks = weight.float().view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    if kind == "int8":
        scales = (largest / 127).to(weight.dtype)
        codes = _over(blocks, scales).round_().clamp_(-127, 127).to(torch.int8)
    else:
        scales = largest.to(weight.dtype)
        levels = torch.tensor(_NF4, device=weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        nearest = torch.bucketize(_over(blocks, scales), between, out_int32=True)
        high, low = nearest.to(torch.uint8).view(-1, 2).unbind(dim=1)
        codes = high << 4 | low
        byte = torch.arange(256, device=weight.device)
        pairs = levels[torch.stack([byte >> 4, byte & 15], dim=1)].to(weight.dtype)
    quantized.register_buffer("pairs", pairs, persistent=False)
    quantized.register_buffer("codes", codes.view(-1))
    quantized.register_buffer("scales", scales)


def _over(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks / scales in fp32; 0 in a block of zeros."""
    return blocks / torch.where(scales == 0, 1, scales).float()


def num_weights(module: nn.Module) -> int:
    """The number of parameters of a module, quantized ones included."""
    coded = sum(x.shape.numel() for x in module.modules() if isinstance(x, Quantized))
    return coded + sum(parameter.numel() for parameter in module.parameters())


def num_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters, codes, scales and other buffers."""
    return sum(x.nbytes for x in [*module.parameters(), *module.buffers()])
