"""Options with bounds, declared where the option is.

    steps: int = within(1)               a number in [1, inf)
    dtype: str = one_of("float32", ...)  one of these words
    every: Interval = interval()         steps or epochs: 500, 1epoch, 0.5epochs; 0 is never

`trainer.checks.validate` rejects anything else, naming the option.  They have no default, as values
are in `conf/`, except those of an item in a list.  None passes if the type allows it.
"""

import math
import re
from dataclasses import MISSING, Field, field, fields
from fractions import Fraction
from typing import Any

from optim.options import unknown

TINY = 1e-12  # lower bound of options that must be positive
HUGE = 1e12  # upper bound of options that must be finite
Interval = Any  # int | str, which OmegaConf cannot merge
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?) ?epochs?")


def within(low: float, high: float = math.inf, default: Any = MISSING) -> Any:
    """A number in [low, high], or a list of some, for a dataclass's field."""
    return field(default=default, metadata={"range": (low, high)})


def one_of(*choices: str) -> Any:
    """One of these words, or a list of some of them, for a dataclass's field."""
    return field(metadata={"choices": choices})


def interval() -> Any:
    """Steps or epochs between two events, for a dataclass's field; 0 is never."""
    return field(metadata={"is_interval": True})


def epochs_of(every: Interval) -> Fraction | None:
    """The epochs of an interval; None if it is in steps."""
    match = _EPOCHS.fullmatch(str(every))
    return Fraction(match[1]) if match else None


def complaint(node: Any, prefix: str) -> str | None:
    """The error for the first value of this dataclass that its field does not allow, if any."""
    for option in fields(node):
        key, value = f"{prefix}{option.name}", getattr(node, option.name)
        if option.metadata.get("is_interval") and not _is_interval(value):
            return (
                f"{key}={value} is not an interval; use steps (500) or epochs (1epoch, 0.5epochs)"
            )
        if value is None:
            continue
        choices, bounds = option.metadata.get("choices"), option.metadata.get("range")
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                return f"{key}={value}: {unknown('choice', item, choices)}"
            if bounds and not bounds[0] <= item <= bounds[1]:
                which = f": {item}" if isinstance(value, list) else ""
                return f"{key}={value}{which} is out of range; it must be {_between(*bounds)}"
    return None


def words_of(node: Any, key: str) -> tuple[str, ...]:
    """The words that an option of this dataclass may be."""
    return next(option.metadata["choices"] for option in fields(node) if option.name == key)


def allowed(option: Field[Any]) -> str:
    """Which values a field allows, in words; "" for those without bounds."""
    if choices := option.metadata.get("choices"):
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    return _between(*option.metadata["range"]) if "range" in option.metadata else ""


def _is_interval(every: Interval) -> bool:
    """Whether it is a number of steps or of epochs."""
    return str(every).isdecimal() or epochs_of(every) is not None


def _between(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:g}"
    return f"in [{low:g}, {'2^64 - 1' if high == 2**64 - 1 else f'{high:g}'}]"
