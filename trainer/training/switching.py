"""Optimizers with two sets of weights: those of the next gradient, and an average to be evaluated
with (Schedule-Free, Defazio et al. 2024, arXiv 2405.15682).

They put the average into the model with `eval`, and the others back with `train`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter


def switches(optimizer: object, options: Mapping[str, Any] | None = None) -> bool:
    """Whether an optimizer, or its class with these options, has two sets of weights.

    prodigy-plus-schedule-free has one with use_schedulefree=False, and the same methods.
    """
    chosen = getattr(optimizer, "param_groups", None) or [options or {}]
    if not any(each.get("use_schedulefree", True) for each in chosen):
        return False
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer, parameters: Iterable[Parameter]) -> Iterator[None]:
    """Within the block, the model has the weights to be evaluated with, if there are any.

    Afterwards it has exactly those it was trained with, which `train` would compute again, and
    round: they are kept in host memory, as the device may have no room for both.
    """
    if not switches(optimizer):
        yield
        return
    own = [(p, p.detach().to("cpu", copy=True)) for p in parameters]
    two_sets: Any = optimizer
    try:
        two_sets.eval()  # which may run out of memory half way
        yield
    finally:
        two_sets.train()
        with torch.no_grad():
            for parameter, weights in own:
                parameter.copy_(weights)
