"""What a failed run leaves: its summary, its row, the reason."""

import json
import signal

import pytest
import torch
from helpers import QUICK, poisoned_from

from trainer.errors import UserError
from trainer.objective import losses
from trainer.phases import evaluation
from trainer.reporting import report
from trainer.run import run


def test_an_export_that_fails_leaves_a_summary(composed, monkeypatch, tmp_path):
    def full(*_):
        raise UserError("could not save: no space")

    monkeypatch.setattr("trainer.storage.result.write", full)
    with pytest.raises(UserError, match="no space"):
        run(composed(*QUICK), tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    newest = tmp_path / "run/checkpoints/step-000004"
    way = f"resume from the run's newest checkpoint: resume={newest}"
    assert (summary["steps"], summary["error"]) == (4, f"could not save: no space; {way}")
    assert summary["eval_loss_after"] > 0


@pytest.mark.parametrize(
    ("fills", "step", "last"),
    [
        ("trainer.storage.checkpoint.save", 3, 2),
        ("trainer.reporting.metrics.Metrics.write", 4, 4),
        ("trainer.reporting.report.write_summary", 4, 4),
    ],
)
def test_a_full_disk_at_the_end_names_the_checkpoint_to_resume_from(
    composed, tmp_path, fills, step, last, monkeypatch
):
    def full(*_, **__):
        raise (UserError if step == 3 else OSError)("No space left")

    def filling(state, *more, evaluate=evaluation.evaluate):
        if state.step == step:
            monkeypatch.setattr(fills, full)
        return evaluate(state, *more)

    monkeypatch.setattr(evaluation, "evaluate", filling)
    options = ["runtime.save_every=2", "log.eval_every=1"]
    folder = tmp_path / "run"
    with pytest.raises(UserError) as ended:
        run(composed(*QUICK, *options), folder)
    way = f"resume from the run's newest checkpoint: resume={folder}/checkpoints/step-00000{last}"
    assert str(ended.value) == f"No space left; {way}"


def test_a_run_stopped_after_its_last_checkpoint_failed_is_not_told_to_be_resumable(
    composed, monkeypatch, tmp_path
):
    def full(*_):
        raise UserError("could not save: no space")

    def interrupted(state, writer, evaluate=evaluation.evaluate):
        state.stop = [signal.SIGINT] if state.step == 4 else []
        return {} if state.stop else evaluate(state, writer)

    monkeypatch.setattr("trainer.storage.checkpoint.save", full)
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(UserError, match="no space"):
        run(composed(*QUICK), tmp_path / "run")
    assert "resume with" not in (tmp_path / "run/train.log").read_text()
    assert report.read_summary(tmp_path / "run")["error"] == "could not save: no space"


def test_an_export_that_runs_out_of_memory_ends_with_a_line_and_a_picture(
    composed, monkeypatch, tmp_path
):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("trainer.formats.stream.write", full)
    monkeypatch.setattr(
        "trainer.phases.saving.save", lambda state: None
    )  # saving would fail as well
    options = ["method=lora", "log.sample_count=1", "log.sample_steps=1", "method.export_every=2"]
    with pytest.raises(
        UserError, match=r"^out of memory while writing the result.*trainer\.export"
    ):
        run(composed(*QUICK, *options), tmp_path / "run")
    assert "2.00 GiB); training continues" in (tmp_path / "run/train.log").read_text()
    assert (tmp_path / "run/samples/step-000004.png").is_file()


def test_a_run_that_fails_leaves_what_is_known_and_which_step_its_result_is_of(
    finished, composed, monkeypatch
):
    folder = finished("run", "schedule.steps=2")
    monkeypatch.setattr(losses, "loss", poisoned_from(2))
    longer = ["schedule.steps=9", f"resume={folder}", "runtime.allow_config_change=true"]
    for step in (4, 5):  # the second session fails immediately
        with pytest.raises(UserError, match=r"^1 step without"):
            run(composed(*QUICK, *longer, "runtime.max_skipped_steps=0"), folder)
        summary = report.read_summary(folder)
        assert (summary["steps"], summary["skipped_steps"]) == (step, step - 3)
        assert summary["error"].startswith("1 step without")
        assert summary["images_per_second"] > 0
        assert summary["eval_loss_before"] > 0
        assert report.result_step(summary) == 2


def test_a_run_that_fails_before_a_step_is_done_leaves_who_it_was(quick, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(losses, "loss", fail)
    with pytest.raises(UserError, match="out of memory"):
        quick("run", "optim=lion", "optim.lr=1e-4")
    summary = report.read_summary(tmp_path / "run")
    assert (summary["steps"], summary["optimizer"], summary["lr"]) == (0, "lion", 1e-4)
    assert "out of memory" in summary["error"]


def test_a_run_of_a_sweep_that_fails_leaves_what_is_known_in_its_row(command, in_tmp, monkeypatch):
    monkeypatch.setattr(losses, "loss", poisoned_from(6))
    options = ["runtime.max_skipped_steps=0", "method.export=[]", "hydra.sweep.dir=sweep"]
    status, out, _ = command("-m", *QUICK, "seed=0,1", *options)
    assert status == 1
    assert "seed=1 failed: 1 step without a finite loss" in out
    good, failed = (report.read_summary(run) for run in sorted(in_tmp.glob("sweep/*-seed*")))
    assert {"error"} <= failed.keys() - good.keys() <= {"error", "result_of_step"}
    assert good.keys() <= failed.keys()
    assert (failed["steps"], failed["seed"], failed["skipped_steps"]) == (2, 1, 1)


def test_a_summary_that_cannot_be_written_does_not_hide_what_ended_the_run(
    quick, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_summary", full)
    monkeypatch.setattr(losses, "loss", poisoned_from(1))
    with pytest.raises(UserError, match=r"^1 step without"):
        quick("run", "runtime.max_skipped_steps=0")
    assert "could not write the summary of this run" in (tmp_path / "run/train.log").read_text()
