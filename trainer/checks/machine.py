"""Refuses what this machine does not have: devices, processes, packages."""

import importlib.util
import re

import torch

from trainer.config import Config, estimates_curvature
from trainer.errors import UserError
from trainer.system import processes


def check(config: Config) -> None:
    """Raise UserError for the first thing that is missing."""
    check_device("runtime.device", config.runtime.device)
    _check_processes(config)
    _check_tensorboard(config)


def _check_processes(config: Config) -> None:
    """Refuse what torchrun's processes cannot share: a device, or a random estimate."""
    wanted, count = config.runtime.processes, processes.world_size()
    if wanted != count:
        raise UserError(
            f"runtime.processes={wanted}, and there are {count}; torchrun starts and counts them: "
            f"torchrun --nproc-per-node {wanted} -m trainer ..."
        )
    if count == 1:
        return
    if re.fullmatch(r"cuda:\d+", config.runtime.device):
        raise UserError(
            f"runtime.device={config.runtime.device}: each process of torchrun has a GPU of its "
            "own; use runtime.device=cuda, and CUDA_VISIBLE_DEVICES to choose which"
        )
    gpus = torch.cuda.device_count()
    if gpus and config.runtime.device != "cpu" and processes.local_world_size() > gpus:
        raise UserError(
            f"torchrun started more processes on this machine than it has GPUs; use "
            f"--nproc-per-node {gpus}"
        )
    if estimates_curvature(config.optim.name):
        raise UserError(
            f"optim={config.optim.name} estimates the curvature in one process only; choose "
            "another optimizer, or train without torchrun"
        )


def _check_tensorboard(config: Config) -> None:
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "log.tensorboard=true needs a package that is not installed: pip install tensorboard"
        )


def check_device(option: str, device: str) -> None:
    """Raise UserError that names `option` if this machine does not have the device."""
    if device == "auto":
        return
    if device.startswith("mps"):
        raise UserError(f"{option}={device}: Apple's GPUs are not supported; use {option}=cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"{option}={device} is not a device; use auto, cpu, cuda or cuda:N")
    wanted = torch.device(device)
    if wanted.type == "cuda" and (
        not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(
            f"{option}={device}: torch {torch.__version__} sees no such GPU; use {option}=cpu"
        )
