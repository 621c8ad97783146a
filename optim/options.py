"""What values an option may take, by name and for the whole family, and how a wrong one is
refused."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _learning_rate(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return (
            value.numel() == 1
            and value.dtype.is_floating_point
            and bool(value.isfinite() & (value >= 0))
        )
    return _number(value) and value >= 0


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _pair(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, (tuple, list)) and len(value) == 2 and all(map(check, value))
    )


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# option -> (may it have this value?, what it must be)
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_learning_rate, "a finite number >= 0"),
    "betas": (_pair(_fraction), "two numbers in [0, 1)"),
    "beta1": (_optional(_fraction), "a number in [0, 1), or none"),
    "beta2": (_optional(_fraction), "a number in [0, 1), or none"),
    "beta2_decay": (lambda x: _number(x) and x < 0, "a number < 0"),
    "momentum": (_fraction, "a number in [0, 1)"),
    "clip_threshold": (_optional(_positive), "a number > 0, or none"),
    "weight_decay": (lambda x: _number(x) and x >= 0, "a finite number >= 0"),
    "seed": (lambda x: isinstance(x, int) and not isinstance(x, bool), "an integer"),
    "nesterov": (lambda x: isinstance(x, bool), "true or false"),
    "relative_step": (lambda x: isinstance(x, bool), "true or false"),
    "scale_parameter": (lambda x: isinstance(x, bool), "true or false"),
    "stochastic_rounding": (lambda x: isinstance(x, bool), "true or false"),
}
_EPS = {
    float: (_positive, "a number > 0"),
    tuple: (_pair(_positive), "two numbers > 0"),
}


def check(optimizer: str, known: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse options that `optimizer` does not have, and values that its options may not take.

    `known` holds the optimizer's options with their defaults; `values` is one parameter group
    without its parameters. Raises TypeError for an unknown name (with the nearest one that exists)
    and ValueError for a value.
    """
    for name, value in values.items():
        if name not in known:
            raise TypeError(unknown(f"option of {optimizer}", name, known))
        default = known[name]
        is_allowed, wanted = _EPS[type(default)] if name == "eps" else _ALLOWED[name]
        if not is_allowed(value):
            raise ValueError(f"{optimizer}: {name}={value!r} is not possible; it must be {wanted}")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist: the nearest one that does, or all of them.

    `what` is what the name should have been: "optimizer", "option of lion".
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(names)}"
    return f"there is no {what} {name!r}; {remedy}"
