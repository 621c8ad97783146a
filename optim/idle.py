"""Options without effect: those that are set but do nothing, given the others.

An optimizer warns of them when it is built.  An option that has an effect in one group may be set
for all (`cautious_decay` where only biases are not decayed), so it is only reported if it has none
in any.  What depends on gradients, or on the length of a run (below 100,000 steps), is not judged.
"""

from collections.abc import Callable
from typing import Any

import torch

from optim.newton_schulz import is_matrix
from optim.plan import first_decay
from optim.projection import matrix_sides, projected_shape

Group = dict[str, Any]


class IdleOption(UserWarning):
    """An option of an optimizer has no effect, or keeps weights from moving."""


def _follows_the_gradient(group: Group) -> bool:
    """Whether every element of an update has the gradient's sign anyway: nothing else is averaged
    into it, or it is the gradient, scaled."""
    if group.get("residual"):
        return False
    return _projects_all(group) or not (first_decay(group) or group.get("alpha"))


def _keeps_no_first_moment(group: Group) -> bool:
    if "ns_steps" in group and not _orthogonalizes_all(group):  # the others have AdamW's moments
        return False
    return group.get("momentum") == 0 or group.get("beta1", 0) is None


def _orthogonalizes_all(group: Group) -> bool:
    return "ns_steps" in group and all(is_matrix(tuple(p.shape)) for p in group["params"])


def _is_clipped_before(group: Group) -> bool:
    total = group["max_grad_norm"]
    return total is not None and total <= group["grad_clip"]


def _rounds_nothing(group: Group) -> bool:
    return all(param.dtype == torch.float32 for param in group["params"])


def _projects_nothing(group: Group) -> bool:
    return "rank" in group and not any(_projections(group))


def _projects_all(group: Group) -> bool:
    return "rank" in group and all(_projections(group))


def _projections(group: Group) -> list[bool]:
    """Of each parameter of an APOLLO: is it projected?"""
    shapes = [tuple(param.shape) for param in group["params"]]
    return [projected_shape(shape, group["rank"]) is not None for shape in shapes]


def _is_slow_anyway(group: Group) -> bool:
    return float(group["lr"]) <= _LONG_RUN**-0.5


_LONG_RUN = 100_000  # steps
_OF_PROJECTIONS = ("scale", "scaling", "update_gap", "projection", "residual", "growth_limit")
_ALONG = "where every update points along its gradient"
_FIRST = "use a first moment (momentum, beta1)"
_ANOTHER_SIGN = f"{_FIRST}, or residual where APOLLO projects"
# option -> (does it do nothing in this group?, when that is so, the remedy)
_IDLE: dict[str, tuple[Callable[[Group], bool], str, str]] = {
    "nesterov": (lambda g: g["momentum"] == 0, "with momentum=0", "set momentum"),
    "storage": (_keeps_no_first_moment, "where no first moment is kept", _FIRST),
    "cautious": (_follows_the_gradient, _ALONG, _ANOTHER_SIGN),
    "grams": (_follows_the_gradient, _ALONG, _ANOTHER_SIGN),
    "cautious_decay": (lambda g: g["weight_decay"] == 0, "with weight_decay=0", "set weight_decay"),
    "beta2_decay": (lambda g: g["beta2"] is not None, "with a fixed beta2", "set beta2=None"),
    "clip_norm": (
        lambda g: g["clip_threshold"] is None,
        "with clip_threshold=None",
        "set clip_threshold",
    ),
    "relative_step": (
        _is_slow_anyway,
        f"in {_LONG_RUN} steps with so low an lr, which is below 1/sqrt(t) for longer",
        "set lr=1e-2 and scale_parameter=True, the paper's",
    ),
    "grad_clip": (
        _is_clipped_before,
        "where max_grad_norm is no larger, which bounds all gradients together",
        "make it smaller",
    ),
    "eps": (lambda g: g.get("atan2", False), "with atan2=True", "set atan2=False"),
    "warmup_steps": (lambda g: g["alpha"] == 0, "with alpha=0", "set alpha"),
    "rounding": (
        _rounds_nothing,
        "on fp32 weights, which are not rounded",
        "use it with bf16 or fp16 weights",
    ),
    "betas": (_orthogonalizes_all, "where every tensor is a matrix", "set momentum"),
    "factor_1d": (
        lambda g: all(param.ndim > 1 for param in g["params"]),
        "where no tensor is 1-D",
        "use it with such tensors",
    ),
    "conv_view": (
        lambda g: all(param.ndim < 3 for param in g["params"]),
        "where no tensor is a convolution's",
        "use it with such tensors",
    ),
    **dict.fromkeys(
        _OF_PROJECTIONS,
        (_projects_nothing, "where no tensor is projected", "set a smaller rank"),
    ),
}


def rank(groups: list[Group], instead: str) -> list[str]:
    """A line if the rank, whether set or default, leaves no tensor projected: `instead` is the
    optimizer that steps them all."""
    params = [param for group in groups for param in group["params"]]
    if not params or not all(map(_projects_nothing, groups)):
        return []
    largest = max((min(matrix_sides(tuple(param.shape))) - 1 for param in params), default=0)
    remedy = f"set rank={largest} or less, or use" if largest > 0 else "use"
    value = min(group["rank"] for group in groups)
    return [
        f"rank={value!r} has no effect where no tensor is projected (no matrix has a smaller side "
        f"above it): {instead} steps them all; {remedy} {instead} itself"
    ]


def orthogonalizing(groups: list[Group]) -> list[str]:
    """A line if no parameter is a matrix, so that nothing is orthogonalized."""
    params = [param for group in groups for param in group["params"]]
    if not params or any(is_matrix(tuple(param.shape)) for param in params):
        return []
    return ["no tensor is a matrix, so nothing is orthogonalized: AdamW steps them all; use AdamW"]


def options(defaults: Group, groups: list[Group]) -> list[str]:
    """A line for each option that differs from its default but has no effect in any group that sets
    it, with the remedy."""
    lines = []
    for option, (is_idle, where, remedy) in _IDLE.items():
        setting = [g for g in groups if option in defaults and g[option] != defaults[option]]
        if setting and all(map(is_idle, setting)):
            value = setting[0][option]
            lines.append(f"{option}={value!r} has no effect {where}; {remedy}, or leave it out")
    return lines


def stalled(groups: list[Group], compensates: Callable[[torch.Tensor, Group], bool]) -> list[str]:
    """A line for each option that keeps trained weights from moving, with the remedy.
    `compensates(param, group)`: whether the error of rounding a parameter is kept."""
    trained = [(p, group) for group in groups for p in group["params"] if p.requires_grad]
    numbers = sum(group.get("orthograd", False) and p.numel() == 1 for p, group in trained)
    lines = []
    if numbers:
        lines.append(
            f"orthograd=True leaves parameters of one element where they are ({numbers} of them): "
            "all of their gradient is along them; give them a group with orthograd=False"
        )
    if any(
        p.dtype == torch.float16 and group["rounding"] == "stochastic" and not compensates(p, group)
        for p, group in trained
    ):
        lines.append(
            "rounding='stochastic' applies to bf16 weights only: fp16 weights are rounded to "
            "nearest, and steps of less than half their spacing are lost; use rounding='kahan' or "
            "fp32 weights"
        )
    return lines
