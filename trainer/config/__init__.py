"""The schema: one file for every configuration group, one dataclass for each of its choices.
Types, bounds and meaning live here, values in `conf/`."""

from trainer.config.data import DataConfig, SourceConfig
from trainer.config.fields import Interval, epochs_of, words_of
from trainer.config.files import ASSETS, choices_of, conf_dir, group_names, values_of
from trainer.config.log import LogConfig, WandbConfig
from trainer.config.loss import HuberConfig, LossConfig, MseConfig
from trainer.config.method import (
    AdapterConfig,
    EmaConfig,
    FullConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    MetadataConfig,
    MethodConfig,
    RankConfig,
)
from trainer.config.model import DTYPES, ModelConfig
from trainer.config.noise import NoiseConfig
from trainer.config.optimizer import (
    ExternalConfig,
    OptimizerConfig,
    PeerConfig,
    estimates_curvature,
    finds_rate,
    large_model_lr,
    optimizer_schema,
    peer_schema,
)
from trainer.config.overrides import flatten, for_hydra, is_in, key_of, keys_of
from trainer.config.root import ALTERNATIVES, OUTPUTS, Config, file_name, schema_of
from trainer.config.runtime import RuntimeConfig
from trainer.config.saved import of_saved, with_usual
from trainer.config.schedule import CosineRestartsConfig, DecayConfig, ScheduleConfig
