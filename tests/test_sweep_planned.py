"""The planned runs of a sweep: what is missing after an interruption, and what is printed before
each run."""

import json

import pytest
from helpers import QUICK
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from trainer.cli.arguments import with_swept_groups
from trainer.errors import UserError
from trainer.reporting import report
from trainer.sweep import SweepTable, planned
from trainer.sweep.__main__ import main
from trainer.sweep.folders import ended_runs
from trainer.sweep.page import not_ended

RUNS = [["optim=a", "seed=0", "x=1"], ["optim=a", "seed=1", "x=1"], ["optim=b", "seed=0", "x=1"]]


def config_of(overrides, **more):
    known = dict(o.lstrip("+").split("=") for o in overrides)
    return {"seed": int(known["seed"]), "optim": {"name": known["optim"], "lr": 1e-3}} | more


def ended(folder, overrides, config=None, **summary):
    """A folder with a run that has ended."""
    folder.mkdir(parents=True)
    report.write_summary(folder, {"overrides": overrides, "eval_loss_after": 0.1} | summary)
    (folder / "config.yaml").write_text(json.dumps(config or config_of(overrides)))


def missing(sweep):
    return planned.missing(sweep, ended_runs(sweep))


def test_a_run_is_told_apart_by_what_the_planned_ones_do_not_share(tmp_path):
    assert planned.apart(tmp_path, RUNS[0]) == RUNS[0]
    planned.add(tmp_path, RUNS)
    assert planned.apart(tmp_path, RUNS[2]) == ["optim=b", "seed=0"]


def test_runs_that_have_not_ended_are_missing_and_named_by_what_differs(tmp_path):
    planned.add(tmp_path, RUNS)
    planned.begun(tmp_path, RUNS[0], config_of(RUNS[0]))
    assert missing(tmp_path) == ["optim=a seed=0", "optim=a seed=1", "optim=b seed=0"]
    ended(tmp_path / "0", RUNS[0])
    ended(tmp_path / "deep/1", [*reversed(RUNS[1])], error="it failed")
    assert missing(tmp_path) == ["optim=b seed=0"]
    (tmp_path / "0").rename(tmp_path / "renamed")
    assert missing(tmp_path) == ["optim=b seed=0"]


@pytest.mark.parametrize(
    "again",
    [["optim=a", "seed=1", "x=1", "log.every=1"], ["++optim=a", "++seed=1", "x=1"]],
)
def test_a_run_is_not_missing_if_another_command_has_run_it(tmp_path, again):
    planned.add(tmp_path, RUNS[:2])
    ended(tmp_path / "0", RUNS[0])
    planned.add(tmp_path, [again])
    ended(tmp_path / "1", again)
    assert missing(tmp_path) == []


def test_a_run_with_an_equal_configuration_is_the_same_run(tmp_path):
    spelled_out = [*RUNS[0], "optim.lr=1e-3"]
    planned.add(tmp_path, [RUNS[0], spelled_out])
    ended(tmp_path / "0", RUNS[0])
    assert missing(tmp_path) == ["optim.lr=1e-3"]  # nothing is known of it yet
    planned.begun(tmp_path, spelled_out, config_of(RUNS[0]))
    assert missing(tmp_path) == []


def test_a_folder_that_another_run_has_taken_over_does_not_count(tmp_path):
    longer = [*RUNS[0], "schedule.steps=500"]
    planned.add(tmp_path, [longer])
    planned.begun(tmp_path, longer, config_of(RUNS[0], schedule={"steps": 500}))
    planned.add(tmp_path, [RUNS[0]])
    ended(tmp_path / "0", RUNS[0])
    assert missing(tmp_path) == ["schedule.steps=500"]


@pytest.mark.parametrize("text", [None, "", "[{", "[]", '{"a": 1}', "[1]", "null"])
def test_a_sweep_without_a_readable_plan_has_no_missing_runs(tmp_path, text):
    if text is not None:
        (tmp_path / "planned.json").write_text(text)
    assert missing(tmp_path) == []


def test_missing_runs_of_several_sweeps_have_their_names(tmp_path, capsys):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        planned.add(tmp_path / name, RUNS[:2])
        ended(tmp_path / name / "0", RUNS[0])
    main([str(tmp_path / "x")])
    assert "1 of the planned runs: `seed=1`." in capsys.readouterr().out
    main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "2 of the planned runs: `x: seed=1`, `y: seed=1`." in capsys.readouterr().out


def test_of_many_missing_runs_a_few_are_named():
    text = not_ended([f"seed={n}" for n in range(20)])
    assert "20 of the planned runs: `seed=0`" in text
    assert "`seed=7` and 12 more" in text
    assert not_ended([]) == ""


def job(tmp_path, number, *overrides):
    of_job = {"runtime": {"output_dir": str(tmp_path / str(number))}, "job": {"num": number}}
    return OmegaConf.create({"hydra": of_job | {"overrides": {"task": [*overrides]}}})


def test_each_run_is_announced_with_its_place_and_the_time_left(tmp_path, capsys):
    (tmp_path / "multirun.yaml").touch()
    table = SweepTable()
    table.on_multirun_start(job(tmp_path, 0, "optim=sgd,lion", "seed=0,1", "name=n"))
    for number, (optimizer, seed) in enumerate((("sgd", 0), ("sgd", 1))):
        overrides = [f"optim={optimizer}", f"seed={seed}", "name=n"]
        table.on_job_start(job(tmp_path, number, *overrides))
        ended(tmp_path / str(number), overrides, wall_seconds=30.0)
        table.on_job_end(job(tmp_path, number, *overrides), JobReturn())
    out = capsys.readouterr().out
    assert "run 1 of 4: optim=sgd seed=0\n" in out
    assert "run 2 of 4, ETA 1:30: optim=sgd seed=1\n" in out
    page = (tmp_path / "sweep.md").read_text()
    assert "Not ended, 2 of the planned runs: `optim=lion seed=0`, `optim=lion seed=1`" in page


def test_runs_that_are_finished_take_no_time(tmp_path, capsys):
    """The command is repeated in the folder of a sweep of which one run is left."""
    (tmp_path / "multirun.yaml").touch()
    for seed in range(3):
        ended(tmp_path / f"run-{seed}", ["optim=sgd", f"seed={seed}"], wall_seconds=30.0)
    table = SweepTable()
    table.on_multirun_start(job(tmp_path, 0, "optim=sgd", "seed=0,1,2,3"))
    table.on_job_start(job(tmp_path, 0, "optim=sgd", "seed=0"))
    assert "run 1 of 4, ETA 0:30: seed=0\n" in capsys.readouterr().out


def test_runs_are_only_numbered_if_the_sweeper_alone_knows_them(tmp_path, capsys):
    (tmp_path / "multirun.yaml").touch()
    table = SweepTable()
    table.on_multirun_start(job(tmp_path, 0, "optim.lr=interval(0,1)"))
    table.on_job_start(job(tmp_path, 0, "optim.lr=0.3"))
    assert capsys.readouterr().out == "\nrun 1: optim.lr=0.3\n"


def test_a_run_of_a_sweep_that_is_resumed_on_its_own_is_not_announced(tmp_path, capsys):
    (tmp_path / "multirun.yaml").touch()
    config = job(tmp_path, "???", "seed=0")
    config.hydra.runtime.output_dir = str(tmp_path / "0-seed0")
    SweepTable().on_job_start(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("error", "is_ours"), [(KeyError("x"), True), (OSError("full"), False)])
def test_an_error_in_the_tables_is_no_success(tmp_path, monkeypatch, capsys, error, is_ours):
    def fails(runs):
        raise error

    ended(tmp_path / "0", RUNS[0])
    monkeypatch.setattr("trainer.sweep.page.sweep_table", fails)
    with pytest.raises(SystemExit, match="1"):
        SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    said = capsys.readouterr().err
    assert f"error: {error}" in said
    assert ("Traceback" in said) == is_ours


def test_a_sweep_over_checkpoints_is_refused():
    with pytest.raises(UserError, match="start a run for each checkpoint"):
        with_swept_groups(["resume=a,b"])
    assert with_swept_groups(["resume=a", "seed=0,1"]) == ["resume=a", "seed=0,1"]


@pytest.mark.slow
def test_the_plan_has_the_options_that_its_runs_have(command, tmp_path):
    """With spaces, quotes and an option given twice, and for a second command's runs, too."""
    options = ("optim=adamw", "optim.betas=[0.8, 0.9]", "name='a b'", "schedule.steps=1")
    arguments = ("-m", *QUICK, *options, "hydra.sweep.dir=S")
    for seeds in ("seed=0,1", "seed=choice(1,2)"):
        status, out, err = command(*arguments, seeds)
        assert status == 0, err
    assert missing(tmp_path / "S") == []
    assert len(planned._read(tmp_path / "S")) == 3
    assert "run 2 of 2, ETA" in out


def test_a_run_in_the_folder_of_the_sweep_itself_is_refused(command):
    status, _, err = command("-m", *QUICK, "hydra.sweep.dir=S", "hydra.sweep.subdir=.")
    assert status == 2
    assert "hydra.sweep.subdir=.: a run of a sweep needs a folder of its own" in err
