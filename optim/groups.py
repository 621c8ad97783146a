"""Checks of parameter groups: options that agree, and parameters that can be updated."""

import sys
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from optim.share import DTYPES

Group = dict[str, Any]


class Checked(Protocol):
    """What the checks need to know of an optimizer."""

    common: ClassVar[tuple[str, ...]]  # options that all groups must agree on
    shared: ClassVar[tuple[str, ...]]  # the group keys of tensors that all groups share

    @classmethod
    def contradiction(cls, group: Group) -> str | None:
        """Why this group's options cannot go together, in words that follow the class's name."""


def check(cls: type[Checked], groups: list[Group]) -> None:
    """Refuse the last group if its options contradict each other or what other groups must share,
    or if an optimizer of this class cannot update its parameters."""
    for param in groups[-1]["params"]:
        check_param(cls, param)
    check_agreement(cls, [groups[0], groups[-1]])


def check_agreement(cls: type[Checked], groups: list[Group]) -> None:
    """Refuse groups whose options contradict each other, or whose `common` options differ from the
    first group's."""
    for group in groups:
        if wrong := cls.contradiction(group):
            raise ValueError(f"{cls.__name__} {wrong}")
        _check_common(cls, groups[0], group)


def check_apart(optimizer: str, groups: list[Group]) -> None:
    """Refuse parameters that share memory, which would be stepped twice.  Parameters whose elements
    have gaps between them (a column of a matrix) are not checked."""
    spans = sorted(
        (str(param.device), start, start + param.numel() * param.element_size(), tuple(param.shape))
        for group in groups
        for param in group["params"]
        if type(param) in (Tensor, Parameter)  # a subclass may have its memory elsewhere, or none
        if (start := param.data_ptr()) and _is_dense(param)
    )
    for (device, _, end, shape), (other_device, start, _, other_shape) in pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"{optimizer}: parameters of shapes {shape} and {other_shape} are views of the "
                "same memory, which would be stepped twice; pass one of them, or the tensor that "
                "both are views of"
            )


def _is_dense(param: Tensor) -> bool:
    """Whether a tensor's elements leave no gaps in memory, in any order of its dimensions."""
    if param.is_contiguous():
        return True
    sizes = zip(param.shape, param.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes) == param.numel()


def check_param(cls: type[Checked], param: Tensor) -> None:
    """Refuse a parameter that an optimizer of this class cannot update."""
    optimizer, remedies = cls.__name__, "DDP" if cls.shared else "DDP, ZeRO-1"
    if is_lazy(param):
        raise ValueError(
            f"{optimizer}: a parameter of a lazy layer has no shape yet; run the model forward "
            "once, under torch.no_grad(), before the optimizer is built"
        )
    shape = tuple(param.shape)
    if _is_dtensor(param):
        raise TypeError(
            f"{optimizer} does not take a DTensor (shape {shape}): its statistics (row and "
            "column means, norms) would be those of one shard; keep whole parameters in each "
            f"process instead ({remedies})"
        )
    if getattr(param, "_fsdp_flattened", False):  # set by torch, whatever `use_orig_params`
        raise TypeError(
            f"{optimizer} does not take the shards of FullyShardedDataParallel (FSDP; shape "
            f"{shape}): they are vectors, which have no rows and columns to be factored, and whose "
            f"moments would be as large as Adam's; keep whole parameters in each process "
            f"({remedies})"
        )
    if param.layout is not torch.strided or param.dtype not in DTYPES:
        remedy = "for a quantised or complex model, pass only the parameters that require gradients"
        if param.dtype == torch.float64:
            remedy = "call model.float() before the optimizer is built"
        raise TypeError(
            f"{optimizer} updates dense fp32, bf16 and fp16 parameters; this one is "
            f"{param.layout}, {param.dtype}, shape {shape} ({remedy})"
        )


def _check_common(cls: type[Checked], first: Group, group: Group) -> None:
    """Refuse a group whose value of a common option differs from the first group's."""
    for option in cls.common:
        if group[option] != first[option]:
            raise ValueError(
                f"{cls.__name__}: {option}={group[option]!r} in one group and {first[option]!r} in "
                "another is not possible; it must be the same in all"
            )


def _is_dtensor(param: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # if not imported, there are none
    return module is not None and isinstance(param, module.DTensor)
