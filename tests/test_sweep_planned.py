"""Which runs a sweep plans, which an interruption left out, and what it says before each."""

import pytest
from helpers import QUICK
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from trainer import report
from trainer.sweep import SweepTable, planned
from trainer.sweep.head import left

RUNS = [["optim=a", "seed=0", "x=1"], ["optim=a", "seed=1", "x=1"], ["optim=b", "seed=0", "x=1"]]


def ended(folder, **summary):
    folder.mkdir(parents=True)
    report.write_summary(folder, summary)


def test_what_has_not_ended_is_missing_by_what_tells_it_apart(tmp_path):
    planned.add(tmp_path, RUNS)
    planned.begun(tmp_path, RUNS[0], tmp_path / "0")
    assert planned.missing(tmp_path) == ["optim=a seed=0", "optim=a seed=1", "optim=b seed=0"]
    ended(tmp_path / "0")
    planned.begun(tmp_path, [*reversed(RUNS[1])], tmp_path / "deep/1")  # in any order
    ended(tmp_path / "deep/1", error="it failed")
    assert planned.missing(tmp_path) == ["optim=b seed=0"]


def test_a_second_command_adds_to_the_plan_and_two_runs_may_be_one(tmp_path):
    planned.add(tmp_path, RUNS[:2])
    planned.begun(tmp_path, RUNS[0], tmp_path / "0")
    ended(tmp_path / "0")
    planned.add(tmp_path, [RUNS[0], ["optim=a", "x=1"]])
    planned.begun(tmp_path, ["optim=a", "x=1"], tmp_path / "0")
    assert planned.missing(tmp_path) == ["seed=1"]


@pytest.mark.parametrize("text", [None, "", "[{"])
def test_a_sweep_of_which_no_plan_is_known_misses_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "planned.json").write_text(text)
    assert planned.missing(tmp_path) == []


def test_of_many_that_are_missing_a_few_are_named():
    text = left([f"seed={n}" for n in range(20)])
    assert "20 of the planned runs: `seed=0`" in text
    assert "`seed=7` and 12 more" in text
    assert left([]) == ""


def job(tmp_path, number, *overrides):
    of_job = {"runtime": {"output_dir": str(tmp_path / str(number))}, "job": {"num": number}}
    return OmegaConf.create({"hydra": of_job | {"overrides": {"task": [*overrides]}}})


def test_each_run_is_announced_with_its_place_and_the_time_that_is_left(tmp_path, capsys):
    (tmp_path / "multirun.yaml").touch()
    table = SweepTable()
    table.on_multirun_start(job(tmp_path, 0, "optim=sgd,lion", "seed=0,1", "name=n"))
    for number, (optimizer, seed) in enumerate((("sgd", 0), ("sgd", 1))):
        this = job(tmp_path, number, f"optim={optimizer}", f"seed={seed}", "name=n")
        table.on_job_start(this)
        overrides = [f"optim={optimizer}", f"seed={seed}", "name=n"]
        ended(tmp_path / str(number), overrides=overrides, eval_loss_after=0.1, wall_seconds=30.0)
        planned.begun(tmp_path, overrides, tmp_path / str(number))
        table.on_job_end(this, JobReturn())
    out = capsys.readouterr().out
    assert "run 1 of 4: optim=sgd seed=0\n" in out
    assert "run 2 of 4, ETA 1:30: optim=sgd seed=1\n" in out
    page = (tmp_path / "sweep.md").read_text()
    assert "Not ended, 2 of the planned runs: `optim=lion seed=0`, `optim=lion seed=1`" in page


def test_where_only_the_sweeper_knows_the_runs_they_are_numbered(tmp_path, capsys):
    (tmp_path / "multirun.yaml").touch()
    table = SweepTable()
    table.on_multirun_start(job(tmp_path, 0, "optim.lr=interval(0,1)"))
    table.on_job_start(job(tmp_path, 0, "optim.lr=0.3"))
    assert capsys.readouterr().out == "\nrun 1: optim.lr=0.3\n"


@pytest.mark.slow
def test_the_plan_has_the_options_that_its_runs_have(command, tmp_path):
    """With spaces, quotes and explicit defaults, and for a second command's runs, too."""
    options = ("optim=adamw", "optim.betas=[0.8, 0.9]", "name='a b'", "schedule.steps=1")
    arguments = ("-m", *QUICK, *options, "hydra.sweep.dir=S")
    for seeds in ("seed=0,1", "seed=choice(1,2)"):
        status, out, err = command(*arguments, seeds)
        assert status == 0, err
    assert planned.missing(tmp_path / "S") == []
    assert len(planned._read(tmp_path / "S")) == 3
    assert "run 2 of 2, ETA" in out
