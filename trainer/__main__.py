"""`python -m trainer`: compose the configuration, check it, run it.

Hydra ends here: `run` and everything that it imports take plain dataclasses.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, cast

from trainer.system import signals

if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signals.leave_at_once)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer import config, sweep
from trainer.checks.validate import to_dataclasses
from trainer.cli import arguments, command, compose, help
from trainer.cli.explain import explain
from trainer.errors import UserError
from trainer.models import execution
from trainer.reporting.measure import ended_well, objective
from trainer.reporting.report import of_failure, read_summary, write_summary
from trainer.storage.checkpoint import completed
from trainer.storage.claim import TakenError, claimed, in_turn
from trainer.storage.run_folder import sweep_of
from trainer.system import console, memory, processes
from trainer.training import optimizers

# Users set it to see tracebacks.  Without it Hydra would print its own error page and exit, so it
# is always set from here on.
_wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"
_runs_begun: list[str] = []  # names; errors after that are not about the command line


@hydra.main(config_path=str(config.conf_dir()), config_name="config", version_base="1.3")
def train(composed: DictConfig) -> float:
    """One run; returns its final loss, which a sweeper may minimise (NaN if it failed)."""
    _runs_begun.append(composed.name)
    context = HydraConfig.get()
    given = OmegaConf.to_container(context.overrides.task, resolve=False)  # optim.lr=${...}, too
    folder, overrides = Path(context.runtime.output_dir), arguments.lasting(cast(list[str], given))
    if not processes.is_main():
        return _follow(composed, folder, overrides)
    resolved = _resolved(composed)
    if context.mode == RunMode.MULTIRUN:
        return _run_of_sweep(composed, folder, overrides, resolved)
    try:
        with claimed(folder, resolved):
            return _run(composed, folder, overrides)
    except Exception as error:
        if _wants_traceback or not isinstance(error, UserError | OSError):
            raise
        command.fail(str(error))


def _follow(composed: DictConfig, folder: Path, overrides: list[str]) -> float:
    """This process's part of the main one's run, which reports it."""
    try:
        checked = to_dataclasses(composed)
        from trainer.run import follow

        device = execution.use_device(checked.runtime.device)
        with console.muted(logging.CRITICAL), processes.joined(device):
            follow(checked, folder, overrides)
    except UserError as error:  # perhaps of this process alone, such as a lack of memory
        command.fail(str(error))
    except ConnectionError:
        raise SystemExit(2) from None
    return math.nan


def _run_of_sweep(
    composed: DictConfig, proposed: Path, overrides: list[str], resolved: dict[str, Any]
) -> float:
    """One run of a sweep, which may already be finished, begun, or taken by another process.
    Returns NaN if it failed or is taken, so that the sweep continues."""
    of_sweep = Path(HydraConfig.get().sweep.dir).absolute()
    if proposed.absolute() == of_sweep:
        command.fail(
            f"hydra.sweep.subdir={HydraConfig.get().sweep.subdir}: a run of a sweep needs a "
            "folder of its own"
        )
    with contextlib.ExitStack() as holding:
        with in_turn(of_sweep):
            sweep.planned.begun(of_sweep, overrides, resolved)
            folder = _placed(of_sweep, proposed, overrides, resolved)
            if ended_well(summary := read_summary(folder)):
                print(f"{folder} is already finished: {' '.join(overrides)}")
                return objective(summary)
            try:
                holding.enter_context(claimed(folder, resolved))
            except TakenError as error:
                print(f"left to another process: {error}")
                return math.nan
        try:
            return _run(composed, folder, overrides, goes_on=True)
        except SystemExit:
            print(f"to resume a sweep, repeat its command with hydra.sweep.dir={of_sweep}")
            raise
        except Exception as error:
            _record_failure(folder, error, overrides, _known_of_failed(composed))
            return math.nan


def _run(composed: DictConfig, folder: Path, overrides: list[str], goes_on: bool = False) -> float:
    """Check the configuration and train.  goes_on: from a checkpoint in the folder."""
    checked = to_dataclasses(composed)
    with memory.explained(checked, "before the first step"):
        device = execution.use_device(checked.runtime.device)
        optimizers.try_out(checked.optim, checked.method.rules, device)
    if goes_on and completed(folder / "checkpoints"):
        checked.resume = str(folder)  # the sweep was stopped
    from trainer.run import run  # imported after the checks: diffusers takes seconds

    of_sweep = sweep_of(folder)
    apart = sweep.planned.apart(of_sweep, overrides) if of_sweep else []
    with processes.joined(device):
        return run(checked, folder, overrides, apart)


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """The configuration, by which a sweep identifies its runs; {} if it cannot be resolved."""
    with contextlib.suppress(Exception):  # users' own resolvers may raise anything
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    return {}


def _placed(of_sweep: Path, proposed: Path, overrides: list[str], resolved: dict[str, Any]) -> Path:
    """The folder of a sweep's run; if it is not the one that Hydra made, that one is removed."""
    folder = sweep.place_of(of_sweep, proposed, overrides, resolved)
    if folder != proposed:
        with contextlib.suppress(OSError):
            proposed.rmdir()  # unless it is another run's
    return folder


def _known_of_failed(composed: DictConfig) -> dict[str, Any]:
    """What a sweep's table shows of a run that failed before it began."""
    rate, seed, name = (
        OmegaConf.select(composed, key, throw_on_resolution_failure=False)
        for key in ("optim.lr", "seed", "optim.name")
    )
    known = {"seed": seed, "optimizer": name}
    return known | ({"lr": rate} if isinstance(rate, int | float) else {})


def _record_failure(
    folder: Path, error: Exception, overrides: list[str], known: dict[str, Any]
) -> None:
    """Make a failed run of a sweep a row of its table, so that the sweep continues.  known: the
    summary of a run that never began; other runs have written their own."""
    if not isinstance(error, UserError):
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"error: {' '.join(overrides)}: {message}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    if read_summary(folder).get("error") != message:
        write_summary(folder, of_failure(folder, known | {"overrides": overrides}, error))


def main() -> None:
    """Run Hydra's command line; a user's mistake becomes one line and status 2."""
    _runs_begun.clear()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help.page())
        return
    compose.register()
    try:
        arguments.refuse_dashes(sys.argv[1:])
        arguments.refuse_repeated(sys.argv[1:])
        sys.argv[1:] = arguments.at_home(sys.argv[1:])
        sys.argv[1:] = arguments.flags_last(arguments.with_resumed(sys.argv[1:]))
        if {"-m", "--multirun"} & set(sys.argv) or any(a.startswith("sweep=") for a in sys.argv):
            arguments.refuse_shared_sweep()
            sys.argv[1:] = arguments.with_swept_groups(sys.argv[1:])
    except UserError as error:
        command.fail(str(error))
    if not processes.is_main():
        sys.argv[1:] = arguments.without_folder(sys.argv[1:])
    try:
        train()
    except Exception as error:  # from composition; Hydra and OmegaConf raise many types
        if _wants_traceback or _runs_begun:
            raise
        command.fail(explain(error, sys.argv[1:]))


if __name__ == "__main__":
    main()
