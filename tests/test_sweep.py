"""Sweeps: every combination runs, a failure is a row, a table at the end."""

import math

import pytest
from conftest import new_process
from helpers import QUICK

from trainer.sweep import SweepTable, sweep_table


@pytest.mark.slow
def test_a_sweep_runs_the_product_and_prints_a_table(tmp_path):
    done = new_process(
        "-m", *QUICK, "optim=adafactor8bit,lion", "seed=0,1", "schedule.steps=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    for part in ("eval after", "s/step", "optimizer state", "peak in training"):
        assert part in table[0]
    assert sum(line.startswith("| optim=lion seed=") for line in table) == 2
    (kept,) = tmp_path.glob("runs/sweep-*/sweep.md")
    assert kept.read_text().count("\n") == 6


@pytest.mark.slow
def test_a_failing_job_is_a_row_of_the_sweep_and_the_others_run(tmp_path):
    done = new_process("-m", *QUICK, "optim.lr=1e-3,-1,1e-4", "schedule.steps=1", cwd=tmp_path)
    assert done.returncode == 1
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert table[-1].startswith("| optim.lr=-1 ")
    assert table[-1].split("|")[2].strip() == "failed"
    assert "- optim.lr=-1 failed: optim=adafactor8bit: Adafactor8bit: lr=-1.0" in done.stdout


def test_a_callback_without_runs_prints_nothing(tmp_path, capsys):
    from omegaconf import OmegaConf

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
