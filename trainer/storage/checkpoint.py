"""Checkpoints: everything a run needs to resume as if it had never stopped.

A checkpoint is a folder `checkpoints/step-000200` with `weights.safetensors` (what is trained),
`average.safetensors` (their averages, of method.ema or the optimizer, if any), `optimizer.pt` and
`checkpoint.json` (step, counters, configuration, checksums).  A folder of that name is complete or
does not exist (`trainer.system.disk`).  There is no RNG state: all randomness is a function of
(seed, step, place in the batch).
"""

import contextlib
import hashlib
import itertools
import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import UserError
from trainer.formats import stream
from trainer.formats.weights import of_tensors
from trainer.storage.steps import completed, delete, step_name, step_of
from trainer.system import disk

log = logging.getLogger(__name__)

_FILES = ("weights.safetensors", "optimizer.pt")  # of every checkpoint
_AVERAGE = "average.safetensors"
# The format, which changes with any of these fields, or with what they hold.
_VERSION = 1
_RECORDED = (
    "step",
    "epochs",
    "config",
    "overrides",
    "model",
    "data",
    "losses_before",
    "counters",
)


class OtherVersionError(UserError):
    """A checkpoint of another version of the trainer."""


@dataclass(kw_only=True)
class Checkpoint:
    """A run between two steps.  `step` counts the steps done, `epochs` the epochs, which decide
    which batch is next."""

    step: int
    epochs: float
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor]  # of the weights; empty if there is none
    config: dict[str, Any]
    overrides: list[str]  # of the command line that gave it
    model: str  # a sketch of the one that training began with
    data: str  # fingerprint of the samples
    losses_before: dict[str, float]  # of the first evaluation; empty if not comparable any more
    counters: dict[str, dict[str, Any]]  # of what counts over all sessions, by its name
    # Metadata of a LoRA on the data until now, for exports; not read on resuming.
    counted: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN` unless it exists.  Raises UserError if it cannot be written."""
    final = folder / step_name(checkpoint.step)
    if final.exists():
        return final  # a finished run that was resumed
    with disk.whole_folder(final) as temporary:
        stream.write(temporary / "weights.safetensors", of_tensors(checkpoint.weights), {})
        with open(temporary / "optimizer.pt", "wb") as file:  # of a path it would hide the reason
            torch.save(checkpoint.optimizer, file)
        if checkpoint.average:
            stream.write(temporary / _AVERAGE, of_tensors(checkpoint.average), {})
        files = (*_FILES, _AVERAGE) if checkpoint.average else _FILES
        record: dict[str, Any] = {
            "version": _VERSION,
            **{key: getattr(checkpoint, key) for key in _RECORDED},
            "counted": checkpoint.counted,  # which older checkpoints lack
            "sha256": {name: _sha256_file(temporary / name) for name in files},
        }
        record["sha256"]["checkpoint.json"] = _sha256(_canonical(record))
        (temporary / "checkpoint.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return final


def rotate(folder: Path, keep: int, proven: int, awaited: bool = True) -> None:
    """Delete all checkpoints but the newest `keep`, the newest of at most step `proven` (or the
    oldest, if none is) and, if it is awaited, the first one after that, which will be proven next:
    without it, none might ever live long enough."""
    saved = completed(folder)
    count = sum(step_of(path) <= proven for path in saved)
    spared = saved[max(count - 1, 0) : max(count + awaited, 1)]
    delete(old for old in saved[:-keep] if old not in spared)
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)  # retried after the next save


def newest(folder: Path, last: int) -> Path | None:
    """The newest checkpoint of at most step `last`; None if there is none."""
    found = [path for path in completed(folder) if step_of(path) <= last]
    return found[-1] if found else None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint into CPU memory.  Raises UserError if it is damaged, OtherVersionError if
    it has another format."""
    record = verified(folder)
    try:
        with _naming(folder):
            return Checkpoint(
                **{key: record[key] for key in _RECORDED},
                weights=load_file(folder / "weights.safetensors"),
                optimizer=torch.load(
                    folder / "optimizer.pt", weights_only=True, map_location="cpu"
                ),
                average=load_file(folder / _AVERAGE) if _AVERAGE in record["sha256"] else {},
            )
    except pickle.UnpicklingError as error:  # not damage: the checksum was right
        raise UserError(f"checkpoint {folder} cannot be resumed: {unread(error)}") from error


def verified(folder: Path, without: str | None = None) -> dict[str, Any]:
    """The contents of checkpoint.json.  Raises UserError if it, or any file of the checkpoint
    except `without`, has changed since it was written, and OtherVersionError if this version cannot
    read it."""
    with _naming(folder):
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        digests = dict(record["sha256"])
        own = digests.pop("checkpoint.json")
        if own != _sha256(_canonical(record | {"sha256": digests})):
            raise UserError("checkpoint.json does not match its checksum")
        if missing := sorted({*_FILES} - digests.keys()):
            raise UserError(f"{missing[0]} has no checksum")
        for name, digest in digests.items():
            if name != without and _sha256_file(folder / name) != digest:
                raise UserError(f"{name} does not match its checksum")
    if record.get("version") != _VERSION:
        raise OtherVersionError(
            f"checkpoint {folder} was written by another version of the trainer; resume it with "
            "that version (environment.json in the run's folder has its git revision)"
        )
    return record


def model_of(folder: Path) -> str | None:
    """The sketch of the model that training began with; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        return str(record["model"])
    return None


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn any error of reading into a UserError that names the checkpoint."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"checkpoint {folder} is damaged: {reason}") from error


def unread(error: pickle.UnpicklingError) -> str:
    """One line on why `torch.load` refused an optimizer's state."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"the optimizer's state holds {found[1] if found else 'an object'}, which is not loaded "
        "from a file, because unpickling objects can run code"
    )


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints newer than `step`, which are damaged: the resumed run will write those
    steps again.  step-000400 becomes damaged-step-000400."""
    for newer in completed(folder):
        if step_of(newer) <= step:
            continue
        names = (f"damaged-{newer.name}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
        aside = next(path for path in map(folder.joinpath, names) if not path.exists())
        newer.rename(aside)
        log.warning("%s is now %s", newer, aside.name)


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, given its folder or that of its checkpoints, oldest first."""
    return completed(folder / "checkpoints") or completed(folder)


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
