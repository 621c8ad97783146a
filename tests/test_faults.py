"""What goes wrong in a run: damaged files, full disks, kills, numbers that are not finite."""

import json
import logging
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import QUICK, assert_same_weights, rows, weights
from models import TINY
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import trainer.run
from trainer import (
    checkpoint,
    console,
    disk,
    guard,
    losses,
    method,
    metrics,
    record,
    report,
    sampling,
)
from trainer.errors import UserError
from trainer.formats import fingerprints
from trainer.run import run
from trainer.sweep import SweepTable


def steps_saved(folder):
    """The steps of a run's checkpoints."""
    return [int(path.name[5:]) for path in checkpoint.completed(folder / "checkpoints")]


def poisoned_from(call):
    """A loss that is infinite from its n-th call on, counted from 1."""
    calls, original = [], losses.loss
    return lambda *a: original(*a) * (math.inf if calls.append(a) or len(calls) >= call else 1)


def flip_last_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


DAMAGE = {
    "bit flipped in weights.safetensors": flip_last_bit,
    "bit flipped in optimizer.pt": flip_last_bit,
    "optimizer.pt emptied": lambda path: path.write_bytes(b""),
    "weights.safetensors missing": lambda path: path.unlink(),
    "checkpoint.json a list": lambda path: path.write_text("[]"),
    "checkpoint.json edited": lambda path: path.write_text(
        path.read_text().replace('"step": 4', '"step": 3')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(quick, caplog, damage):
    folder = quick("run", "runtime.save_every=2")
    newest = folder / "checkpoints/step-000004"
    name = next(word for word in damage.split() if "." in word)
    DAMAGE[damage](newest / name)
    loaded = checkpoint.load_newest(checkpoint.find(str(folder)))
    assert loaded.step == 2
    assert f"{newest} is damaged: " in caplog.text


def test_a_run_writes_the_checkpoint_anew_that_was_damaged(quick, composed):
    folder = quick("run", "runtime.save_every=2")
    newest = folder / "checkpoints/step-000004"
    flip_last_bit(newest / "weights.safetensors")
    damaged = (newest / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another configuration"):
        run(composed(*QUICK, f"resume={folder}", "optim.lr=1"), folder)
    assert newest.exists()  # what is refused changes nothing
    run(composed(*QUICK, "runtime.save_every=2", f"resume={folder}"), folder)
    assert checkpoint.load(newest).step == 4
    aside = folder / "checkpoints/damaged-step-000004/weights.safetensors"
    assert aside.read_bytes() == damaged


@pytest.fixture
def save(tmp_path):
    """Save a small checkpoint after this whole step and keep the last two: save(4)."""

    def make(step):
        made = checkpoint.Checkpoint(
            step=step,
            weights={"w": torch.zeros(2)},
            optimizer={},
            average={},
            config={},
            overrides=[],
            model="",
            data="",
            counters=checkpoint.Counters(),
        )
        checkpoint.save(tmp_path, made)
        checkpoint.rotate(tmp_path, keep=2, last_whole=step)

    return make


@pytest.mark.parametrize("failing", ["os.unlink", "pathlib.Path.rename"])
def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_training(
    save, tmp_path, monkeypatch, failing
):
    original = pathlib.Path.rename if "rename" in failing else os.unlink

    def refuse(path, *args, **kwargs):
        if "rename" in failing and pathlib.Path(path).name != "step-000001":
            return original(path, *args, **kwargs)
        raise PermissionError(13, "Permission denied")

    save(1)
    save(2)
    monkeypatch.setattr(failing, refuse)
    save(3)
    assert checkpoint.load(tmp_path / "step-000003").step == 3
    monkeypatch.undo()
    save(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_part_of_it(
    save, tmp_path, monkeypatch
):
    save(1)
    save(2)
    unlink = os.unlink

    def dying(*args, **kwargs):
        monkeypatch.undo()
        unlink(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        save(3)
    assert [checkpoint.load(path).step for path in checkpoint.completed(tmp_path)] == [2, 3]


def test_a_model_that_training_has_ruined_is_an_error_after_everything_is_written(quick, tmp_path):
    with pytest.raises(ValueError, match="it is of no use"):
        quick("run", "optim=sgd", "optim.lr=1e9", "schedule=constant")
    for path in ("summary.json", "model/model_index.json", "checkpoints/step-000004"):
        assert (tmp_path / "run" / path).exists()


def test_a_model_that_is_ruined_before_the_first_step_is_not_trained(quick, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"before the first step, as its unet\.conv_in\.bias is not"
    ):
        quick("run", f"model.path={model}")
    assert not (tmp_path / "run/checkpoints").exists()


def test_pictures_that_are_gone_cost_the_grids_first_row_and_nothing_else(
    composed, pictures, tmp_path, monkeypatch
):
    from trainer.sampling import Sampler

    def gone(self):
        raise FileNotFoundError("red.png")

    monkeypatch.setattr(Sampler, "originals", gone)
    folder = tmp_path / "run"
    options = ["data=folder", f"data.path={pictures}", "data.resolution=64"]
    run(composed(*QUICK, *options, "log.sample_count=1", "log.sample_steps=1"), folder)
    assert "the grid of step 4 has no originals: red.png" in (folder / "train.log").read_text()
    assert (folder / "samples/step-000004.png").exists()
    assert (folder / "model/model_index.json").exists()


@pytest.mark.parametrize("failing", ["torch.save", "safetensors", "rename"])
def test_a_full_disk_loses_nothing_and_training_goes_on(
    quick, composed, tmp_path, monkeypatch, failing, caplog
):
    folder = quick("run", "schedule.steps=2")
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = {
        "torch.save": "torch.save",
        "safetensors": "trainer.formats.stream.write",
        "rename": "pathlib.Path.rename",
    }[failing]
    monkeypatch.setattr(target, full)
    options = ["runtime.save_every=1", f"resume={folder}", "runtime.allow_config_change=true"]
    with pytest.raises(ValueError, match=r"could not save .*run/.*No space left"):
        run(composed(*QUICK, *options), folder)
    monkeypatch.undo()
    assert "training goes on" in caplog.text
    after = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert after == before
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_write_leaves_a_whole_folder(tmp_path, replaces):
    """Die at the n-th fsync, rename or removal while a folder is written; then write it again."""
    script = tmp_path / "die.py"
    script.write_text(
        """
import os, shutil, sys
from pathlib import Path
from trainer import disk
folder, text, deadline = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os._exit(9)
        return function(*args, **kwargs)
    return call
os.fsync, os.rename, Path.rename, shutil.rmtree = map(
    counted, (os.fsync, os.rename, Path.rename, shutil.rmtree)
)
with disk.whole_folder(folder) as temporary:
    for name in "ab":
        (temporary / name).write_text(text)
print("whole")
"""
    )

    def write(text, deadline):
        command = [sys.executable, script, tmp_path / "final", text, str(deadline)]
        return subprocess.run(command, check=False, capture_output=True).returncode

    if replaces:
        assert write("old", 0) == 0
    died = 0
    for deadline in range(1, 30):
        status = write(f"new{deadline}", deadline)
        texts = {p.read_text() for p in (tmp_path / "final").glob("*")}
        assert len(texts) <= 1, "a mixture"
        if status == 0:
            assert texts == {f"new{deadline}"}
            break
        died += 1
        if replaces:  # the old folder is there, or lies beside, to be put back by the next write
            assert texts or list(tmp_path.glob(".final.old/a"))
    assert status == 0, "the write never came to its end"
    assert died >= 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["die.py", "final"]


def test_a_step_without_a_finite_loss_changes_nothing(quick, composed, tmp_path, monkeypatch):
    """Step 2 of 4 yields NaN: the run equals one whose step 2 never reached the optimizer."""
    calls = 0
    original = losses.loss

    def poisoned(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls == 2 else 1.0)

    after: list[dict[str, torch.Tensor]] = []

    def noted(state, writer):
        trained = method.trained_tensors(state.model)
        after.append({name: weight.clone() for name, weight in trained.items()})
        between_steps(state, writer)

    between_steps = trainer.run._between_steps
    monkeypatch.setattr(losses, "loss", poisoned)
    monkeypatch.setattr(trainer.run, "_between_steps", noted)
    folder = quick("poisoned", "runtime.save_every=1", "runtime.keep_checkpoints=9")
    assert_same_weights(after[0], after[1])
    assert_same_weights(after[2], weights(folder, 3))
    assert any(not torch.equal(after[1][name], after[2][name]) for name in after[1])
    assert steps_saved(folder) == [1, 3, 4]
    written = [row for row in rows(folder) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in written] == [0, 1, 1, 1]
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), UserError("the file is gone")], ids=["oom", "gone"]
)
def test_pictures_that_cannot_be_drawn_are_named_and_training_goes_on(quick, monkeypatch, error):
    drawn = ["log.sample_count=2", "log.sample_steps=2", "optim=adamw"]
    whole = quick("whole", *drawn)
    original = sampling.Sampler._denoise

    def failing(self, places):
        monkeypatch.setattr(sampling.Sampler, "_denoise", original)  # the first time only
        raise error

    monkeypatch.setattr(sampling.Sampler, "_denoise", failing)
    folder = quick("failing", *drawn)
    assert f"no pictures of step 0 ({error})" in (folder / "train.log").read_text()
    assert not (folder / "samples/step-000000.png").exists()
    assert (folder / "samples/step-000004.png").exists()
    assert_same_weights(weights(folder, 4), weights(whole, 4))


def test_memory_that_runs_out_in_an_evaluation_costs_its_loss_and_nothing_else(quick, monkeypatch):
    whole = quick("whole", "log.eval_every=2")
    original, calls = losses.evaluate, []

    def failing(*args):
        calls.append(args)
        if len(calls) in (2, 3):  # after step 2 and after the last, step 4
            raise torch.OutOfMemoryError("no room")
        return original(*args)

    monkeypatch.setattr(losses, "evaluate", failing)
    folder = quick("failing", "log.eval_every=2")
    said = (folder / "train.log").read_text()
    for step in (2, 4):
        assert f"no eval/loss of step {step} (no room)" in said
    assert [row["step"] for row in rows(folder) if "eval/loss" in row] == [0]
    assert json.loads((folder / "summary.json").read_text())["eval_loss_after"] is None
    assert_same_weights(weights(folder, 4), weights(whole, 4))
    assert (folder / "model/model_index.json").exists()  # what was trained is not lost


def test_a_run_that_only_skips_stops_with_the_reason(composed, tmp_path, monkeypatch):
    original = losses.loss
    monkeypatch.setattr(losses, "loss", lambda *a: original(*a) * float("inf"))
    says = "3 steps in a row without a finite loss.*No step was whole, and there is no checkpoint"
    with pytest.raises(ValueError, match=says):
        run(composed(*QUICK, "runtime.max_skipped_steps=2"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_what_was_learned_before_a_run_only_skips_is_saved_and_nothing_is_deleted_for_it(
    quick, tmp_path, monkeypatch
):
    """And the run goes on from there, as one that may skip more."""
    options = ["runtime.save_every=1", "runtime.keep_checkpoints=1", "log.eval_points=1"]
    original = losses.loss

    def failing():
        """The losses of steps 3 and 4 are not finite."""
        calls = []
        return lambda *a: original(*a) * (calls.append(a) or (1 if len(calls) < 3 else math.inf))

    monkeypatch.setattr(losses, "loss", failing())
    says = r"^1 step without a finite loss.* whole step was 2; .* resume=\S*/run/.*/step-000001 "
    with pytest.raises(UserError, match=says):
        quick("run", *options, "runtime.max_skipped_steps=0")
    assert steps_saved(tmp_path / "run") == [1, 2]  # 1 is known to be good: step 2 was whole
    monkeypatch.setattr(losses, "loss", failing())
    whole = quick("whole", *options)
    monkeypatch.setattr(losses, "loss", lambda *a: original(*a) * math.inf)
    quick("run", *options, f"resume={tmp_path / 'run'}")
    assert_same_weights(weights(tmp_path / "run", 4), weights(whole, 4))


@pytest.mark.parametrize(("keep", "left"), [(1, [6, 9]), (2, [3, 6, 9])])
def test_steps_that_are_skipped_push_no_checkpoint_away(quick, tmp_path, monkeypatch, keep, left):
    """Steps 7 to 9 of 9 are skipped: that of step 6 may be of weights that the step had ruined."""
    monkeypatch.setattr(losses, "loss", poisoned_from(8))
    options = [f"runtime.keep_checkpoints={keep}", "runtime.max_skipped_steps=1"]
    with pytest.raises(UserError, match=r"last whole step was 7; .*resume=\S*/step-000006 "):
        quick("run", *options, "runtime.save_every=3", "schedule.steps=9")
    assert steps_saved(tmp_path / "run") == left


def test_a_single_checkpoint_is_deleted_once_a_step_after_the_next_is_whole(quick, monkeypatch):
    seen, between_steps = [], trainer.run._between_steps

    def noted(state, writer):
        seen.append(steps_saved(state.folder))
        between_steps(state, writer)
        seen.append(steps_saved(state.folder))

    monkeypatch.setattr(trainer.run, "_between_steps", noted)
    options = ["runtime.save_every=1", "runtime.keep_checkpoints=1", "schedule.steps=3"]
    assert steps_saved(quick("run", *options)) == [3]
    assert seen == [[], [1], [1], [1, 2], [2], [2]]  # before and after each step's save


@pytest.mark.parametrize("options", [[], ["optim=adafactor", "runtime.fused_backward=true"]])
def test_a_run_whose_weights_are_not_finite_saves_none_and_ends_at_the_next_step(
    quick, tmp_path, monkeypatch, options
):
    def spoiled(state, writer):
        if state.step == 3:
            next(iter(method.trained_parameters(state.model).values())).data[0] = math.nan
        between_steps(state, writer)

    between_steps = trainer.run._between_steps
    monkeypatch.setattr(trainer.run, "_between_steps", spoiled)
    says = (
        r"^unet\.conv_in\.weight is not finite since step 3, .*; lower optim\.lr\. The last whole "
        r"step was 3; go on from the checkpoint before it with resume=\S*/step-000002 "
    )
    options = [*options, "method.clip=rms", "schedule.steps=40"]
    with pytest.raises(UserError, match=says):
        quick("run", "runtime.save_every=1", "runtime.keep_checkpoints=1", *options)
    said = (tmp_path / "run/train.log").read_text()
    assert re.search(r"no checkpoint of step 3: unet\.\S+ is not finite; training goes on", said)
    assert said.count("skipped") == 1
    assert steps_saved(tmp_path / "run") == [2]


def test_broken_tensors_are_named_in_any_dtype():
    named = {
        "fine": torch.ones(3),
        "none": torch.ones(0),
        "half": torch.tensor([1.0, math.inf], dtype=torch.float16),
        "bf16": torch.tensor([[math.nan], [3.0]], dtype=torch.bfloat16),
        "large": torch.tensor([3.4e38, -3.4e38]),
        "minus": torch.tensor(-math.inf),
    }
    assert guard.broken(named) == ["half", "bf16", "minus"]
    assert guard.broken({}) == []


def test_a_latent_that_is_not_finite_is_named_with_its_picture(
    composed, pictures, tmp_path, monkeypatch
):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    mode = DiagonalGaussianDistribution.mode

    calls = []

    def spoiled(self):
        calls.append(self)
        return mode(self) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(DiagonalGaussianDistribution, "mode", spoiled)
    config = composed(*QUICK, "data=folder", f"data.path={pictures}", "data.resolution=64")
    with pytest.raises(ValueError, match=r"red\.png is not finite"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize("theirs", ["model/mine.txt", "config.yaml", "a-run.safetensors"])
def test_a_folder_of_other_files_is_not_written_to(composed, tmp_path, theirs):
    folder = tmp_path / "mine"
    (folder / theirs).parent.mkdir(parents=True)
    (folder / theirs).write_text("precious")
    with pytest.raises(UserError, match=r"is not a run's folder, and its .* would be written over"):
        run(composed(*QUICK, "name=a/run"), folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / theirs]
    assert (folder / theirs).read_text() == "precious"


def test_a_small_file_of_a_run_is_the_old_or_the_new_when_the_disk_is_full(tmp_path, monkeypatch):
    """The disk takes the first half of every file."""
    table = [{"overrides": ["a"], "eval_loss_after": 0.5}]
    (tmp_path / "0").mkdir()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    writers = {
        "config.yaml": lambda: record.write(tmp_path, {"optim": {}}, torch.device("cpu")),
        "environment.json": lambda: record.write(tmp_path, {"optim": {}}, torch.device("cpu")),
        "summary.json": lambda: report.write_summary(tmp_path, {"steps": 4}),
        "0/summary.json": lambda: report.write_summary(tmp_path / "0", table[0]),
        "sweep.md": lambda: SweepTable().on_multirun_end(config),
        "wandb_id": lambda: metrics._wandb_id(tmp_path),
    }
    for write in writers.values():
        write()
    whole = {name: (tmp_path / name).read_text() for name in writers}
    original = pathlib.Path.write_text
    (tmp_path / "wandb_id").unlink()
    for name, write in writers.items():

        def half(path, text, *, name=pathlib.Path(name).name, **options):
            full = name in path.name
            original(path, text[: len(text) // 2] if full else text, **options)
            if full:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(pathlib.Path, "write_text", half)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / name}'"):
            write()
        path = tmp_path / name
        assert path.read_text() == whole[name] if name != "wandb_id" else not path.exists()


def test_a_full_disk_under_the_log_file_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging.FileHandler, "close", full)
    with pytest.raises(UserError, match="the reason"), console.logging_to(tmp_path / "train.log"):
        raise UserError("the reason")
    with console.logging_to(tmp_path / "train.log"):
        pass  # nor does it end a run that ends well


def test_an_error_of_the_program_is_in_the_log_with_where_it_was(tmp_path):
    with pytest.raises(ZeroDivisionError), console.logging_to(tmp_path / "train.log"):
        1 / 0  # noqa: B018
    text = (tmp_path / "train.log").read_text()
    assert "Traceback" in text
    assert "1 / 0" in text


def test_a_folder_that_is_left_half_written_is_gone_whatever_ended_it(tmp_path):
    def write_half():
        with disk.whole_folder(tmp_path / "model") as temporary:
            (temporary / "weights").write_text("half")
            raise SystemExit(130)  # a second Ctrl-C

    with pytest.raises(SystemExit):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_full_disk_cut_short_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in metrics.read(path)] == [1, 4]


def test_an_export_that_fails_leaves_a_summary(composed, monkeypatch, tmp_path):
    def full(*_):
        raise UserError("could not save: no space")

    monkeypatch.setattr("trainer.result.export", full)
    with pytest.raises(UserError, match="no space"):
        run(composed(*QUICK), tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["error"]) == (4, "could not save: no space")
    assert summary["eval_loss_after"] > 0


def test_a_run_that_fails_leaves_what_is_known_and_which_step_its_result_is_of(
    quick, composed, monkeypatch
):
    folder = quick("run", "schedule.steps=2")
    monkeypatch.setattr(losses, "loss", poisoned_from(2))
    longer = ["schedule.steps=9", f"resume={folder}", "runtime.allow_config_change=true"]
    for step in (4, 5):  # the second session fails at once
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
    assert "the summary of this run is lost" in (tmp_path / "run/train.log").read_text()


def test_files_that_cannot_be_copied_are_one_line(tmp_path):
    failed = [("/a", "/b", "[Errno 28] No space left on device: '/b'"), ("/c", "/d", "another")]
    with (
        pytest.raises(UserError, match=r"model: \[Errno 28\] No space left on device: '/b' \("),
        disk.whole_folder(tmp_path / "model"),
    ):
        raise shutil.Error(failed)


def test_a_cache_that_is_only_read_is_read(tmp_path):
    """Fingerprints that cannot be remembered there are computed each time."""
    (tmp_path / "cache").write_text("as if it could not be written")
    for value in ("one", "two"):
        assert fingerprints.remembered({}, [], tmp_path / "cache", lambda v=value: v) == value
