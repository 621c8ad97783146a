"""`method=`: which weights are trained."""

from dataclasses import dataclass

from trainer.config.fields import one_of, within

TINY = 1e-12  # the smallest sensible value of what must be positive


CLIPS = ("global", "exact", "lagged", "rms", "none")


@dataclass(kw_only=True)
class TrainedConfig:
    """What every method has: what is done with the gradients of what is trained."""

    # How gradients are clipped (`trainer/clipping.py`): global, by the norm of them all; exact, the
    # same with the fused backward, at the cost of a second pass; lagged, by the norm of the step
    # before; rms, each tensor by its share of the bound; none.
    clip: str = one_of(*CLIPS)
    max_grad_norm: float | None = within(TINY)  # the bound on the gradients' norm; null: no clip


@dataclass(kw_only=True)
class FullConfig(TrainedConfig):
    """Train every weight of the UNet."""

    name: str = "full"


@dataclass(kw_only=True)
class LoraConfig(TrainedConfig):
    """Train low-rank adapters on the UNet (PEFT)."""

    name: str = "lora"
    rank: int = within(1)
    alpha: float = within(TINY)  # the adapter's output is scaled by alpha / rank
    targets: list[str]  # names, or ends of names, of the UNet's modules that get an adapter
