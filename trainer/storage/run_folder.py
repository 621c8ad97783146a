"""The folder of a run, where it must not overwrite another run."""

import shutil
from contextlib import suppress
from pathlib import Path

from trainer.config import Config, file_name
from trainer.errors import UserError
from trainer.storage import resuming
from trainer.storage.steps import completed, step_name

_MULTIRUN = "multirun.yaml"  # Hydra's, in a sweep's folder


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that contains a run's folder, at any depth; None if there is
    none."""
    return next(filter(is_sweep, folder.parents), None)


def is_sweep(folder: Path) -> bool:
    return (folder / _MULTIRUN).is_file()


def refuse_occupied(folder: Path, config: Config) -> None:
    """Raise UserError if a run would overwrite another, or files that belong to no run."""
    if completed(folder / "checkpoints"):
        if not config.resume:
            raise UserError(
                f"{folder} already holds a run; resume it with resume={folder}, or name another "
                "folder"
            )
        if resuming.run_folder_of(config.resume) != folder.resolve():
            raise UserError(
                f"{folder} holds a run that resume={config.resume} would overwrite; leave "
                "hydra.run.dir out, or name another folder"
            )
    written = ["config.yaml", "metrics.jsonl", "curves.png", "samples", "model", "lora", "results"]
    written += ["checkpoints", f"{file_name(config.name)}.safetensors"]
    theirs = [name for name in written if (folder / name).exists()]
    if theirs and not (folder / "environment.json").exists():
        raise UserError(
            f"{folder} is not a run's folder, and its {theirs[0]} would be overwritten; name "
            "another (hydra.run.dir)"
        )


def carry_before(forked: Path, folder: Path) -> None:
    """Copy the pictures drawn before the first step to a run that forks from another's checkpoint.
    The checkpoint may be outside any run."""
    before, began = Path("samples") / step_name(0), forked.parent.parent
    if (began / before).is_dir() and not (folder / before).exists():
        with suppress(OSError):  # a full disk, say: it is only a row of a grid
            shutil.copytree(began / before, folder / before)
