"""Checkpoints: everything a run needs to go on as if it had never stopped, written so that no crash
can spoil one.

A checkpoint is a folder `checkpoints/step-000200` with `weights.safetensors` (the trained tensors),
`optimizer.pt` and `checkpoint.json` (step, configuration, and a SHA-256 of the other two).  A
folder of that name is complete or does not exist (`trainer.disk`).  There is no RNG state: all
randomness is a function of (seed, step, sample).
"""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer import disk
from trainer.config import Config, flatten
from trainer.errors import UserError

log = logging.getLogger(__name__)

_FILES = ("weights.safetensors", "optimizer.pt")


@dataclass(kw_only=True)
class Checkpoint:
    """A run between two steps.  `step` counts the steps done."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    counters: dict[str, float]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-NNNNNN`, then delete all but the newest `keep`.

    Raises UserError when the disk does not take it; older checkpoints are then untouched.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    with disk.whole_folder(final) as temporary:
        weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        record = {
            "step": checkpoint.step,
            "counters": checkpoint.counters,
            "sha256": {name: _sha256(temporary / name) for name in _FILES},
            "config": checkpoint.config,
        }
        (temporary / "checkpoint.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    for old in completed(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint.  Raises UserError when it is incomplete or damaged."""
    try:
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        for name, digest in record["sha256"].items():
            if _sha256(folder / name) != digest:
                raise UserError(
                    f"checkpoint {folder} is damaged: {name} does not match its checksum"
                )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from error
    return Checkpoint(
        step=record["step"],
        weights=load_file(folder / "weights.safetensors"),
        optimizer=torch.load(folder / "optimizer.pt", weights_only=True),
        config=record["config"],
        counters=record["counters"],
    )


def load_newest(folders: list[Path]) -> Checkpoint:
    """The newest checkpoint that is undamaged; each damaged one is named and passed over."""
    for folder in reversed(folders):
        try:
            return load(folder)
        except UserError as error:
            log.warning("%s; trying the one before", error)
    raise UserError("there is no undamaged checkpoint to resume from")


def completed(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def to_resume(config: Config) -> Checkpoint | None:
    """The checkpoint that `config.resume` names, once its configuration is known to be this run's.

    What decides what is learned must be equal; where, how often and how loudly may change.
    """
    if not config.resume:
        return None
    found = load_newest(find(config.resume))
    here, there = flatten(asdict(config)), flatten(found.config)
    learned = ("seed", "model.", "data.", "method.", "optim.", "loss.", "schedule.")
    keys = [key for key in sorted(here.keys() | there.keys()) if key.startswith(learned)]
    changes = [f"{k}: {there.get(k)} -> {here.get(k)}" for k in keys if here.get(k) != there.get(k)]
    if changes and not config.runtime.allow_config_change:
        raise UserError(
            f"resume: the checkpoint was made with another configuration ({', '.join(changes)}); "
            "give the same options, or set runtime.allow_config_change=true"
        )
    if changes:
        log.warning("resuming with a changed configuration: %s", ", ".join(changes))
    return found


def find(resume: str) -> list[Path]:
    """The checkpoints that `resume=` means, best last: one checkpoint's folder, or all of a run's.

    `latest` is the run under ./runs with the newest checkpoint.  Raises UserError when there is
    none.
    """
    if resume == "latest":
        found = sorted(
            Path("runs").glob("**/checkpoints/step-*/checkpoint.json"),
            key=lambda path: path.stat().st_mtime,
        )
        if not found:
            raise UserError(
                "resume=latest: there is no checkpoint under ./runs; start a run without resume"
            )
        return completed(found[-1].parents[1])
    path = Path(resume).expanduser()
    if (path / "checkpoint.json").is_file() or (path.name.startswith("step-") and path.is_dir()):
        return [path]
    if checkpoints := completed(path / "checkpoints"):
        return checkpoints
    raise UserError(
        f"resume={resume}: there is no checkpoint there; "
        "name a run's folder, a checkpoint's, or latest"
    )


def run_folder_of(resume: str) -> Path:
    """The run that a `resume=` value continues: the folder that holds `checkpoints/`."""
    return find(resume)[-1].parents[1]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
