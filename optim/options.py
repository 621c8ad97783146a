"""The values that each option of the family may take, and the errors for others."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache
from numbers import Integral, Real
from operator import is_, itemgetter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from optim.features import Features


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# Rounding may make a learning rate of zero slightly negative (torch's LinearLR ends at -2e-22);
# below this size it has no effect on weights.
_NO_RATE = 1e-12


def _learning_rate(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return _one_number(value) and _learning_rate(value.item())
    return _number(value) and value > -_NO_RATE


def learning_rate(value: Any) -> float:
    """A learning rate, a number or a tensor, as a number; the slightly negative ones that a
    schedule's rounding leaves are zero."""
    rate = float(value)
    return 0.0 if -_NO_RATE < rate < 0 else rate


def _one_number(value: torch.Tensor) -> bool:
    return value.numel() == 1 and value.dtype.is_floating_point


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _integer(value) and 1 <= value < 1 << 62  # the engine adds and divides in 64 bits


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    quoted = [repr(name) for name in names]
    return lambda value: value in names, f"{', '.join(quoted[:-1])} or {quoted[-1]}"


_COUNT = "an integer >= 1 and < 2^62"
_LEAST = 1.2e-38  # below it fp32 has no normal numbers, and adding them changes nothing

_SHARED = get_type_hints(Features)
_SWITCHES = (
    *(name for name, kind in _SHARED.items() if kind is bool),
    *("nesterov", "atan2", "relative_step", "scale_parameter"),
    *("safeguard_warmup", "bias_correction", "residual"),
)
# option -> (may it have this value?, what it must be)
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_learning_rate, "a finite number >= 0"),
    "alpha": (lambda x: _number(x) and x >= 0, "a finite number >= 0"),
    "warmup_steps": (lambda x: _integer(x) and x >= 0, "an integer >= 0"),
    "max_grad_norm": (_optional(_positive), "a number > 0, or none"),
    "grad_clip": (_optional(_positive), "a number > 0, or none"),
    "growth_limit": (_optional(lambda x: _number(x) and x >= 1), "a number >= 1, or none"),
    "beta1": (_optional(_fraction), "a number in [0, 1), or none"),
    "beta2": (_optional(_fraction), "a number in [0, 1), or none"),
    "beta2_decay": (lambda x: _number(x) and x < 0, "a number < 0"),
    "momentum": (_fraction, "a number in [0, 1)"),
    "ns_steps": (_count, _COUNT),
    "adjust_lr_fn": _one_of("match_rms_adamw", "original"),
    "beta3": (_optional(_fraction), "a number in [0, 1), or none"),
    "d0": (_positive, "a number > 0"),
    "d_coef": (_positive, "a number > 0"),
    "growth_rate": (
        lambda x: isinstance(x, Real) and not isinstance(x, bool) and float(x) >= 1,
        "a number >= 1, or inf",
    ),
    "slice_p": (_count, _COUNT),
    "rho": (_positive, "a number > 0"),
    "hessian_every": (_count, _COUNT),
    "clip_threshold": (_optional(_positive), "a number > 0, or none"),
    "weight_decay": (lambda x: _number(x) and x >= 0, "a finite number >= 0"),
    "seed": (_integer, "an integer"),
    "clip_norm": _one_of("exact", "lagged"),
    "conv_view": _one_of("flatten", "last2"),
    "rank": (_count, _COUNT),
    "scale": (lambda x: x == "auto" or _positive(x), "a number > 0, or 'auto'"),
    "scaling": _one_of("channel", "tensor"),
    "update_gap": (_count, _COUNT),
    "projection": _one_of("gaussian", "sign"),
    **{
        name: _one_of(*get_args(kind))
        for name, kind in _SHARED.items()
        if get_origin(kind) is Literal
    },
    **dict.fromkeys(_SWITCHES, (lambda x: isinstance(x, bool), "true or false")),
}
_OF_OTHERS = (lambda value: True, "anything")  # an option of a class outside of this package
# These are a number or a tuple; the class's default gives the length.
_ALLOWED_TUPLE = {
    "betas": (_fraction, "in [0, 1)"),
    "eps": (lambda x: _number(x) and x >= _LEAST, f">= {_LEAST}"),
}


# Other packages' names of options: (the name here or None, the remedy).
_DECOUPLED = (None, "weight decay is always decoupled here; leave it out")
_TORCHS = (None, "it does not exist here; leave it out")
_BITSANDBYTES = (
    None,
    "8-bit state is a class (AdamW8bit, Lion8bit), or storage='8bit'; leave it out",
)
_ELSEWHERE: dict[str, tuple[str | None, str]] = {
    **{
        theirs: (ours, f"it is called {ours} here")
        for theirs, ours in {
            "learning_rate": "lr",
            "wd": "weight_decay",
            "cautious_wd": "cautious_decay",
            "orthogonal_gradient": "orthograd",
            "use_atan2": "atan2",
            "t_alpha": "warmup_steps",
            "t_beta3": "warmup_steps",
            "t_alpha_beta3": "warmup_steps",
            "scale_type": "scaling",
            "update_proj_gap": "update_gap",
        }.items()
    },
    **dict.fromkeys(
        ("decouple", "decoupled_weight_decay", "weight_decouple", "fixed_decay"), _DECOUPLED
    ),
    "stochastic_rounding": (
        "rounding",
        "it is rounding='stochastic' here, the default, or 'nearest'",
    ),
    "correct_bias": (None, "averages are corrected where the paper does; leave it out"),
    "kahan_sum": ("rounding", "it is rounding='kahan' here"),
    "nnmf_factor": ("storage", "it is storage='factored' here"),
    "factored_2nd": ("storage", "it is storage='factored' here, for both moments"),
    **dict.fromkeys(
        ("state_precision", "momentum_dtype"), ("storage", "how moments are kept is storage here")
    ),
    **dict.fromkeys(("eps1", "eps2"), ("eps", "it is eps here, a pair where there are two")),
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable", "dampening"), _TORCHS),
    **dict.fromkeys(("ams_bound", "clip_lambda", "kourkoutas_beta"), _TORCHS),
    **dict.fromkeys(("optim_bits", "block_wise", "min_8bit_size", "is_paged"), _BITSANDBYTES),
    "percentile_clipping": ("grad_clip", "gradients are clipped by grad_clip or max_grad_norm"),
    "proj": ("projection", "projections are random: projection='gaussian' or 'sign'"),
    "proj_type": ("projection", "a tensor is projected along its shorter side; leave it out"),
    "decay_rate": ("beta2_decay", "it is called beta2_decay here (with beta2=None)"),
    "warmup_init": ("relative_step", "let a schedule warm lr up; leave it out"),
    "use_bias_correction": ("bias_correction", "it is called bias_correction here"),
    **dict.fromkeys(
        ("use_muon", "optim_type"),
        ("ns_steps", "all matrices are orthogonalized; step others by an optimizer of their own"),
    ),
    **dict.fromkeys(("ns_coefficients", "ns_coeffs"), ("ns_steps", "they are fixed; leave it out")),
    **dict.fromkeys(("adam_betas", "adamw_betas"), ("ns_steps", "those of 1-D tensors are betas")),
    "rms_rescaling": ("adjust_lr_fn", "it is adjust_lr_fn='match_rms_adamw' here, the default"),
    "d": ("clip_threshold", "the largest RMS of an update is clip_threshold here"),
}


def check(optimizer: str, known: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse options that `optimizer` does not have, and values that its options may not take.

    `known` holds the optimizer's options with their defaults; `values` is one parameter group
    without its parameters. Raises TypeError for an unknown name (with the nearest one that exists)
    and ValueError for a value.
    """
    strangers = [name for name in values if name not in known]
    if strangers:
        raise TypeError(unknown_option(optimizer, strangers[0], known))
    for name, value in values.items():
        is_allowed, wanted = _check_of(name, known[name])
        if not is_allowed(value):
            raise ValueError(f"{optimizer}: {name}={value!r} is not possible; it must be {wanted}")


class OptionWatch:
    """Checks the options of an optimizer's groups at every step: users may set them in between.
    They become plain ones.

    A value that is still the same object is not checked again, except for a learning rate in a
    tensor, whose value is only read if it is on a CPU.
    """

    def __init__(
        self, optimizer: str, known: dict[str, Any], agree: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        """`optimizer` and `known` as for `check`; `agree` refuses groups whose values are possible
        one by one but not together."""
        self._optimizer, self._known, self._agree = optimizer, known, agree
        self._values_of = itemgetter(*known)
        self._none = (object(),) * len(known)
        self._seen: dict[int, tuple[Any, ...]] = {}  # values, by the id of their group

    def check(self, groups: list[dict[str, Any]], some: list[dict[str, Any]] | None = None) -> None:
        """Raise ValueError, as `check`, for options that have changed to a value that they may not
        take; only looks at the groups `some` if given."""
        asked = groups if some is None else some
        now = {id(group): self._values_of(group) for group in asked}
        others = False
        for group in asked:
            values, before = now[id(group)], self._seen.get(id(group), self._none)
            rate = group["lr"]
            if isinstance(rate, torch.Tensor):
                self._check_tensor(rate)
            if all(map(is_, values, before)):
                continue
            pairs = zip(self._known, values, before, strict=True)
            changed = {name: value for name, value, old in pairs if value is not old}
            others = others or changed.keys() != {"lr"}
            if isinstance(rate, torch.Tensor):
                changed.pop("lr", None)
            check(self._optimizer, self._known, changed)
            group.update({name: plain(value) for name, value in changed.items()})
            now[id(group)] = self._values_of(group)
        if others:
            self._agree(groups)
        self._seen |= now

    def _check_tensor(self, rate: torch.Tensor) -> None:
        """Refuse a wrong learning rate; its value is only read where that does not wait."""
        if not _one_number(rate) or (rate.device.type == "cpu" and not _learning_rate(rate)):
            check(self._optimizer, self._known, {"lr": rate})


def is_foreign(name: str, known: Iterable[str]) -> bool:
    """Whether a key of a parameter group belongs to other code (a scheduler's `initial_lr`, timm's
    `lr_scale`) and is not an option: neither a misspelt one of this optimizer (`known`), nor one of
    another optimizer, of this family or torch's, which would have no effect here."""
    name = name.lower()
    options = {*known, *_ALLOWED, *_ALLOWED_TUPLE}
    return not (
        name in options | _options_of_torch()
        or _remedy(name, known) is not None
        or difflib.get_close_matches(name, options, n=1, cutoff=0.85)
    )


@cache
def _options_of_torch() -> set[str]:
    """The arguments of torch's optimizers."""
    classes = [x for x in vars(torch.optim).values() if isinstance(x, type)]
    optimizers = [cls for cls in classes if issubclass(cls, torch.optim.Optimizer)]
    return {name for cls in optimizers for name in inspect.signature(cls).parameters}


def plain(value: Any) -> Any:
    """An option's value in Python's numbers, as the engines and torch.load(weights_only) refuse
    others (numpy's); a list, which could be changed unseen, becomes a tuple."""
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def allowed(name: str, default: Any) -> str:
    """Which values an option with this default may have, in words."""
    return _check_of(name, default)[1]


def _check_of(name: str, default: Any) -> tuple[Callable[[Any], bool], str]:
    """The check of this option's values, and its description."""
    if name not in _ALLOWED_TUPLE:
        return _ALLOWED.get(name, _OF_OTHERS)
    each, wanted = _ALLOWED_TUPLE[name]
    if not isinstance(default, tuple):
        return each, f"a number {wanted}"
    count = len(default)

    def is_tuple(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == count and all(map(each, value))

    return is_tuple, f"{count} numbers {wanted}"


def unknown_option(optimizer: str, name: str, known: Iterable[str]) -> str:
    """`unknown` for an option."""
    if name in ("fused", "foreach"):
        return (
            f"there is no option of {optimizer} {name!r}: the whole family has one fused engine, "
            "and backend= chooses between it and plain PyTorch"
        )
    if remedy := _remedy(name, known):
        return f"there is no option of {optimizer} {name!r}; {remedy}"
    return unknown(f"option of {optimizer}", name, known)


def _remedy(name: str, known: Iterable[str]) -> str | None:
    """Advice on another package's name of an option, or None."""
    own, words = _ELSEWHERE.get(name, (None, None))
    return words if own is None or own in {*known} else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist: the nearest one that does, or all of them.

    `what` is what the name should have been: "optimizer", "option of lion".
    """
    names = sorted(known)
    near = nearest(name, names)
    remedy = f"did you mean {near!r}?" if near else f"choose from {', '.join(names)}"
    return f"there is no {what} {name!r}; {remedy}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one may be a misspelling of, or None."""
    names = sorted(known)
    found = [n for n in names if n.lower() == name.lower()]
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return found[0] if found else None
