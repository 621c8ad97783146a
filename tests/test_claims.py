"""A run's folder belongs to one process at a time."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import new_process
from helpers import QUICK
from test_sweep import column

from trainer.errors import UserError
from trainer.storage.claim import TakenError, claimed, config_in


def test_a_folder_that_another_holds_is_refused_and_free_again_after_it(tmp_path):
    with claimed(tmp_path / "run", {"seed": 1}):
        with (
            pytest.raises(TakenError, match=f"is being written by process {os.getpid()} on "),
            claimed(tmp_path / "run", {"seed": 2}),
        ):
            pass
        assert config_in(tmp_path / "run") == {"seed": 1}
        (tmp_path / "run/environment.json").touch()
    with claimed(tmp_path / "run", {"seed": 2}):
        assert config_in(tmp_path / "run") == {"seed": 2}


def test_where_no_run_began_nothing_stays(tmp_path):
    with claimed(tmp_path / "empty", {}):
        pass
    assert not (tmp_path / "empty").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.txt").touch()
    with claimed(tmp_path / "mine", {}):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["own.txt"]


def test_a_run_that_is_stopped_has_begun_and_one_that_is_refused_has_not(tmp_path):
    """Before there is an environment.json, such as while pictures are encoded."""
    for error, has_begun in ((SystemExit, True), (UserError, False)):
        folder = tmp_path / error.__name__
        with pytest.raises(error), claimed(folder, {"seed": 1}):
            raise error
        assert config_in(folder) == ({"seed": 1} if has_begun else {})
        assert folder.exists() == has_begun


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from trainer.storage.claim import claimed
with claimed(Path({str(tmp_path / "run")!r}), {{}}):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(TakenError), claimed(tmp_path / "run", {}):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(tmp_path / "run", {}):
        pass


@pytest.mark.slow
def test_sweeps_that_run_side_by_side_in_one_folder_share_their_runs(tmp_path):
    """Each has one rate of its own and one in common, with run folders of the same names."""
    folder, steps = tmp_path / "sweep", ("schedule.steps=1", "schedule.warmup_steps=0")
    command = ("-m", *QUICK, *steps, "optim=sgd", f"hydra.sweep.dir={folder}")
    rates = ("optim.lr=1e-3,1e-4", "optim.lr=1e-2,0.0001")
    with ThreadPoolExecutor(2) as pool:
        done = [*pool.map(lambda rate: new_process(*command, rate, cwd=tmp_path), rates)]
    assert [one.returncode for one in done] == [0, 0], done
    found = column((folder / "sweep.md").read_text(), "run", "eval after")
    assert len(found) == 3
    assert all(found.values())
    summaries = [json.loads(path.read_text()) for path in folder.rglob("summary.json")]
    assert sorted(run["lr"] for run in summaries) == [1e-4, 1e-3, 1e-2]
