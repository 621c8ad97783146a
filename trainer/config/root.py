"""The whole configuration of a run."""

from dataclasses import dataclass
from typing import Any

from trainer.config.data import DataConfig
from trainer.config.fields import within
from trainer.config.log import LogConfig
from trainer.config.loss import LossConfig
from trainer.config.method import MethodConfig
from trainer.config.model import ModelConfig
from trainer.config.noise import NoiseConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.runtime import RuntimeConfig
from trainer.config.schedule import ScheduleConfig


@dataclass(kw_only=True)
class Config:
    seed: int = within(0, 2**64 - 1)  #: of batches, noise, timesteps, dropout and rounding
    name: str  #: of the run, in its folder and in W&B
    resume: str | None  #: a checkpoint folder, a run folder, or latest
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optim: OptimizerConfig
    loss: LossConfig
    noise: NoiseConfig
    schedule: ScheduleConfig
    runtime: RuntimeConfig
    log: LogConfig


def _choices(base: Any) -> tuple[Any, ...]:
    """The dataclasses based on this one that have a name of their own."""
    below = [kind for child in base.__subclasses__() for kind in (child, *_choices(child))]
    return tuple(kind for kind in below if "name" in vars(kind))


# Groups whose choices have different options; a YAML file names the schema that it fills in.
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "method": _choices(MethodConfig),
    "loss": _choices(LossConfig),
    "schedule": _choices(ScheduleConfig),
}


def schema_of(group: str, name: str) -> Any:
    """The dataclass of a choice."""
    return next(node for node in ALTERNATIVES[group] if node.name == name)


# Options that decide what a run keeps and writes, not what it learns.
OUTPUTS = (
    "data.cache",
    "method.export",
    "method.export_dtype",
    "method.export_every",
    "method.keep_exports",
    "method.metadata",
    "method.tag_frequency",
)


def file_name(run: str) -> str:
    """A run's name in names of files and folders: peer/hf_adafactor-full ->
    peer-hf_adafactor-full."""
    return run.replace("/", "-")
