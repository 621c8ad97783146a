"""The compiled module `optim._native`, if the install built one, and a check that it matches the
sources beside it.

A module older than `csrc/` may fail silently: it may misread a struct whose layout has changed, or
not update the parameters of a rule that it does not know.  `optim/share.py` uses it with every
backend, so a mismatch is an error at import rather than a reason to fall back.
"""

import ctypes
import importlib.util
from typing import Any

from optim import plan, sources

missing = ""  # why there is no module
try:
    from optim import _native as module  # type: ignore[attr-defined]
except ImportError as error:
    module = None
    if importlib.util.find_spec("optim._native"):
        missing = f"the native engine cannot be loaded ({error}); install the package again"
    else:
        missing = "the native engine is not built; install a C++ compiler, then the package again"


def check(described: dict[str, Any], file: str) -> None:
    """Raise ImportError if the module in this file does not match its sources and
    `optim/plan.py`."""
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
