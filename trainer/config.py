"""The schema: one dataclass for every configuration group.  Types and meaning live here, values in
`conf/`.

An optimizer's options are not written down here: they are its class's signature
(`optim.options_of`), turned into a dataclass by `optimizer_schema`, so that a default has one home.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import optim
from optim.options import unknown
from trainer.errors import UserError

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class ModelConfig:
    """What is fine-tuned: a Stable Diffusion XL pipeline in diffusers layout."""

    path: str  # folder with model_index.json
    dtype: str  # of the UNet's weights and arithmetic: float32 or bfloat16


@dataclass(kw_only=True)
class DataConfig:
    """A folder of pictures, each with a text file of the same name beside it."""

    path: str
    resolution: int  # pixels; pictures are resized on the short side and centre-cropped to a square
    batch_size: int
    caption_extension: str
    caption_dropout: float  # share of samples trained with the empty prompt
    time_ids: (
        str  # SDXL size conditioning: original (size of the file) or resized (size after resizing)
    )
    on_missing_caption: str  # error, empty (train with the empty caption) or skip
    max_unreadable: int  # pictures that may be skipped as unreadable before the run stops


@dataclass(kw_only=True)
class FullConfig:
    """Train every weight of the UNet."""

    name: str = "full"
    max_grad_norm: float | None  # global norm that gradients are clipped to; null does not clip


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters on the UNet (PEFT)."""

    name: str = "lora"
    max_grad_norm: float | None
    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    targets: list[str]  # names, or ends of names, of the UNet's modules that get an adapter


@dataclass(kw_only=True)
class MseConfig:
    name: str = "mse"


@dataclass(kw_only=True)
class HuberConfig:
    name: str = "huber"
    delta: float  # quadratic below this error, linear above


@dataclass(kw_only=True)
class ConstantConfig:
    """Length of the run and the learning rate along it, in optimizer steps: warm up, then keep
    it."""

    name: str = "constant"
    steps: int
    warmup_steps: int


@dataclass(kw_only=True)
class LinearConfig(ConstantConfig):
    """Warm up, hold, then decay in a straight line."""

    name: str = "linear"
    hold: float  # share of the run before the decay begins
    final_scale: float  # the last step's learning rate as a share of the peak


@dataclass(kw_only=True)
class CosineConfig(LinearConfig):
    """Warm up, hold, then decay along half a cosine."""

    name: str = "cosine"


@dataclass(kw_only=True)
class RuntimeConfig:
    """Where the loop runs, what it keeps, and when it stops."""

    device: str  # auto, cpu, cuda or cuda:N
    threads: int | None  # CPU threads; null leaves torch's choice
    save_every: int  # steps between checkpoints; 0 saves only at the end
    keep_checkpoints: int  # older ones are deleted
    max_skipped_steps: int  # steps in a row without a finite loss and gradient before the run stops
    allow_config_change: (
        bool  # let `resume` go on with a configuration that differs from the checkpoint's
    )


@dataclass(kw_only=True)
class WandbConfig:
    project: str
    mode: str  # offline, online or disabled
    entity: str | None


@dataclass(kw_only=True)
class LogConfig:
    """What is reported, and how often, in steps."""

    every: int
    eval_every: int  # 0 = only before the first step and after the last
    eval_points: int  # fixed (picture, timestep, noise) triples that eval/loss is the mean of
    sample_every: int  # 0 = only before and after
    sample_count: int  # pictures in a sample grid
    sample_steps: int
    guidance_scale: float
    wandb: WandbConfig | None


@dataclass(kw_only=True)
class Config:
    seed: int
    name: str  # of the run, in its folder and in W&B
    resume: str | None  # a checkpoint folder, a run folder, or latest
    model: ModelConfig
    data: DataConfig
    method: Any  # FullConfig | LoraConfig
    optim: Any  # optimizer_schema(name), or ExternalConfig
    loss: Any  # MseConfig | HuberConfig
    schedule: Any  # ConstantConfig | LinearConfig | CosineConfig
    runtime: RuntimeConfig
    log: LogConfig


@dataclass(kw_only=True)
class ExternalConfig:
    """Any torch optimizer, by dotted path."""

    name: str = "external"
    class_path: str  # for example torch.optim.RAdam
    lr: float
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class


def optimizer_schema(name: str) -> type:
    """A dataclass of this optimizer's options with the defaults of its class's signature, and its
    name.

    `seed` is left out: the rounding takes the run's.
    """
    options = [(k, *option) for k, option in optim.options_of(name).items() if k != "seed"]
    return make_dataclass(f"{name}_options", [("name", str, name), *options], kw_only=True)


# Groups whose choices have different options; their YAML files name the one they fill in.
_ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "method": (FullConfig, LoraConfig),
    "loss": (MseConfig, HuberConfig),
    "schedule": (ConstantConfig, LinearConfig, CosineConfig),
}


def register() -> None:
    """Give Hydra the schema and the resolvers that `conf/` refers to.  Safe to call again."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, nodes in _ALTERNATIVES.items():
        for node in nodes:
            store.store(group=f"schema/{group}", name=node.name, node=node)
    for name in optim.FAMILY:
        store.store(group="schema/optim", name=name, node=optimizer_schema(name))
    store.store(group="schema/optim", name="external", node=ExternalConfig)
    OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS / name), replace=True)


def conf_dir() -> Path:
    """The folder of YAML files: inside the package where it was installed from a wheel, beside it
    in a source tree."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf"


def group_names() -> list[str]:
    """The configuration's groups, as `conf/` has them."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def choices_of(group: str) -> list[str]:
    """What a group offers."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def to_dataclasses(composed: Any) -> Config:
    """Hydra's composed configuration -> Config, checked.

    Raises UserError that names the key and the remedy.
    """
    for group in ("model", "data", "method", "optim", "loss", "schedule", "runtime", "log"):
        if OmegaConf.select(composed, group) is None:
            raise UserError(f"{group} has no choice; `python -m trainer --help` lists them")
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{missing[0]} has no value; set it on the command line: {missing[0]}=...")
    config = cast(Config, OmegaConf.to_object(composed))
    _refuse_additions(config, "")
    check(config)
    return config


def _refuse_additions(node: Any, prefix: str) -> None:
    """A key added with `+` that no option has the name of would be ignored: refuse it."""
    known = [option.name for option in fields(node)]
    for key, value in vars(node).items():
        if key not in known:
            what = f"option of {prefix[:-1]}" if prefix else "option"
            raise UserError(f"+{prefix}{key}: {unknown(what, key, known)}")
        if is_dataclass(value):
            _refuse_additions(value, f"{prefix}{key}.")


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    one_of = {
        "model.dtype": (config.model.dtype, DTYPES),
        "data.time_ids": (config.data.time_ids, ("original", "resized")),
        "data.on_missing_caption": (config.data.on_missing_caption, ("error", "empty", "skip")),
    }
    if config.log.wandb:
        one_of["log.wandb.mode"] = (config.log.wandb.mode, ("offline", "online", "disabled"))
    for key, (choice, allowed) in one_of.items():
        if choice not in allowed:
            raise UserError(f"{key}={choice}: {unknown('choice', choice, allowed)}")

    for key, value, low, high in _ranges(config):
        if not low <= value <= high:
            raise UserError(f"{key}={value} is out of range; it must be in [{low:g}, {high:g}]")

    _check_names(config)
    _check_paths(config)
    _check_device(config.runtime.device)
    if getattr(config.optim, "on_nonfinite", "skip") == "raise":
        log.warning(
            "optim.on_nonfinite=raise has no effect here: a step whose gradient is not finite is "
            "skipped before the optimizer sees it (runtime.max_skipped_steps)"
        )


def _check_names(config: Config) -> None:
    """The `name` inside a group says what was chosen; setting it by hand would choose nothing."""
    for group in ("method", "optim", "loss", "schedule"):
        node = getattr(config, group)
        if node.name != type(node).name:
            raise UserError(f"{group}.name={node.name}: choose it as {group}={node.name}")


def _check_paths(config: Config) -> None:
    for key, path in (("model.path", config.model.path), ("data.path", config.data.path)):
        if not path.strip():
            raise UserError(f"{key} is empty; name a folder")
    model = Path(config.model.path).expanduser()
    if not (model / "model_index.json").is_file():
        raise UserError(
            f"model.path={model} is not a diffusers pipeline folder: it has no model_index.json"
        )
    if not Path(config.data.path).expanduser().is_dir():
        raise UserError(
            f"data.path={config.data.path} is not a folder; set data.path to a folder of pictures"
        )
    extension = config.data.caption_extension
    if not extension.startswith(".") or len(extension) < 2 or extension in PICTURE_SUFFIXES:
        raise UserError(
            f"data.caption_extension={extension} is not the ending of a text file, such as .txt"
        )
    if config.data.resolution % 8:
        raise UserError(f"data.resolution={config.data.resolution} must be a multiple of 8")


def _ranges(config: Config) -> list[tuple[str, float, float, float]]:
    """(key, value, smallest, largest) of every number with a bounded range."""
    many = 1 << 40
    rows: list[tuple[str, float, float, float]] = [
        ("data.resolution", config.data.resolution, 8, 16384),
        ("data.batch_size", config.data.batch_size, 1, many),
        ("data.caption_dropout", config.data.caption_dropout, 0, 1),
        ("data.max_unreadable", config.data.max_unreadable, 0, many),
        ("schedule.steps", config.schedule.steps, 1, many),
        ("schedule.warmup_steps", config.schedule.warmup_steps, 0, config.schedule.steps),
        ("runtime.save_every", config.runtime.save_every, 0, many),
        ("runtime.keep_checkpoints", config.runtime.keep_checkpoints, 1, many),
        ("runtime.max_skipped_steps", config.runtime.max_skipped_steps, 0, many),
        ("log.every", config.log.every, 1, many),
        ("log.eval_every", config.log.eval_every, 0, many),
        ("log.eval_points", config.log.eval_points, 1, many),
        ("log.sample_every", config.log.sample_every, 0, many),
        ("log.sample_count", config.log.sample_count, 0, many),
        ("log.sample_steps", config.log.sample_steps, 1, 1000),
        ("log.guidance_scale", config.log.guidance_scale, 0, 100),
    ]
    if config.runtime.threads is not None:
        rows.append(("runtime.threads", config.runtime.threads, 1, 1024))
    if config.method.max_grad_norm is not None:
        rows.append(("method.max_grad_norm", config.method.max_grad_norm, 1e-12, many))
    if isinstance(config.method, LoraConfig):
        rows += [
            ("method.rank", config.method.rank, 1, many),
            ("method.alpha", config.method.alpha, 1e-12, many),
        ]
    if isinstance(config.schedule, LinearConfig):
        rows += [
            ("schedule.hold", config.schedule.hold, 0, 1),
            ("schedule.final_scale", config.schedule.final_scale, 0, 1),
        ]
    if isinstance(config.loss, HuberConfig):
        rows.append(("loss.delta", config.loss.delta, 1e-12, many))
    return rows


def _check_device(device: str) -> None:
    if device == "auto":
        return
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"runtime.device={device} is not a device; use auto, cpu, cuda or cuda:N")
    wanted = torch.device(device)
    if wanted.type == "cuda" and (
        not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"runtime.device={device}: torch {torch.__version__} sees no such GPU; "
            "use runtime.device=cpu"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
