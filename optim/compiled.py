"""The compiled module `optim._native`, where the install has made one, and whether it is of the
sources beside it.

A module that is older than `csrc/` need not fail: it may read a struct that has moved, or leave the
parameters of a rule that it does not know where they are.  `optim/share.py` uses it whatever the
backend is, so what does not fit is an error at the import and not a reason to do without.
"""

import ctypes
from typing import Any

from optim import plan, sources

try:
    from optim import _native as module  # type: ignore[attr-defined]
except ImportError as error:
    module, missing = None, str(error)


def check(described: dict[str, Any], file: str) -> None:
    """Raise ImportError where the module in this file is not what its sources and `optim/plan.py`
    say it is."""
    wanted: dict[str, Any] = {
        "Options": ctypes.sizeof(plan.Options),
        "Moment": ctypes.sizeof(plan.Moment),
        "Tensor": ctypes.sizeof(plan.Descriptor),
        "Tile": plan.TILE_BYTES,
        "Launch": ctypes.sizeof(plan.Launch),
        "Hyper": plan.HYPER_BYTES,
        "TileSums": plan.TILE_SUMS_BYTES,
        "Projection": ctypes.sizeof(plan.Projection),
        "Projections": ctypes.sizeof(plan.Projections),
        "TILE_ROWS": plan.TILE_ROWS,
        "TILE_COLS": plan.TILE_COLS,
        "VECTOR_PAD": plan.VECTOR_PAD,
        "CHANNELS": plan.CHANNELS,
        "DRAWS": plan.DRAWS,
        "RULES": list(plan.RULES),
    }
    if root := sources.folder():
        wanted["csrc/"] = sources.digest(root, sources.of_module(root))
    differing = [name for name, value in wanted.items() if described.get(name) != value]
    if differing:
        raise ImportError(
            f"{file} was not compiled from the sources next to it ({', '.join(differing)} changed "
            "since): compile it again, `pip install -e .` where csrc/ is; or delete it, to run on "
            "plain PyTorch"
        )


if module is not None:
    check(module.describe(), module.__file__)
