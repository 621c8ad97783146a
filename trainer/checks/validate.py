"""Refuses what cannot work, before anything is loaded; after that, options are trusted."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import ImageColor

import optim
from optim.options import unknown
from trainer.checks import machine
from trainer.cli.explain import explain
from trainer.config import (
    ALTERNATIVES,
    AdapterConfig,
    Config,
    DataConfig,
    FullConfig,
    MseConfig,
    estimates_curvature,
)
from trainer.config.fields import complaint
from trainer.config.method import TRAINABLE_PARTS
from trainer.config.noise import contradiction
from trainer.data import buckets, sources
from trainer.data.items import PICTURE_SUFFIXES
from trainer.errors import UserError
from trainer.formats import thumbnail
from trainer.formats.hub import why_missing
from trainer.sampling import prompts
from trainer.training import schedule
from trainer.training.groups import check_rules


def to_dataclasses(composed: DictConfig) -> Config:
    """Hydra's composed configuration -> Config, checked.

    Raises a UserError that names the key and the remedy.
    """
    groups = sorted({*ALTERNATIVES, "model", "data", "optim", "noise", "runtime", "log"})
    for group in groups:
        if OmegaConf.select(composed, group) is None:
            raise UserError(f"{group} has no choice; `python -m trainer --help` lists them")
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(
                f"{missing[0]} has no value; set it on the command line: {missing[0]}=..."
            )
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:  # from an interpolation, which is resolved here
        raise UserError(explain(error, [])) from error
    _refuse_additions(config)
    check(config)
    return config


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The configuration's dataclasses, also those in lists, each with the prefix of its options:
    ("", config), ("model.", config.model), ..."""
    yield prefix, node
    for key, value in vars(node).items():
        items = (
            [(f"{key}.{i}", item) for i, item in enumerate(value)]
            if isinstance(value, list)
            else [(key, value)]
        )
        for name, item in items:
            if is_dataclass(item):
                yield from _nodes(item, f"{prefix}{name}.")


def _refuse_additions(config: Config) -> None:
    """Refuse a key added with `+` that is not an option: it would be ignored."""
    for prefix, node in _nodes(config):
        known = [option.name for option in fields(node)]
        for key in vars(node):
            if key not in known:
                what = f"option of {prefix[:-1]}" if prefix else "option"
                raise UserError(f"+{prefix}{key}: {unknown(what, key, known)}")


def check(config: Config) -> None:
    """Refuse what cannot work, before anything is loaded."""
    for prefix, node in _nodes(config):
        if wrong := complaint(node, prefix):
            raise UserError(wrong)
    prompts.of_config(config.log, config.data.largest_resolution)
    if config.schedule.epochs is None:  # else the data says how long the run is
        schedule.check(config.schedule)
    _check_names(config)
    _check_trained(config)
    if picture := config.method.metadata.thumbnail:
        thumbnail.data_url(picture)
    _check_curvature(config)
    check_rules(config.method.rules)
    if isinstance(config.method, AdapterConfig):
        _check_adapters(config.method)
        if not config.resume:  # a checkpoint has the adapters' values
            _check_start(config.method)
    _check_noise(config)
    _check_data(config.data)
    _check_paths(config)
    machine.check(config)
    if config.runtime.fused_backward:
        _check_fused_backward(config)


def _check_names(config: Config) -> None:
    """The run must have a name.  A group's `name` records its choice; setting it would not choose
    anything."""
    if not config.name.strip():
        raise UserError("name is empty; it names the run's files")
    for group in ("method", "optim", "loss", "schedule"):
        node = getattr(config, group)
        if node.name != type(node).name:
            raise UserError(f"{group}.name={node.name}: choose it as {group}={node.name}")


def _check_trained(config: Config) -> None:
    parts = config.method.train
    for part in parts:
        if part not in TRAINABLE_PARTS:
            raise UserError(f"method.train={parts}: {unknown('part', part, TRAINABLE_PARTS)}")
    if len(set(parts)) < len(parts):
        raise UserError(f"method.train={parts} names a part twice; once is enough")
    if not parts:
        raise UserError("method.train=[] trains nothing; name unet, or text encoders")
    if config.model.quantization != "none" and isinstance(config.method, FullConfig):
        raise UserError(
            f"model.quantization={config.model.quantization} is of frozen weights, and method=full "
            "trains or exports them; use method=lora or model.quantization=none"
        )
    if set(parts) - {"unet"} and config.model.text_dtype == "float16":
        raise UserError(
            f"method.train={parts}: text encoders cannot be trained in float16, in which small "
            "updates are lost; use model.text_dtype=bfloat16 or float32"
        )


def _check_adapters(config: AdapterConfig) -> None:
    """Refuse adapters that are wrong for any model."""
    patterns = [("ranks", one.pattern) for one in config.ranks]
    texts = set(config.train) - {"unet"}
    for key, parts in (("targets", set(config.train) - texts), ("text_targets", texts)):
        if parts and not getattr(config, key):
            raise UserError(
                f"method.{key}=[] adapts no layer of {', '.join(sorted(parts))}; name some, or "
                f"leave it out of method.train"
            )
        patterns += [(key, pattern) for pattern in getattr(config, key)]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"method.{key}: {pattern} is not a regular expression: {error}"
            ) from error


def _check_start(config: AdapterConfig) -> None:
    if config.start_from and not Path(config.start_from).expanduser().is_file():
        raise UserError(
            f"method.start_from={config.start_from} does not exist; name a "
            f"{config.name} file, .safetensors"
        )


def _check_fused_backward(config: Config) -> None:
    """Refuse what a fused backward rules out: options that need all gradients at once, or a step
    that can be undone."""
    choice, without = "runtime.fused_backward=true", "runtime.fused_backward=false"
    if config.optim.name not in optim.FAMILY:
        raise UserError(
            f"{choice}: optim={config.optim.name} cannot step inside the backward pass, only this "
            f"family's optimizers can ({', '.join(optim.FAMILY)}); choose one, or {without}"
        )
    is_global, norm = config.method.clip == "global", vars(config.optim)["max_grad_norm"]
    for clip, given, remedy in (
        (
            "method.clip=global",
            is_global,
            "set method.clip=exact (a second backward pass), lagged (by the norm of the previous "
            "step), rms (each tensor by itself) or none",
        ),
        (
            f"optim.max_grad_norm={norm or 0:g}",
            norm is not None,
            "set optim.max_grad_norm=null (method.clip=exact and lagged work without them)",
        ),
    ):
        if given:
            raise UserError(
                f"{choice}: {clip} clips by the norm of all gradients, which never exist all at "
                f"once; {remedy}, or {without}"
            )
    if vars(config.optim)["on_nonfinite"] == "raise":
        raise UserError(
            f"{choice}: optim.on_nonfinite=raise stops before anything is updated, but part of the "
            "step is done when a gradient that is not finite is found; set "
            f"optim.on_nonfinite=skip, or {without}"
        )


def _check_curvature(config: Config) -> None:
    """Refuse what Sophia's estimate rules out: it assumes a squared error
    (`trainer/training/curvature.py`)."""
    if not estimates_curvature(config.optim.name):
        return
    if not isinstance(config.loss, MseConfig):
        raise UserError(
            f"optim={config.optim.name} estimates the curvature of a squared error, and loss="
            f"{config.loss.name} is not one; use loss=mse, or another optimizer"
        )
    if vars(config.optim)["on_nonfinite"] == "raise":
        raise UserError(
            f"optim.on_nonfinite=raise: optim={config.optim.name} would end the run if a gradient "
            "of its curvature estimate is not finite; use optim.on_nonfinite=skip"
        )


def _check_noise(config: Config) -> None:
    noise = config.noise
    if noise.prediction != "model" and (wrong := contradiction(noise, noise.prediction)):
        raise UserError(wrong)
    if noise.timestep_high is not None and noise.timestep_low >= noise.timestep_high:
        raise UserError(
            f"noise.timestep_low={noise.timestep_low} must be below noise.timestep_high="
            f"{noise.timestep_high}; the timesteps of training are [low, high)"
        )


def _check_paths(config: Config) -> None:
    if not config.model.path.strip():
        raise UserError("model.path is empty; name a folder")
    model = Path(config.model.path).expanduser()
    if model.is_dir() and not (model / "model_index.json").is_file():
        raise UserError(
            f"model.path={model} is not a diffusers pipeline folder: it has no model_index.json"
        )
    for option, name in (("model.path", config.model.path), ("model.vae", config.model.vae)):
        if name and (missing := why_missing(option, name)):
            raise UserError(missing)


def _check_data(config: DataConfig) -> None:
    """Refuse missing sources, and sizes that the VAE and the buckets do not allow."""
    sources.check(config)
    buckets.check(config)
    extensions = config.caption_extension
    for extension in extensions if isinstance(extensions, list) and extensions else [extensions]:
        if (
            not isinstance(extension, str)
            or not re.fullmatch(r"\.[^./\\]+", extension)
            or extension in PICTURE_SUFFIXES
        ):
            raise UserError(
                f"data.caption_extension={extension} is not the ending of a text file, such as .txt"
            )
    if not config.tag_separator:
        raise UserError("data.tag_separator is empty; set what separates tags, such as ','")
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise UserError(
            f"data.background={config.background} is not a colour; use a name, such as white, or "
            "#rrggbb"
        ) from None
