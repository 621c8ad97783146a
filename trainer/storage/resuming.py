"""Which checkpoint `resume=` names, and whether this run may continue from it."""

import contextlib
import json
import logging
import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config import OUTPUTS, Config, ScheduleConfig, flatten, for_hydra, is_in, with_usual
from trainer.errors import UserError
from trainer.storage import checkpoint
from trainer.storage.checkpoint import Checkpoint
from trainer.storage.steps import completed
from trainer.system import processes

log = logging.getLogger(__name__)

# Options that decide what is learned, and groups of them.
_LEARNED = (
    *("seed", "model", "data", "method", "optim", "loss", "noise", "schedule"),
    *("runtime.accumulation", "runtime.processes"),
)
# Those in these groups that do not.  What lies at a path is compared by its content:
# `check_content`.
_NOT_LEARNED = {
    *OUTPUTS,
    *("model.path", "model.vae", "data.path", "method.start_from"),
    *("data.max_unreadable", "data.max_pixels"),
    *("method.ema.device", "method.ema.sample", "method.ema.export"),
}

# What eval/loss depends on, beside the weights.
_MEASURED = (
    *("log.eval_points", "the data", "the model"),
    *("model.quantization", "noise.prediction", "noise.zero_terminal_snr"),
)
_LENGTH = {"schedule.steps", "schedule.epochs"}  # may grow: `check_length`

# Options of which saved tensors and optimizer states do not fit another value.
_FIXED = {
    *("optim.name", "optim.class_path", "method.name", "method.train"),
    *("method.rank", "method.ranks", "method.dora", "method.targets", "method.text_targets"),
    *("method.factor", "method.decompose_both"),
}


def find(resume: str) -> list[Path]:
    """The checkpoints that `resume=` may mean, best last: a single one, or all of a run.

    Raises UserError if there is none.
    """
    path = latest_run() if resume == "latest" else Path(resume).expanduser().resolve()
    if (path / "checkpoint.json").is_file():
        return [path]
    if checkpoints := checkpoint.found_in(path):
        return checkpoints
    raise UserError(
        f"resume={resume}: there is no checkpoint there; "
        "name a run's folder, a checkpoint's, or latest"
    )


def latest_run() -> Path:
    """The run under ./runs with the newest checkpoint.

    Raises UserError if there is none, or if a newer run has no checkpoint: resuming an older run
    instead would go unnoticed.
    """
    saved = _newest("checkpoints/step-*/checkpoint.json")
    if not saved:
        raise UserError(
            "resume=latest: there is no checkpoint under ./runs; start a run without resume"
        )
    (when, record), begun = saved, _newest("claim.json")
    run = record.parents[2]
    if begun and begun[0] > when and not completed(begun[1].parent / "checkpoints"):
        raise UserError(
            f"resume=latest: the newest run, {begun[1].parent}, has no checkpoint; start it again, "
            f"or resume the newest that has one: resume={run}"
        )
    return run.resolve()


def _newest(pattern: str) -> tuple[float, Path] | None:
    """The newest file of any run that matches, and its time."""
    by_time: dict[float, Path] = {}
    for path in Path("runs").glob(f"**/{pattern}"):
        with contextlib.suppress(OSError):  # just deleted by a running process
            by_time[path.stat().st_mtime] = path
    return max(by_time.items()) if by_time else None


def overrides_of(resume: str) -> list[str]:
    """The command-line options of the run that `resume=` names; [] if no checkpoint can be read,
    which `to_resume` reports."""
    try:
        for folder in reversed(find(resume)):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
                return list(record["overrides"])
    except UserError:
        pass
    return []


def run_folder_of(resume: str) -> Path | None:
    """The folder of the run, if it continues there; None if it forks into a new folder.

    A run continues in its folder from its newest checkpoint.  From an older one, or from a copy
    outside of any run, it forks, so that nothing later is overwritten.
    """
    newest = find(resume)[-1]
    is_in_run = newest.parent.name == "checkpoints"
    goes_on = is_in_run and completed(newest.parent)[-1] == newest
    return newest.parents[1] if goes_on else None


def to_resume(config: Config, given: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint that `config.resume` names, or None.  Raises UserError if its configuration
    does not fit this one.

    Options that decide what is learned must be equal, but a run may become longer; where, how often
    and how verbosely may change.  given: the options on this command line.  An option that did not
    exist yet when the checkpoint was written, and is not given, counts as unchanged.
    """
    if not config.resume:
        return None
    saved = load_newest(find(config.resume))
    if config.schedule.epochs is None:  # otherwise the length is known once the data is read
        check_length(saved, config.schedule, config.runtime.allow_config_change)
    changed = _changes(config, saved, given)
    if fixed := _FIXED & changed.keys():
        raise UserError(
            f"resume: {changed[min(fixed)]} cannot change; the saved optimizer state and trained "
            "tensors do not fit the change. Start a new run from the exported model instead"
        )
    refused = {key: change for key, change in changed.items() if key not in _LENGTH}
    if refused and not config.runtime.allow_config_change:
        remedies = ["leave these options out"] if refused.keys() - {"runtime.processes"} else []
        if "runtime.processes" in refused:  # no option of a command line
            before = saved.config["runtime"].get("processes", 1)
            remedies.append(f"start it as before ({processes.command(before)})")
        raise UserError(
            f"resume: the checkpoint has another configuration ({', '.join(refused.values())}); "
            f"{' and '.join(remedies)}, or set runtime.allow_config_change=true"
        )
    if _is_complete(config.schedule, saved):
        log.warning(
            "this run is already complete: step %d was its last, so it is only evaluated, exported "
            "and drawn again; to train longer set %s=..., and to resume another run name its "
            "folder (resume=runs/...)",
            saved.step,
            "schedule.steps" if config.schedule.epochs is None else "schedule.epochs",
        )
    if changed:
        log.warning("resuming with a changed configuration: %s", ", ".join(changed.values()))
    return saved


def _is_complete(schedule: ScheduleConfig, saved: Checkpoint) -> bool:
    """Whether a checkpoint is of the last step, as far as that is known before the data is read."""
    if schedule.epochs is None:
        return saved.step == schedule.steps
    before = saved.config["schedule"]  # with the steps that its epochs took
    return schedule.epochs == before.get("epochs") and saved.step == before["steps"]


def _changes(config: Config, saved: Checkpoint, given: Collection[str]) -> dict[str, str]:
    """The options that decide what is learned and differ from the checkpoint's: {name: "name: there
    -> here"}."""
    ignored = set(_NOT_LEARNED)
    if config.schedule.epochs is not None:  # steps follow from the data
        ignored.add("schedule.steps")
    if config.schedule.warmup_steps is None:
        ignored.add("schedule.warmup_steps")
    here, there = _options(asdict(config)), _options(saved.config)
    return {
        key: f"{key}: {there.get(key)} -> {here.get(key)}"
        for key in sorted(here.keys() | there.keys())
        if is_in(key, _LEARNED) and not is_in(key, ignored)
        if here.get(key) != there.get(key) and (key in given or not _is_newer(key, there))
    }


def as_argument(run: Path) -> str:
    """The `resume=` argument for this run, quoted for the shell and for Hydra."""
    return shlex.quote(f"resume={for_hydra(run)}")


def load_newest(folders: list[Path]) -> Checkpoint:
    """Load the last undamaged one; a damaged one is skipped with a warning."""
    for folder in reversed(folders):
        try:
            loaded = checkpoint.load(folder)
        except checkpoint.OtherVersionError:
            raise
        except UserError as error:
            log.warning("%s; trying the previous one", error)
            continue
        log.info("resuming from %s", folder)
        return loaded
    raise UserError("there is no undamaged checkpoint to resume from")


def _is_newer(key: str, there: Mapping[str, Any]) -> bool:
    """Whether an option did not exist when the checkpoint was written, which has other options of
    the same group."""
    group = key.rpartition(".")[0]
    is_own = group == "optim.options"  # free-form: those of optim=external
    return key not in there and not is_own and any(k.startswith(f"{group}.") for k in there)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as {option name: value}, without the paths in data.sources."""
    flat = flatten(config)
    sources = flat.get("data.sources") or []
    flat["data.sources"] = [{k: v for k, v in source.items() if k != "path"} for source in sources]
    return flat


def check_length(saved: Checkpoint, schedule: ScheduleConfig, may_change: bool) -> None:
    """Raise UserError for a schedule of fewer steps, or epochs, than the checkpoint has done; or,
    unless it may change, than it was to do.  The schedule's steps are known."""
    key = "schedule.steps" if schedule.epochs is None else "schedule.epochs"
    if schedule.steps < saved.step:
        wanted, done = float(schedule.steps), float(saved.step)
        if schedule.epochs is not None:
            wanted, done = schedule.epochs, saved.epochs
        raise UserError(
            f"resume: {key}={wanted:g}, and the checkpoint is at {done:g}; {key}={done:g} stops "
            "there, a larger value continues, resume=OLDER_CHECKPOINT goes back"
        )
    before = saved.config["schedule"]
    is_kept = schedule.epochs is not None and schedule.epochs == before.get("epochs")
    if schedule.steps < before["steps"] and not (is_kept or may_change):
        raise UserError(
            f"resume: {key} would make the run shorter ({before['steps']} -> {schedule.steps} "
            "steps), and its learning rate another; leave it out, or set "
            "runtime.allow_config_change=true"
        )


def check_content(saved: Checkpoint, model: str, data: str, may_change: bool) -> None:
    """Raise UserError, unless they may change, if the model, or pictures or captions, are others
    than the run started with.  Their paths do not matter.  model, data: this run's sketch of the
    one, and fingerprint of the others."""
    both = {
        "the model is": (saved.model, model),
        "the pictures or captions are": (saved.data, data),
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


def drop_other_measure(saved: Checkpoint, config: Config, model: str, data: str) -> None:
    """Forget the losses before the first step if the resumed run measures something else.  model,
    data: as for `check_content`."""
    groups = ("log", "model", "noise")
    before = {group: with_usual(group, saved.config[group]) for group in groups}
    there = flatten(before) | {"the data": saved.data, "the model": saved.model}
    here = flatten(asdict(config)) | {"the data": data, "the model": model}
    changed = [what for what in _MEASURED if there[what] != here[what]]
    if changed and saved.losses_before:
        saved.losses_before.clear()
        message = "%s changed, so eval/loss is no longer comparable with earlier values"
        log.warning(message, " and ".join(changed))
