"""The folders of a sweep's runs: one set of options is one run, in whichever folder."""

import json

import pytest
from omegaconf import OmegaConf

from trainer.storage.claim import claimed
from trainer.storage.run_folder import sweep_of
from trainer.sweep import SweepTable
from trainer.sweep.folders import ended_runs, place_of

A, B = ["optim=a", "seed=0"], ["optim=a", "seed=0", "schedule.steps=9"]


@pytest.fixture
def made(tmp_path):
    """Make a run in a folder: made("0-a", A, error="no") -> the folder."""

    def make(name, overrides, day=1, config=None, **more):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        summary = {"overrides": overrides, "ended": f"2026-01-0{day}T00:00:00+00:00"}
        summary |= {"eval_loss_before": 1.0, "eval_loss_after": 0.5} | more
        (folder / "summary.json").write_text(json.dumps(summary))
        if config:
            (folder / "config.yaml").write_text(json.dumps(config))
        return folder

    return make


def begun(folder, overrides):
    """What a killed run leaves: a checkpoint but no summary."""
    saved = folder / "checkpoints/step-000001"
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text(json.dumps({"overrides": overrides}))
    return folder


def test_a_run_is_found_by_its_options_whatever_its_folder_is_called(tmp_path, made):
    there = made("0-a", A)
    assert place_of(tmp_path, tmp_path / "1-a", A[::-1], {}) == there
    deep = begun(tmp_path / "a/0", ["optim=b"])
    assert place_of(tmp_path, tmp_path / "b/0", ["optim=b"], {}) == deep
    assert place_of(tmp_path, tmp_path / "1-a", ["optim=c"], {}) == tmp_path / "1-a"


@pytest.mark.parametrize(("theirs", "ours"), [(A, B), (B, A)])
def test_a_run_with_other_options_keeps_its_folder(tmp_path, made, theirs, ours):
    there = made("0-a", theirs)
    assert place_of(tmp_path, there, ours, {}) == tmp_path / "0-a-2"
    begun(tmp_path / "0-a-2", ["optim=b"])
    assert place_of(tmp_path, there, ours, {}) == tmp_path / "0-a-3"


def test_a_failed_run_is_run_again_in_its_folder_unless_another_is_finished(tmp_path, made):
    failed = made("0-a", A, day=3, error="no")
    assert place_of(tmp_path, tmp_path / "1-a", A, {}) == failed
    good = made("1-a", A)
    assert place_of(tmp_path, failed, A, {}) == good


def test_of_runs_with_the_same_options_the_newest_that_is_finished_counts(tmp_path, made, capsys):
    made("0-a", A, day=1, eval_loss_after=0.1)
    newest = made("deep/er/1-a", A[::-1], day=2, eval_loss_after=0.2)
    made("2-a", A, day=3, error="no")
    other = made("3-a", B)
    assert {run["folder"] for run in ended_runs(tmp_path)} == {str(newest), str(other)}
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    said = capsys.readouterr().out
    assert "- optim=a was run 3 times; the newest finished one counts" in said
    assert "0.1000" not in said


def config_of(rate=1e-3, seed=0, **log):
    return {"seed": seed, "name": "a", "optim": {"name": "a", "lr": rate}, "log": {**log}}


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (config_of(every=9, wandb={"mode": "offline"}) | {"name": "b", "resume": "latest"}, True),
        (config_of() | {"runtime": {"save_every": 9}, "method": {"export": []}}, True),
        (config_of(seed=1), False),
        (config_of(rate=2e-3), False),
        (config_of(eval_points=9), False),  # eval/loss is their mean
    ],
)
def test_a_run_is_known_by_what_its_options_come_to(tmp_path, made, other, is_same):
    base = config_of() | {"runtime": {"save_every": 1}, "method": {"export": ["kohya"]}}
    plain = config_of() if "runtime" not in other else base
    made("0-a", ["optim=a"], config=plain)
    made("1-a", ["optim=a", "optim.lr=0.001", "seed=0"], config=other)
    assert len(ended_runs(tmp_path)) == (1 if is_same else 2)
    (tmp_path / "1-a/summary.json").unlink()
    (tmp_path / "1-a/config.yaml").unlink()
    place = place_of(tmp_path, tmp_path / "1-a", ["+optim.lr=1e-3"], other)
    assert place == tmp_path / ("0-a" if is_same else "1-a")


def test_a_run_that_has_only_begun_is_known_too(tmp_path):
    with claimed(tmp_path / "0-a", config_of(1e-3)):
        assert place_of(tmp_path, tmp_path / "0-a", ["lr"], config_of(1e-4)) == tmp_path / "0-a-2"
        assert place_of(tmp_path, tmp_path / "1-a", ["lr"], config_of(1e-3)) == tmp_path / "0-a"


def test_what_ships_with_the_trainer_is_one_thing_wherever_it_is_installed(tmp_path, made):
    for name in ("here", "there"):
        config = config_of() | {"model": {"path": f"/{name}/trainer/assets/tiny"}}
        made(name, ["optim=a"], config=config)
    assert len(ended_runs(tmp_path)) == 1


def test_a_sweep_is_known_from_the_folders_of_its_runs_at_any_depth(tmp_path):
    (tmp_path / "multirun.yaml").touch()
    assert sweep_of(tmp_path / "a/0") == sweep_of(tmp_path / "a") == tmp_path
    assert sweep_of(tmp_path) is None
