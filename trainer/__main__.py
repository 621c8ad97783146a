"""`python -m trainer`: compose the configuration, check it, run it.  Nothing below this file
imports Hydra's runtime."""

import contextlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trainer import cli, config, optimizers
from trainer.errors import UserError

# Set it to see a traceback behind any error.  Without it Hydra would print a page of its own and
# exit, so it is always on below this line.
_wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@hydra.main(config_path=str(config.conf_dir()), config_name="config", version_base="1.3")
def train(composed: DictConfig) -> float:
    """One run; returns its last eval loss, which a sweeper may minimise."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        checked = config.to_dataclasses(composed)
        optimizers.check(checked.optim)
        from trainer.run import run  # now that the configuration is good: diffusers takes seconds

        return run(checked, folder)
    except UserError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # a run that never began leaves no empty folder
        if _wants_traceback:
            raise
        cli.fail(str(error))


def main() -> None:
    """Run Hydra's command line; a user's mistake becomes one line and status 2."""
    config.register()
    cli.register()
    try:
        train()
    except (HydraException, OmegaConfBaseException) as error:
        if _wants_traceback:
            raise
        cli.fail(cli.explain(error, sys.argv[1:]))
    except OSError as error:  # its message names the file
        if _wants_traceback:
            raise
        cli.fail(f"{error} (HYDRA_FULL_ERROR=1 shows where)")


if __name__ == "__main__":
    main()
