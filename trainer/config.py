"""The schema: one dataclass for every configuration group.  Types and meaning live here, values in
`conf/`.

An optimizer's options are not written down here: they are its class's signature
(`optim.options_of`), turned into a dataclass by `optimizer_schema`, so that a default has one home.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import torch

import optim

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
    # Step inside the backward pass, with a bucket of gradients alive instead of all of them: the
    # same weights, bit for bit.  For this family's optimizers; a global norm to clip by cannot be
    # had.  Under a finite loss, elements with a gradient that is not are left alone, and the others
    # are stepped, where the step would be skipped otherwise.
    fused_backward: bool
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
    optim: Any  # optimizer_schema(name), ExternalConfig, or peer_schema(choice)
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


@dataclass(kw_only=True)
class PeerConfig(ExternalConfig):
    """An optimizer of somebody else's package, with options under which it can be compared."""

    package: str  # what pip installs; the run records its version


def peer_schema(choice: str) -> type:
    """PeerConfig for one file of conf/optim/peer, which is called by its choice:
    peer/hf_adafactor."""
    title = choice.replace("/", "_")
    return make_dataclass(title, [("name", str, choice)], bases=(PeerConfig,), kw_only=True)


def optimizer_schema(name: str) -> type:
    """A dataclass of this optimizer's options with the defaults of its class's signature, and its
    name.

    `seed` is left out: the rounding takes the run's.
    """
    options = [(k, *option) for k, option in optim.options_of(name).items() if k != "seed"]
    return make_dataclass(f"{name}_options", [("name", str, name), *options], kw_only=True)


# Groups whose choices have different options; a YAML file names the schema that it fills in.
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "method": (FullConfig, LoraConfig),
    "loss": (MseConfig, HuberConfig),
    "schedule": (ConstantConfig, LinearConfig, CosineConfig),
}


def conf_dir() -> Path:
    """The folder of YAML files: inside the package where it was installed from a wheel, beside it
    in a source tree."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf"


def group_names() -> list[str]:
    """The configuration's groups, as `conf/` has them."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def choices_of(group: str) -> list[str]:
    """What a group offers, subfolders included: adamw, peer/hf_adafactor."""
    folder = conf_dir() / group
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


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
