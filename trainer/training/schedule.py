"""The length of a run, and its learning rate, a pure function of the optimizer's step, so that a
resumed run needs no scheduler state."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from trainer.config import (
    ConstantConfig,
    CosineRestartsConfig,
    LinearConfig,
    PolynomialConfig,
    WsdConfig,
    schema_of,
)
from trainer.config import of_saved as of_saved_group
from trainer.errors import UserError

_WARMUP = 20  # steps, at most, if not set
_ALMOST = 1e-6  # steps: tolerance for rounding errors


def settled(
    config: ConstantConfig, steps_per_epoch: float, done: tuple[int, float] = (0, 0.0)
) -> ConstantConfig:
    """The configuration with its open values filled in: the run's steps if its length is in epochs,
    and the warm-up's.  done: steps and epochs done by a resumed run, whose epochs may have had
    another length.

    Raises UserError for a run that is shorter than its warm-up.
    """
    steps, warmup = config.steps, config.warmup_steps
    if config.epochs is not None:
        steps_done, epochs_done = done
        exact = steps_done + (config.epochs - epochs_done) * steps_per_epoch
        # Round half up, whichever step a run resumes from: `exact` differs in its last bits.
        steps = max(math.floor(exact + 0.5 + _ALMOST), 1)
    if warmup is None:
        warmup = min(_WARMUP, steps // 10)
    known = replace(config, steps=steps, warmup_steps=warmup)
    check(known)
    return known


def check(config: ConstantConfig) -> None:
    """Raise UserError for a run of known length that is shorter than its warm-up."""
    if config.warmup_steps is not None and config.warmup_steps > config.steps:
        raise UserError(
            f"schedule.warmup_steps={config.warmup_steps} is out of range; it must be in "
            f"[0, {config.steps}], the run's steps; set schedule.warmup_steps=0 for none"
        )


def of_saved(saved: Mapping[str, Any]) -> ConstantConfig:
    """The schedule of a checkpoint's configuration."""
    kind = schema_of("schedule", saved["name"])
    return cast(ConstantConfig, of_saved_group("schedule", kind, saved))


def lr_scale(config: ConstantConfig, step: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses: warm up linearly, hold,
    decay."""
    warmup = _warmup_steps(config)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not isinstance(config, LinearConfig | WsdConfig):
        return 1.0
    return config.final_scale + (1 - config.final_scale) * _shape(config, _decayed(config, step))


def decay_steps(config: LinearConfig | WsdConfig) -> int:
    """The number of steps in the decay; the first is at the peak, and the step after the last at
    the final value.  Below 2 there is no room for a decay."""
    hold = 1 - config.decay if isinstance(config, WsdConfig) else config.hold
    return config.steps - max(_warmup_steps(config), round(hold * config.steps))


def _warmup_steps(config: ConstantConfig) -> int:
    assert config.warmup_steps is not None, "not settled"
    return config.warmup_steps


def _decayed(config: LinearConfig | WsdConfig, step: int) -> float:
    """How far into the decay a step is: 0 until it begins, 1 after the last step."""
    length = decay_steps(config)
    return max(step - (config.steps - length), 0) / max(length, 1)


def _shape(config: LinearConfig | WsdConfig, done: float) -> float:
    """The remaining share of the learning rate, from 1 to 0, after a share `done` of the decay.

    Restarts: Loshchilov & Hutter 2017 (arXiv 1608.03983), with cycles of one length.  wsd: Hu et
    al. 2024 (arXiv 2404.06395); its sqrt: 1 - sqrt(done), Haegele et al. 2024 (arXiv 2405.18392).
    """
    name = config.shape if isinstance(config, WsdConfig) else config.name
    if isinstance(config, CosineRestartsConfig):
        done = round(done * config.cycles, 9) % 1  # a third of the way, times 3, is 1
    if name in ("cosine", "cosine_restarts"):
        return (1 + math.cos(math.pi * done)) / 2
    if name == "sqrt":
        return 1 - math.sqrt(done)
    power = config.power if isinstance(config, PolynomialConfig) else 1
    return (1 - done) ** power
