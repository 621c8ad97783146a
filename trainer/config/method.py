"""`method=`: which weights are trained."""

from dataclasses import dataclass

from trainer.config.fields import within

TINY = 1e-12  # the smallest sensible value of what must be positive


@dataclass(kw_only=True)
class FullConfig:
    """Train every weight of the UNet."""

    name: str = "full"
    max_grad_norm: float | None = within(TINY)  # gradients' global norm is clipped; null does not


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters on the UNet (PEFT)."""

    name: str = "lora"
    max_grad_norm: float | None = within(TINY)
    rank: int = within(1)
    alpha: float = within(TINY)  # the adapter's output is scaled by alpha / rank
    targets: list[str]  # names, or ends of names, of the UNet's modules that get an adapter
