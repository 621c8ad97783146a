"""`loss=`: how far a prediction is from its target."""

from dataclasses import dataclass

from trainer.config.fields import within


@dataclass(kw_only=True)
class MseConfig:
    name: str = "mse"


@dataclass(kw_only=True)
class HuberConfig:
    name: str = "huber"
    delta: float = within(1e-12)  # quadratic below this error, linear above
