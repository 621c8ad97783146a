"""Low-memory optimizers, usable in any trainer: `from optim import Adafactor8bit`, or
`optim.build("adafactor8bit", params)`.

This package imports nothing from `trainer`.  The table below is the list of the family; an
optimizer's options and defaults are its class's signature and nothing else, and `conf/optim/*.yaml`
and `build` take them from there.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from optim.adafactor import Adafactor, Adafactor8bit
from optim.adam import AdamW
from optim.adopt import AdoptFactored
from optim.fused import FusedOptimizer
from optim.lion import Lion
from optim.options import unknown
from optim.sgd import SGD

FAMILY: dict[str, type[FusedOptimizer]] = {
    "sgd": SGD,
    "adamw": AdamW,
    "lion": Lion,
    "adafactor": Adafactor,
    "adafactor8bit": Adafactor8bit,
    "adopt_factored": AdoptFactored,
}

__all__ = [
    "FAMILY",
    "FusedOptimizer",
    "build",
    "signature",
    *sorted(cls.__name__ for cls in FAMILY.values()),
]


def build(name: str, params: Iterable[Any], **overrides: Any) -> FusedOptimizer:
    """Make an optimizer of the family by name, with its defaults and these options.

    Raises ValueError for an unknown name, TypeError for an option it does not have, ValueError for
    an impossible value.
    """
    known = signature(name)
    for option in overrides:
        if option not in known:
            raise TypeError(unknown(f"option of {name}", option, known))
    return FAMILY[name](params, **overrides)


def signature(name: str) -> dict[str, inspect.Parameter]:
    """The options of an optimizer, {name: parameter with annotation and default}, without
    `params`."""
    if name not in FAMILY:
        raise ValueError(unknown("optimizer", name, FAMILY))
    parameters = inspect.signature(FAMILY[name]).parameters
    return {key: parameter for key, parameter in parameters.items() if key != "params"}
