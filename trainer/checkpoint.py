"""Checkpoints: everything a run needs to resume as if it had never stopped.

A checkpoint is a folder `checkpoints/step-000200` with `weights.safetensors` (the trained tensors),
`average.safetensors` (their averages, where there are some), `optimizer.pt` and `checkpoint.json`
(step, counters, configuration, checksums).  A folder of that name is complete or does not exist
(`trainer.disk`).  There is no RNG state: all randomness is a function of (seed, step, place in the
batch).
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import pickle
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer import disk
from trainer.config import Config, ConstantConfig, flatten
from trainer.errors import UserError
from trainer.formats import stream
from trainer.formats.weights import of_tensors

log = logging.getLogger(__name__)

# Options that do not change what is learned, in groups that do (`to_resume`).  What lies at a path
# is compared by its content: `check_content`.
_ANYWHERE = {
    "model.path",
    "model.vae",
    "data.path",
    "data.cache",
    "data.max_unreadable",
    "data.max_pixels",
    "method.export",
    "method.export_dtype",
    "method.export_every",
    "method.start_from",
    "method.ema.device",
    "method.ema.sample",
    "method.ema.export",
}
_FILES = ("weights.safetensors", "optimizer.pt")  # of every checkpoint
_AVERAGE = "average.safetensors"


@dataclass(kw_only=True)
class Counters:
    """What a run has counted so far, in all of its sessions."""

    skipped_steps: int = 0
    last_whole_step: int = 0  # the last that was not skipped
    eval_loss_before: float = math.nan  # before the first step; NaN where it is of other points
    holdout_loss_before: float = math.nan  # of held-out pictures, alike
    grad_norm: float = math.nan  # of the last step, by which method.clip=lagged clips the next
    epochs: float = 0.0  # how often the data was gone through; the order of batches goes on by it
    pictures: int = 0  # trained on, each time counted
    seconds: float = 0.0  # spent in training steps
    # Of steps that measure speed: `trainer.clock`.
    steady_steps: int = 0
    steady_seconds: float = 0.0
    steady_pictures: int = 0
    steady_times: list[float] = field(default_factory=list)  # seconds, of the last
    wall_seconds: float = 0.0
    # The most memory; 0: not known.
    peak_training_bytes: int = 0
    peak_bytes: int = 0
    watch: dict[str, Any] = field(default_factory=dict)  # of `trainer.watch`


@dataclass(kw_only=True)
class Checkpoint:
    """A run between two steps.  `step` counts the steps done."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor]  # of the weights; empty without method.ema
    config: dict[str, Any]
    overrides: list[str]  # of the command line that gave it
    model: str  # a sketch of the one that training began with
    data: str  # fingerprint of the samples
    counters: Counters


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-NNNNNN` unless it is there.  Raises UserError when the disk does not take
    it."""
    final = folder / f"step-{checkpoint.step:06d}"
    if final.exists():
        return final  # a finished run that was resumed
    with disk.whole_folder(final) as temporary:
        stream.write(temporary / "weights.safetensors", of_tensors(checkpoint.weights), {})
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        if checkpoint.average:
            stream.write(temporary / _AVERAGE, of_tensors(checkpoint.average), {})
        files = (*_FILES, _AVERAGE) if checkpoint.average else _FILES
        record: dict[str, Any] = {
            "step": checkpoint.step,
            "counters": asdict(checkpoint.counters),
            "config": checkpoint.config,
            "overrides": checkpoint.overrides,
            "model": checkpoint.model,
            "data": checkpoint.data,
            "sha256": {name: _sha256_file(temporary / name) for name in files},
        }
        record["sha256"]["checkpoint.json"] = _sha256(_canonical(record))
        (temporary / "checkpoint.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return final


def rotate(folder: Path, keep: int, last_whole: int) -> None:
    """Delete all but the newest `keep`, and the newest that is known to be good: `proven`."""
    spared = proven(folder, last_whole)
    for old in completed(folder)[:-keep]:
        if old == spared:
            continue
        try:  # under its own name it must not be there in parts
            old.rename(old.with_name(f".{old.name}.tmp"))
        except OSError as error:
            log.warning("%s is not deleted: %s", old, error)
    for stale in folder.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)  # what stays is tried again after the next


def proven(folder: Path, last_whole: int) -> Path | None:
    """The newest checkpoint that a whole step followed, whose loss and gradient were therefore
    finite; None where there is none."""
    good = [path for path in completed(folder) if step_of(path) < last_whole]
    return good[-1] if good else None


def load(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint, to the CPU.  Raises UserError when it is damaged."""
    record = verified(folder)
    try:
        with _naming(folder):
            return Checkpoint(
                step=record["step"],
                weights=load_file(folder / "weights.safetensors"),
                optimizer=torch.load(
                    folder / "optimizer.pt", weights_only=True, map_location="cpu"
                ),
                average=load_file(folder / _AVERAGE) if _AVERAGE in record["sha256"] else {},
                config=record["config"],
                overrides=record["overrides"],
                model=record["model"],
                data=record["data"],
                counters=Counters(**record["counters"]),
            )
    except pickle.UnpicklingError as error:  # as it was written, by its checksum
        raise UserError(f"checkpoint {folder} cannot be resumed: {unread(error)}") from error


def verified(folder: Path, without: str | None = None) -> dict[str, Any]:
    """The contents of checkpoint.json.  Raises UserError where it, or a file of the checkpoint
    other than `without`, has changed since it was written."""
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
        return record


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn whatever is wrong with a checkpoint into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"checkpoint {folder} is damaged: {reason}") from error


def unread(error: pickle.UnpicklingError) -> str:
    """Why `torch.load` does not read an optimizer's state, in one line."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"the optimizer's state holds {found[1] if found else 'an object'}, which is not loaded "
        "from a file, because unpickling objects can run code"
    )


def load_newest(folders: list[Path]) -> Checkpoint:
    """The last of these that is undamaged; each damaged one is named and skipped."""
    for folder in reversed(folders):
        try:
            loaded = load(folder)
        except UserError as error:
            log.warning("%s; trying the previous one", error)
            continue
        log.info("resuming from %s", folder)
        return loaded
    raise UserError("there is no undamaged checkpoint to resume from")


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints newer than `step`: they were damaged, and the resumed run will write those
    steps again.  step-000400 -> damaged-step-000400."""
    for newer in completed(folder):
        if step_of(newer) <= step:
            continue
        names = (f"damaged-{newer.name}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
        aside = next(path for path in map(folder.joinpath, names) if not path.exists())
        newer.rename(aside)
        log.warning("%s is now %s", newer, aside.name)


def completed(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, oldest first."""
    found = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find(resume: str) -> list[Path]:
    """The checkpoints that `resume=` means, best last: one checkpoint's folder, or all of a run's.

    Raises UserError for none.
    """
    path = latest_run() if resume == "latest" else Path(resume).expanduser().resolve()
    if (path / "checkpoint.json").is_file():
        return [path]
    if checkpoints := completed(path / "checkpoints") or completed(path):
        return checkpoints
    raise UserError(
        f"resume={resume}: there is no checkpoint there; "
        "name a run's folder, a checkpoint's, or latest"
    )


def latest_run() -> Path:
    """The run under ./runs with the newest checkpoint.

    Raises UserError where there is none, and where a newer run has begun but has no checkpoint: to
    resume an older run instead would go unnoticed.
    """
    saved = _newest("checkpoints/step-*/checkpoint.json")
    if not saved:
        raise UserError(
            "resume=latest: there is no checkpoint under ./runs; start a run without resume"
        )
    (when, record), begun = saved, _newest("environment.json")
    run = record.parents[2]
    if begun and begun[0] > when and not completed(begun[1].parent / "checkpoints"):
        raise UserError(
            f"resume=latest: the newest run, {begun[1].parent}, has no checkpoint; start it again, "
            f"or resume the newest that has one: resume={run}"
        )
    return run.resolve()


def _newest(pattern: str) -> tuple[float, Path] | None:
    """The newest of the runs' files of this name, and when it was written."""
    found: dict[float, Path] = {}
    for path in Path("runs").glob(f"**/{pattern}"):
        with contextlib.suppress(OSError):  # of a run that goes on, and has just deleted it
            found[path.stat().st_mtime] = path
    return max(found.items()) if found else None


def overrides_of(resume: str) -> list[str]:
    """The command line's options of the run that `resume=` means; [] where no checkpoint can be
    read; `to_resume` reports that."""
    try:
        for folder in reversed(find(resume)):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
                return list(record["overrides"])
    except UserError:
        pass
    return []


def run_folder_of(resume: str) -> Path | None:
    """The run that goes on in its own folder, or None where it must fork into a new one.

    A run goes on where it is from its newest checkpoint.  From an older one, or from a copy that
    lies outside of a run, it forks, so that nothing later is written over.
    """
    newest = find(resume)[-1]
    goes_on = newest.parent.name == "checkpoints" and completed(newest.parent)[-1] == newest
    return newest.parents[1] if goes_on else None


def to_resume(config: Config, given: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint that `config.resume` names, once its configuration is known to be this run's.

    Options that decide what is learned must be equal; where, how often and how verbosely may
    change.  given: those on this command line; of others that the checkpoint does not know, as
    there were none yet, the run had what is their default.
    """
    if not config.resume:
        return None
    found = load_newest(find(config.resume))
    if config.schedule.epochs is None:  # else it is known later
        check_length(found, config.schedule)
    here, there = _options(asdict(config)), _options(found.config)
    learned = (
        "seed",
        "model.",
        "data.",
        "method.",
        "optim.",
        "loss.",
        "noise.",
        "schedule.",
        "runtime.accumulation",
    )
    keys = sorted(key for key in here.keys() | there.keys() if key.startswith(learned))
    known = set(_ANYWHERE)
    if config.schedule.epochs is not None:  # the data decides, as it did
        known.add("schedule.steps")
    if config.schedule.warmup_steps is None:
        known.add("schedule.warmup_steps")
    keys = [key for key in keys if key not in known]
    changed = {
        k: f"{k}: {there.get(k)} -> {here.get(k)}"
        for k in keys
        if here.get(k) != there.get(k) and (k in given or not _is_newer(k, there))
    }
    fixed = {"optim.name", "optim.class_path", "method.name", "method.rank", "method.ranks"}
    fixed &= changed.keys()
    if fixed:
        raise UserError(
            f"resume: {changed[min(fixed)]} cannot change; the saved optimizer state and trained "
            "tensors do not fit the change. Start a new run from the exported model instead"
        )
    if changed and not config.runtime.allow_config_change:
        raise UserError(
            f"resume: the checkpoint has another configuration ({', '.join(changed.values())}); "
            "leave these options out, or set runtime.allow_config_change=true"
        )
    if changed:
        log.warning("resuming with a changed configuration: %s", ", ".join(changed.values()))
    return found


def _is_newer(key: str, there: Mapping[str, Any]) -> bool:
    """Whether an option did not exist when a checkpoint was made: it has others of its group."""
    group = key.rpartition(".")[0]
    is_own = group == "optim.options"  # of another's optimizer, whatever there is
    return key not in there and not is_own and any(k.startswith(f"{group}.") for k in there)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration by its options' names, without the paths in data.sources."""
    flat = flatten(config)
    sources = flat.get("data.sources") or []
    flat["data.sources"] = [{k: v for k, v in one.items() if k != "path"} for one in sources]
    return flat


def check_length(checkpoint: Checkpoint, schedule: ConstantConfig) -> None:
    """Refuse a run of fewer steps, or epochs, than are done."""
    if schedule.steps >= checkpoint.step:
        return
    key, wanted, done = "schedule.steps", float(schedule.steps), float(checkpoint.step)
    if schedule.epochs is not None:
        key, wanted, done = "schedule.epochs", schedule.epochs, checkpoint.counters.epochs
    raise UserError(
        f"resume: {key}={wanted:g}, and the checkpoint is at {done:g}; {key}={done:g} stops there, "
        "a larger value continues, resume=OLDER_CHECKPOINT goes back"
    )


def check_content(checkpoint: Checkpoint, model: str, data: str, may_change: bool) -> None:
    """Refuse to resume with another model, or other pictures or captions, than the run began with;
    their paths may change."""
    both = {
        "the model is": (checkpoint.model, model),
        "the pictures or captions are": (checkpoint.data, data),
    }
    for what, (there, here) in both.items():
        if there == here:
            continue
        message = f"{what} not what the run started with"
        if not may_change:
            raise UserError(
                f"resume: {message}; put that back, or set runtime.allow_config_change=true"
            )
        log.warning("resuming, although %s", message)


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
