"""The learning rate along a run: a pure function of the step, so that a resumed run needs no
scheduler state."""

import math

from trainer.config import ConstantConfig, CosineConfig, LinearConfig


def lr_scale(config: ConstantConfig, step: int) -> float:
    """Share of the peak learning rate that step `step` (from 0) uses: warm up linearly, hold,
    decay."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if not isinstance(config, LinearConfig):
        return 1.0
    hold_until = max(config.warmup_steps, round(config.hold * config.steps))
    done = (step - hold_until) / max(
        config.steps - 1 - hold_until, 1
    )  # 0 when the decay begins, 1 at the last step
    done = min(max(done, 0.0), 1.0)
    is_cosine = isinstance(config, CosineConfig)
    shape = (1 + math.cos(math.pi * done)) / 2 if is_cosine else 1 - done
    return config.final_scale + (1 - config.final_scale) * shape
