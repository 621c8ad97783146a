"""Values that `conf/` computes: a run's folder, a preset's learning rate, the lines of a prompt
file."""

from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

import optim
from trainer.config import ASSETS, conf_dir, file_name, large_model_lr, schema_of
from trainer.sampling import prompts
from trainer.storage.resuming import run_folder_of
from trainer.system import processes


def register() -> None:
    """Give OmegaConf the functions that `conf/` names: ${asset:...}, ${run_dir:...}, ...  Safe to
    call again."""
    OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS / name), replace=True)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_dir", _sweep_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("folder_name", file_name, replace=True)
    OmegaConf.register_new_resolver(
        "lines_of", lambda path: prompts.read(path) if path else [], replace=True
    )
    OmegaConf.register_new_resolver("processes", processes.world_size, replace=True)
    OmegaConf.register_new_resolver("default_lr", _default_lr, replace=True)


def _run_dir(resume: str | None, name: str) -> str:
    """The folder of this run: that of the run that it resumes, else a new one."""
    if resume and (folder := run_folder_of(resume)):
        return str(folder)
    return _unused(f"runs/{datetime.now():%Y-%m-%d/%H-%M-%S}-{file_name(name)}")


def _sweep_dir() -> str:
    """The folder of a sweep, if none is given."""
    return _unused(f"runs/sweep-{datetime.now():%Y%m%d-%H%M%S}")


def _unused(fresh: str) -> str:
    """This folder, with a number appended if another run began in the same second."""
    candidates = (fresh, *(f"{fresh}-{number}" for number in range(2, 1000)))
    return next(folder for folder in candidates if not Path(folder).exists())


def _default_lr(optimizer: str, method: str) -> float:
    """The learning rate of a preset for a large model."""
    if optimizer in optim.FAMILY:
        _, default = optim.options_of(optimizer)["lr"]
    else:
        default = OmegaConf.load(conf_dir() / "optim" / f"{optimizer}.yaml").lr
    return large_model_lr(optimizer, default, schema_of("method", method).share_of_rate)
