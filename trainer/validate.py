"""What cannot work is refused here, once, before anything is loaded; after that it is trusted."""

import logging
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

import optim
from optim.options import unknown
from trainer.config import (
    DTYPES,
    PICTURE_SUFFIXES,
    Config,
    HuberConfig,
    LinearConfig,
    LoraConfig,
    MseConfig,
)
from trainer.errors import UserError

log = logging.getLogger(__name__)


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
    _check_curvature(config)
    _check_paths(config)
    _check_device(config.runtime.device)
    if config.runtime.fused_backward:
        _check_fused_backward(config)
    elif getattr(config.optim, "on_nonfinite", "skip") == "raise":
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


def _check_fused_backward(config: Config) -> None:
    """Gradients that are consumed as they arrive: refuse what needs all of them, or a step that
    can be taken back."""
    choice, without = "runtime.fused_backward=true", "runtime.fused_backward=false"
    if config.optim.name not in optim.FAMILY:
        raise UserError(
            f"{choice}: optim={config.optim.name} cannot step inside the backward pass, only this "
            f"family's optimizers can ({', '.join(optim.FAMILY)}); choose one, or {without}"
        )
    if issubclass(optim.FAMILY[config.optim.name], optim.Sophia):
        raise UserError(
            f"{choice}: optim={config.optim.name} needs a second backward pass whose gradients are "
            f"not to be stepped; choose another optimizer, or {without}"
        )
    for key, norm in (
        ("method.max_grad_norm", config.method.max_grad_norm),
        ("optim.max_grad_norm", config.optim.max_grad_norm),
    ):
        if norm is not None:
            raise UserError(
                f"{choice}: {key}={norm:g} clips by the norm of all gradients, which are never "
                f"there at once; set {key}=null (optim.grad_clip={norm:g} clips each tensor's own "
                f"norm), or {without}"
            )
    if config.optim.on_nonfinite == "raise":
        raise UserError(
            f"{choice}: optim.on_nonfinite=raise stops before anything is updated, and parts of "
            f"the step are done when a gradient is found that is not finite; set "
            f"optim.on_nonfinite=skip, or {without}"
        )


def _check_curvature(config: Config) -> None:
    """Sophia's targets are sampled as a squared error has them (`trainer/curvature.py`)."""
    is_sophia = issubclass(optim.FAMILY.get(config.optim.name, object), optim.Sophia)
    if is_sophia and not isinstance(config.loss, MseConfig):
        raise UserError(
            f"optim={config.optim.name} estimates the curvature of a squared error, and loss="
            f"{config.loss.name} is none; use loss=mse, or another optimizer"
        )


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
