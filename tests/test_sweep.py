"""Sweeps: every combination runs, a failure is a row, a table at the end."""

import json
import math
import shutil
from datetime import datetime

import pytest
from conftest import new_process
from helpers import QUICK
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from trainer import cli
from trainer.sweep import SweepTable, sweep_table


@pytest.mark.slow
def test_a_sweep_runs_the_product_and_prints_a_table(tmp_path):
    done = new_process(
        "-m", *QUICK, "optim=adafactor8bit,lion", "seed=0,1", "schedule.steps=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 + 2 + 2
    for part in (
        "eval after",
        "s/step",
        "images/s",
        "seconds in all",
        "optimizer state",
        "peak in training",
    ):
        assert part in table[0]
    assert sum(line.startswith("| optim=lion seed=") for line in table) == 2
    (kept,) = tmp_path.glob("runs/sweep-*/sweep.md")
    assert kept.read_text().count("\n") == 6 + 1 + 4


@pytest.mark.slow
def test_a_failing_job_is_a_row_of_the_sweep_and_the_others_run(tmp_path):
    done = new_process("-m", *QUICK, "optim.lr=1e-3,-1,1e-4", "schedule.steps=1", cwd=tmp_path)
    assert done.returncode == 1
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert table[-1].startswith("| optim.lr=-1 ")
    assert table[-1].split("|")[2].strip() == "failed"
    assert "- optim.lr=-1 failed: optim=adafactor8bit: Adafactor8bit: lr=-1.0" in done.stdout


def test_a_job_that_fails_without_a_word_is_called_by_its_error(tmp_path, capsys):
    from trainer.__main__ import _record_failure

    _record_failure(tmp_path, MemoryError(), ["optim=sgd"])
    table = sweep_table([json.loads((tmp_path / "summary.json").read_text())])
    assert table.endswith("- default failed: MemoryError")
    assert "error: optim=sgd: MemoryError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_goes_on_in_its_folder_and_runs_nothing_twice(tmp_path):
    """After its second run was stopped before it began, as a kill would leave it."""
    folder, steps = tmp_path / "sweep", ("schedule.steps=1", "schedule.warmup_steps=0")
    command = ("-m", *QUICK, *steps, f"hydra.sweep.dir={folder}")
    assert new_process(*command, "seed=0", cwd=tmp_path).returncode == 0
    first, second = (folder / f"{n}-adafactor8bit-full-seed{n}" for n in range(2))
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    (second / "environment.json").touch()  # what tells a run's folder
    before = (first / "summary.json").read_bytes()

    done = new_process(*command, "seed=0,1", "runtime.allow_config_change=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (first / "summary.json").read_bytes() == before
    assert f"{first} is already finished" in done.stdout
    assert f"resuming from {second}/checkpoints/step-000001" in done.stdout
    assert "| seed=1 " in (folder / "sweep.md").read_text()

    other = new_process(*command, "seed=0", "optim.lr=1e-4", cwd=tmp_path)
    assert other.returncode == 2
    assert f"{first} holds a run of another sweep" in other.stderr
    assert (first / "summary.json").read_bytes() == before


def test_sweeps_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "datetime", Clock)
    for name in ("runs/sweep-20260102-030405", "runs/sweep-20260102-030405-2"):
        cli.register()
        made = OmegaConf.create({"dir": "${sweep_dir:}"})
        assert [made.dir, made.dir] == [name, name]
        (tmp_path / name).mkdir(parents=True)
        assert made.dir == name  # the folder of all of its runs


def test_a_sweeps_table_is_kept_after_every_run_and_nowhere_else(tmp_path):
    done = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path / "0-a")}}})
    (tmp_path / "0-a").mkdir()
    (tmp_path / "0-a/summary.json").write_text(json.dumps({"overrides": [], "error": "no"}))
    SweepTable().on_job_end(done, JobReturn())
    assert not (tmp_path / "sweep.md").exists()
    (tmp_path / "multirun.yaml").touch()
    SweepTable().on_job_end(done, JobReturn())
    assert "default failed: no" in (tmp_path / "sweep.md").read_text()


def test_a_callback_without_runs_prints_nothing(tmp_path, capsys):
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert capsys.readouterr().out == ""


NUMBERS = {
    "eval_loss_before": 1.0,
    "seconds_per_step": 0.1,
    "optimizer_state_bytes": 10,
    "peak_training_bytes": 10,
    "skipped_steps": 0,
}


def test_a_diverged_run_comes_after_the_finite_ones():
    losses = {"a": math.nan, "b": 0.5, "c": 0.1}
    runs = [NUMBERS | {"overrides": [k], "eval_loss_after": v} for k, v in losses.items()]
    names = [line.split()[1] for line in sweep_table(runs).splitlines()[2:]]
    assert names == ["c", "b", "a"]


def test_runs_are_ranked_by_the_weights_that_are_exported():
    average = {"overrides": ["a"], "eval_loss_after": 0.9, "ema_loss_after": 0.1}
    runs = [
        NUMBERS | average | {"eval_loss_result": 0.1},
        NUMBERS | {"overrides": ["b"], "eval_loss_after": 0.5, "eval_loss_result": 0.5},
    ]
    assert [line.split()[1] for line in sweep_table(runs).splitlines()[2:]] == ["a", "b"]


@pytest.mark.parametrize(("other", "differs"), [(1.001, False), (2.0, True), (None, False)])
def test_losses_of_other_points_are_said_not_to_rank_the_runs(other, differs):
    runs = [
        NUMBERS | {"overrides": [name], "eval_loss_after": 0.5, "eval_loss_before": before}
        for name, before in (("a", 1.0), ("b", other))
    ]
    assert ("- eval before differs" in sweep_table(runs)) == differs


def test_runs_with_several_seeds_have_a_mean_and_a_spread():
    losses = {("optim=a", 0): 0.1, ("optim=a", 1): 0.3, ("optim=b", 0): 0.15, ("optim=b", 1): None}
    runs = [
        NUMBERS | {"overrides": [name, f"seed={seed}"], "seed": seed, "eval_loss_after": loss}
        for (name, seed), loss in losses.items()
    ]
    _, below = sweep_table(runs).split("\n\n")
    header, _, first, second = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in below.splitlines()
    ]
    assert header[:3] == ["over seeds", "runs", "eval after"]
    assert first[:3] == ["optim=b", "1", "0.1500"]
    assert second[:3] == ["optim=a", "2", "0.2000 ± 0.1414"]
    assert "over seeds" not in sweep_table([run for run in runs if run["seed"] == 0])


def test_losses_that_only_some_runs_have_get_a_column_where_one_has_them():
    plain = NUMBERS | {"overrides": ["a"], "eval_loss_after": 0.2}
    failed = {"overrides": ["b"], "error": "no"}
    assert "held out" not in sweep_table([plain, failed])
    assert sweep_table([failed]).endswith("\n\n- default failed: no")
    table = sweep_table([plain, failed, plain | {"overrides": ["c"], "holdout_loss_after": 0.25}])
    header, _, first, second, last = [
        [cell.strip() for cell in line.split("|")] for line in table.splitlines()[:5]
    ]
    at = header.index("held out")
    assert (first[at], second[at], last[at]) == ("", "0.2500", "")
