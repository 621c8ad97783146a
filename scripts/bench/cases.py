"""Which kinds of tensors a run on a GPU may consist of: a table of optimizers, dtypes and options
that has every rule, codec and feature, on shapes with every kind of edge."""

from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import optim
from optim import gpu, plan
from optim.engine import DescriptorEngine
from optim.share import Share

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles both ways, a convolution, vectors, a scalar, nothing, and (7, 1429), which has no square
# view.
SHAPES = [(70, 1100), (33, 3, 3, 3), (37,), (), (0,), (5, 0), (1, 5), (7, 1429)]


class Case(NamedTuple):
    """A run: an optimizer with these options steps tensors of this dtype."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}-{str(self.dtype)[6:]}" + (f"-{options}" if options else "")

    def is_bitwise(self) -> bool:
        """Whether every device gives the same bits: it uses no `pow` or `log`, which each device's
        library rounds its own way, and no sum of doubles that a GPU takes in another order."""
        measures = {"orthograd", "grad_clip", "scale_parameter", "max_grad_norm"}
        return optim.FAMILY[self.name].rule.__name__ in {"sgd", "lion"} and not (
            measures & self.options.keys()
        )


_ALL = [
    *(Case(name, BF16, {}) for name in sorted(optim.FAMILY)),
    Case("adamw_factored", BF16, {"cautious": True, "orthograd": True, "grad_clip": 0.1}),
    Case("adamw_factored", FP32, {"factor_1d": True, "cautious_decay": True}),
    Case("adamw", FP16, {"storage": "bf16", "atan2": True, "grams": True}),
    Case("adamw8bit", BF16, {"rounding": "kahan", "growth_limit": 1.01}),
    Case("adopt", BF16, {"storage": "8bit", "atan2": True}),
    Case("ademamix", FP32, {"storage": "8bit", "warmup_steps": 3}),
    Case("lion", BF16, {"storage": "bf16", "rounding": "nearest"}),
    Case("sgd", FP16, {"nesterov": True, "storage": "factored"}),
    Case("adafactor8bit", BF16, {"clip_norm": "lagged", "relative_step": True}),
    Case("adafactor8bit", FP32, {"beta1": 0.9, "storage": "factored", "scale_parameter": True}),
]
# A rule that has no fused kernel runs on plain PyTorch, and there is nothing to check.
CASES = [case for case in _ALL if plan.has_rule(optim.FAMILY[case.name].rule)]


def make(
    case: Case, device: torch.device | str = "cpu", **options: Any
) -> tuple[list[Parameter], optim.FusedOptimizer]:
    """The case's parameters, the same numbers on every device, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).to(case.dtype) for shape in SHAPES]
    params = [Parameter(x.to(device)) for x in numbers]
    chosen = {"lr": 0.01, "weight_decay": 0.1} | case.options | options
    return params, optim.build(case.name, params, **chosen)


def gradients(params: list[Parameter], step: int) -> list[torch.Tensor]:
    """New gradients for a step, the same numbers on every device."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device) for p in params]


def set_grads(params: list[Parameter], step: int) -> None:
    """Give every parameter its gradient of this step."""
    for param, grad in zip(params, gradients(params, step), strict=True):
        param.grad = grad


def kinds_of(case: Case) -> set[gpu.Kind]:
    """The kinds of tensors, with kernels each, that a run of this case has."""
    params, optimizer = make(case, backend="torch")
    set_grads(params, 0)
    flags = plan.group_options(optimizer.param_groups[0], 1.0).flags
    rule = type(optimizer).rule.__name__
    kinds: set[gpu.Kind] = set()

    class Describing(DescriptorEngine):
        def _make(self, work: Any, places: Any) -> None:
            kinds.update(gpu.kind_of(rule, d, flags) for d in self._descriptors)

    Describing(optimizer)._refresh(Share(optimizer._places()))
    return kinds


def kernels_of(cases: list[Case]) -> list[str]:
    """The names of all kernels that these cases run."""
    kinds = set().union(*map(kinds_of, cases))
    return sorted({name for kind in kinds for name, _ in kind.passes()} | {gpu.MEASURE})
