"""`python -m trainer`: compose the configuration, check it, run it.

Hydra ends here: `run` and everything that it imports take plain dataclasses.
"""

import contextlib
import logging
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer import config
from trainer.checks.validate import to_dataclasses
from trainer.cli import arguments, command, compose, help, topics
from trainer.cli.explain import explain
from trainer.errors import UserError
from trainer.models import execution
from trainer.storage.claim import claimed
from trainer.storage.run_folder import sweep_of
from trainer.storage.steps import completed
from trainer.sweep import job, planned
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
        of_sweep = Path(context.sweep.dir).absolute()
        if folder.absolute() == of_sweep:
            subdir = f"hydra.sweep.subdir={context.sweep.subdir}"
            command.fail(f"{subdir}: a run of a sweep needs a folder of its own")
        train_in = partial(_run, composed, overrides=overrides, goes_on=True)
        return job.run(of_sweep, composed, resolved, folder, overrides, train_in)
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


def _run(composed: DictConfig, folder: Path, overrides: list[str], goes_on: bool = False) -> float:
    """Check the configuration and train.  goes_on: from a checkpoint in the folder."""
    checked = to_dataclasses(composed)
    with memory.explained(checked):
        device = execution.use_device(checked.runtime.device)
        optimizers.try_out(checked.optim, checked.method.rules, device)
        optimizers.refuse_second_average(checked.optim, checked.method)
    if goes_on and completed(folder / "checkpoints"):
        checked.resume = str(folder)  # the sweep was stopped
    from trainer.run import run  # imported after the checks: diffusers takes seconds

    of_sweep = sweep_of(folder)
    apart = planned.apart(of_sweep, overrides) if of_sweep else []
    with processes.joined(device):
        return run(checked, folder, overrides, apart)


def _resolved(composed: DictConfig) -> dict[str, Any]:
    """The configuration, by which a sweep identifies its runs; {} if it cannot be resolved."""
    with contextlib.suppress(Exception):  # users' own resolvers may raise anything
        return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    return {}


def main() -> None:
    """Run Hydra's command line; a user's mistake becomes one line and status 2."""
    _runs_begun.clear()
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    try:
        if {"--help", "-h"} & {*sys.argv[1:]}:
            command.end_with_the_reader()
            print(topics.about(words) if words else help.page())
            return
        compose.register()
        sys.argv[1:] = arguments.prepared(sys.argv[1:])
    except UserError as error:
        command.fail(str(error))
    try:
        train()
    except Exception as error:  # from composition; Hydra and OmegaConf raise many types
        if _wants_traceback or _runs_begun:
            raise
        command.fail(explain(error, sys.argv[1:]))


if __name__ == "__main__":
    main()
