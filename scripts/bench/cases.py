"""Which kinds of tensors a run on a GPU may consist of: a table of optimizers, dtypes and options
that has every rule, codec and feature, on shapes with every kind of edge."""

import copy
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import optim
from optim import dispatch, gpu, plan
from optim.engine import DescriptorEngine
from optim.orthogonal import OrthogonalEngine
from optim.portion import kind_of
from optim.projected import NativeProjectedEngine
from optim.projected_cuda import kernels_of as kernels_of_portion
from optim.projection import parted
from optim.share import Share

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Tiles both ways, a convolution, vectors, a scalar, nothing, and (7, 1429), which has no square
# view.
SHAPES = [(70, 1100), (33, 3, 3, 3), (37,), (), (0,), (5, 0), (1, 5), (7, 1429)]


class Case(NamedTuple):
    """A run: an optimizer with these options steps tensors of this dtype, whose gradients have it
    too, unless said otherwise."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    grad_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        parts = [self.name, str(self.dtype)[6:], options]
        if self.grad_dtype is not None:
            parts.append(f"grad={str(self.grad_dtype)[6:]}")
        return "-".join(filter(None, parts))

    def is_projected(self) -> bool:
        """Whether a step begins with a projection: a matrix product of torch's."""
        return self._rule() in plan.PROJECTED

    def is_orthogonalized(self) -> bool:
        """Whether a step has matrix products of torch's, which a GPU computes in bf16."""
        return self._rule() in plan.ORTHOGONALIZED

    def _rule(self) -> str:
        return optim.FAMILY[self.name].rule.__name__

    def is_bitwise(self) -> bool:
        """Whether every device gives the same bits: it uses no `pow` or `log`, which each device's
        library rounds its own way, and no sum of doubles that a GPU takes in another order."""
        measures = {"orthograd", "grad_clip", "scale_parameter", "max_grad_norm"}
        return self._rule() in {"sgd", "lion", "sophia"} and not (measures & self.options.keys())


_ALL = [
    *(Case(name, BF16, {}) for name in sorted(optim.FAMILY)),
    Case("adamw_factored", BF16, {"cautious": True, "orthograd": True, "grad_clip": 0.1}),
    Case("adamw_factored", FP32, {"factor_1d": True, "cautious_decay": True}),
    Case("adamw", FP16, {"storage": "bf16", "atan2": True, "grams": True}),
    Case("adamw8bit", BF16, {"rounding": "kahan", "growth_limit": 1.01}),
    Case("adopt", BF16, {"storage": "8bit", "atan2": True}),
    Case("ademamix", FP32, {"storage": "8bit", "warmup_steps": 3}),
    Case("lion", BF16, {"storage": "bf16", "rounding": "nearest"}),
    Case("apollo", FP32, {"storage": "factored", "scaling": "tensor", "orthograd": True}),
    Case("apollo", FP16, {"storage": "8bit", "cautious": True, "rounding": "kahan"}),
    Case("adafactor8bit_apollo", FP32, {"beta1": 0.9, "growth_limit": None, "rank": 1}),
    Case("apollo", BF16, {"rank": 16}),
    Case("apollo", FP32, {"rank": 16, "projection": "sign", "scaling": "tensor"}),
    Case("apollo", FP16, {"rank": 16, "grad_clip": 0.1}),
    Case("muon", FP32, {"growth_limit": 1.01, "grad_clip": 0.1}),
    Case("muon", FP16, {"storage": "8bit", "nesterov": False, "rounding": "kahan"}),
    Case("muon", BF16, {"storage": "factored", "cautious_decay": True}, FP32),
    Case("came", FP32, {"storage": "factored", "growth_limit": 1.01, "orthograd": True}),
    Case("came8bit", FP16, {"clip_threshold": None, "growth_limit": 1.01, "cautious": True}),
    Case("prodigy", FP32, {"slice_p": 1, "storage": "8bit", "atan2": True, "orthograd": True}),
    Case("prodigy", FP16, {"slice_p": 3, "bias_correction": True, "rounding": "kahan"}),
    Case("lion_prodigy", FP32, {"storage": "factored", "factor_1d": True}),
    Case("sophia", FP32, {"storage": "factored", "grad_clip": 0.1}),
    Case("sophia", BF16, {"storage": "8bit", "rounding": "kahan", "cautious": True}),
    Case("sgd", FP16, {"nesterov": True, "storage": "factored"}),
    Case("adafactor8bit", BF16, {"clip_norm": "lagged", "relative_step": True}),
    Case("adafactor8bit", FP32, {"beta1": 0.9, "storage": "factored", "scale_parameter": True}),
    Case("adafactor8bit", BF16, {"beta1": 0.9, "storage": "factored", "clip_norm": "lagged"}, FP32),
    Case("ademamix", BF16, {"storage": "factored", "growth_limit": 1.01}, FP32),
    Case("came", BF16, {"storage": "factored"}, FP32),
]
_MIXES = hasattr(torch.Tensor, "grad_dtype")  # torch 2.10 and later
# A rule that has no fused kernel runs on plain PyTorch, and there is nothing to check.
CASES = [
    case
    for case in _ALL
    if dispatch.has_rule(optim.FAMILY[case.name].rule) and (_MIXES or case.grad_dtype is None)
]


def make(
    case: Case, device: torch.device | str = "cpu", **options: Any
) -> tuple[list[Parameter], optim.FusedOptimizer]:
    """The case's parameters, the same numbers on every device, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).to(case.dtype) for shape in SHAPES]
    params = [Parameter(x.to(device)) for x in numbers]
    if case.grad_dtype is not None:
        for param in params:
            param.grad_dtype = case.grad_dtype
    chosen = {"lr": 0.01, "weight_decay": 0.1} | case.options | options
    if "prodigy" in case.name:  # begun with a rate that is seen within a few steps
        chosen |= {"lr": 1.0, "d0": 1e-2}
    if "apollo" in case.name:  # the smallest matrix has 7 rows
        chosen = {"rank": 1 if case.name == "apollo_mini" else 4} | chosen
    return params, optim.build(case.name, params, **chosen)


def copied(
    params: list[Parameter], optimizer: optim.FusedOptimizer
) -> tuple[list[Parameter], optim.FusedOptimizer]:
    """A deep copy of a run.  (torch's forgets which dtype gradients are to have.)"""
    twins, twin = copy.deepcopy((params, optimizer))
    if _MIXES:
        for param, other in zip(params, twins, strict=True):
            other.grad, other.grad_dtype = None, param.grad_dtype
    return twins, twin


def gradients(params: list[Parameter], step: int) -> list[torch.Tensor]:
    """New gradients for a step, the same numbers on every device and in every dtype that has
    them."""
    generator = torch.Generator().manual_seed(1000 + step)
    numbers = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    dtypes = [getattr(p, "grad_dtype", None) or p.dtype for p in params]
    return [x.to(d).to(p.device) for x, d, p in zip(numbers, dtypes, params, strict=True)]


def set_grads(params: list[Parameter], step: int) -> None:
    """Give every parameter its gradient of this step."""
    for param, grad in zip(params, gradients(params, step), strict=True):
        param.grad = grad


def prepare(params: list[Parameter], optimizer: optim.FusedOptimizer, step: int) -> None:
    """What some optimizers want before a step: an estimate of the curvature."""
    if isinstance(optimizer, optim.Sophia):
        set_grads(params, 100 + step)
        optimizer.update_hessian(2.0)


def kinds_of(case: Case) -> set[gpu.Kind]:
    """The kinds of tensors, with kernels each, that a run of this case has."""
    params, optimizer = make(case, backend="torch")
    set_grads(params, 0)
    kinds: set[gpu.Kind] = set()

    class Describing(DescriptorEngine):
        def _make(self, work: Any, places: Any) -> None:
            groups = self._owner.param_groups
            flags = [plan.group_options(group, 1.0, self._rule).flags for group in groups]
            described = [self._descriptors[index] for index, _, _ in places]
            kinds.update(gpu.kind_of(self._rule, d, flags[d.group]) for d in described)

        def step(self, places: Any, coefficients: Any) -> None:
            self._refresh(places)

    rule, share = type(optimizer).rule.__name__, Share(optimizer._places())
    cpu = torch.device("cpu")
    make_engine: Any = Describing  # which has of an engine what a step asks for
    if rule in plan.PROJECTED:
        NativeProjectedEngine(optimizer, plan.PROJECTED[rule], make_engine, cpu).step(share, {})
    elif rule in plan.ORTHOGONALIZED:
        dense = plan.ORTHOGONALIZED[rule]
        OrthogonalEngine(optimizer, dense, make_engine, cpu).step(share, {})
    else:
        Describing(optimizer, rule).step(share, {})
    if isinstance(optimizer, optim.Sophia):
        Describing(optimizer, plan.ESTIMATE).step(share, {})
    return kinds


def kernels_of(cases: list[Case]) -> list[str]:
    """The names of all kernels that these cases run."""
    kinds = set().union(*map(kinds_of, cases))
    names = {name for kind in kinds for name, _ in kind.passes()} | {gpu.MEASURE}
    for case in filter(Case.is_projected, cases):
        wide, _ = parted(make(case, backend="torch")[1]._places())
        portions = {kind_of(place, case.dtype, case.dtype) for place in wide}
        names |= {name for kind in portions for name in kernels_of_portion(kind).values()}
    return sorted(names)
