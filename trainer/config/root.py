"""The whole configuration of a run."""

from dataclasses import dataclass
from typing import Any

from trainer.config.data import DataConfig
from trainer.config.fields import within
from trainer.config.log import LogConfig
from trainer.config.loss import HuberConfig, MseConfig
from trainer.config.method import FullConfig, LohaConfig, LokrConfig, LoraConfig
from trainer.config.model import ModelConfig
from trainer.config.noise import NoiseConfig
from trainer.config.runtime import RuntimeConfig
from trainer.config.schedule import (
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    LinearConfig,
    PolynomialConfig,
    WsdConfig,
)


@dataclass(kw_only=True)
class Config:
    seed: int = within(0, 2**64 - 1)  #: of batches, noise, timesteps, dropout and rounding
    name: str  #: of the run, in its folder and in W&B
    resume: str | None  #: a checkpoint folder, a run folder, or latest
    model: ModelConfig
    data: DataConfig
    method: Any  # one of ALTERNATIVES["method"]
    optim: Any  # optimizer_schema(name), ExternalConfig, or peer_schema(choice)
    loss: Any  # MseConfig | HuberConfig
    noise: NoiseConfig
    schedule: Any  # one of ALTERNATIVES["schedule"]
    runtime: RuntimeConfig
    log: LogConfig


# Groups whose choices have different options; a YAML file names the schema that it fills in.
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "method": (FullConfig, LoraConfig, LokrConfig, LohaConfig),
    "loss": (MseConfig, HuberConfig),
    "schedule": (
        ConstantConfig,
        LinearConfig,
        CosineConfig,
        PolynomialConfig,
        CosineRestartsConfig,
        WsdConfig,
    ),
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
