"""A run's folder belongs to one process at a time.

Its claim.json identifies the run as soon as it begins and is locked by its process: the system
releases the lock when the process ends, in whatever way, so no lock is ever stale.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from trainer.errors import UserError

if sys.platform != "win32":  # nothing is locked there
    import fcntl

_CLAIM, _TURN = "claim.json", ".lock"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C: ten times as fast
_LEFT = ("environment.json", "summary.json")  # files of a run that began or failed


class TakenError(UserError):
    """Another process writes to this folder."""


@contextmanager
def claimed(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Hold a run's folder within the block.  A folder where no run began is removed afterwards.  A
    run that was stopped, at whatever point, keeps its claim: `resume=latest` does not pass it over.

    config: of the run, for `config_in`.  Raises TakenError if another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _CLAIM, "a+", encoding="utf-8") as file:
        if not _lock(file, waits=False):
            owner = _claim_in(folder)
            raise TakenError(
                f"{folder} is being written by process {owner.get('pid')} on {owner.get('host')}; "
                "wait for it, or name another folder (hydra.run.dir)"
            )
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "config": config}, file)
        file.flush()
        is_stopped = False
        try:
            yield
        except SystemExit:  # by a signal, perhaps before there is an environment.json
            is_stopped = True
            raise
        finally:
            if not is_stopped and not any((folder / name).exists() for name in _LEFT):
                (folder / _CLAIM).unlink(missing_ok=True)
                with suppress(OSError):  # it has other files
                    folder.rmdir()


@contextmanager
def in_turn(sweep: Path) -> Iterator[None]:
    """Within the block no other process chooses a folder for a run of this sweep."""
    sweep.mkdir(parents=True, exist_ok=True)
    with open(sweep / _TURN, "a", encoding="utf-8") as file:
        _lock(file, waits=True)
        yield


def config_in(folder: Path) -> dict[str, Any]:
    """The configuration of the run in this folder, which may have only just begun; {} if
    unknown."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), _LOADER)
        return found if isinstance(found, dict) else {}
    return _claim_in(folder).get("config", {})


def claims_below(folder: Path) -> Iterator[Path]:
    """The folders at any depth that were claimed."""
    return (path.parent for path in folder.rglob(_CLAIM))


def _claim_in(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads((folder / _CLAIM).read_text(encoding="utf-8"))
    return {}


def _lock(file: IO[str], waits: bool) -> bool:
    """Lock an open file until it is closed; -> whether that worked, which it always does on a file
    system without locks."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
