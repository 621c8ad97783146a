"""The learning rate along a run: a pure function of the optimizer's step, so that a resumed run
needs no scheduler state."""

import math

from trainer.config import (
    ConstantConfig,
    CosineRestartsConfig,
    LinearConfig,
    PolynomialConfig,
    WsdConfig,
)


def lr_scale(config: ConstantConfig, step: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses: warm up linearly, hold,
    decay."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if not isinstance(config, LinearConfig | WsdConfig):
        return 1.0
    return config.final_scale + (1 - config.final_scale) * _shape(config, _decayed(config, step))


def decay_steps(config: LinearConfig | WsdConfig) -> int:
    """How many steps the decay takes from the peak to its end; 0 or less where it has no room."""
    hold = 1 - config.decay if isinstance(config, WsdConfig) else config.hold
    return config.steps - 1 - max(config.warmup_steps, round(hold * config.steps))


def _decayed(config: LinearConfig | WsdConfig, step: int) -> float:
    """How far into the decay a step is: 0 until it begins, 1 at the last step."""
    length = decay_steps(config)
    done = (step - (config.steps - 1 - length)) / max(length, 1)
    return min(max(done, 0.0), 1.0)


def _shape(config: LinearConfig | WsdConfig, done: float) -> float:
    """What is left of the learning rate, from 1 to 0, when a share `done` of the decay is over.

    Restarts: Loshchilov & Hutter 2017 (arXiv 1608.03983), with cycles of one length; the
    last step ends a cycle.  wsd: Hu et al. 2024 (arXiv 2404.06395); its sqrt: 1 - sqrt(done),
    Haegele et al. 2024 (arXiv 2405.18392).
    """
    name = config.shape if isinstance(config, WsdConfig) else config.name
    if isinstance(config, CosineRestartsConfig) and done < 1:
        done = done * config.cycles % 1
    if name in ("cosine", "cosine_restarts"):
        return (1 + math.cos(math.pi * done)) / 2
    if name == "sqrt":
        return 1 - math.sqrt(done)
    power = config.power if isinstance(config, PolynomialConfig) else 1
    return (1 - done) ** power
