"""Faults during a run: damaged files, full disks, kills, non-finite numbers."""

import errno
import json
import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from helpers import QUICK, assert_same_weights, rows, weights
from models import TINY
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.formats import fingerprints
from trainer.objective import losses
from trainer.reporting import metrics, report, trackers
from trainer.run import run
from trainer.sampling import sampler
from trainer.storage import checkpoint, record, resuming
from trainer.sweep import callback
from trainer.system import console, disk


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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(finished, caplog, damage):
    folder = finished("run", "runtime.save_every=2")
    newest = folder / "checkpoints/step-000004"
    name = next(word for word in damage.split() if "." in word)
    DAMAGE[damage](newest / name)
    loaded = resuming.load_newest(resuming.find(str(folder)))
    assert loaded.step == 2
    assert f"{newest} is damaged: " in caplog.text


def test_a_run_writes_the_checkpoint_anew_that_was_damaged(finished, composed):
    folder = finished("run", "runtime.save_every=2")
    newest = folder / "checkpoints/step-000004"
    flip_last_bit(newest / "weights.safetensors")
    damaged = (newest / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another configuration"):
        run(composed(*QUICK, f"resume={folder}", "optim.lr=1"), folder)
    assert newest.exists()  # a refused resume changes nothing
    run(composed(*QUICK, "runtime.save_every=2", f"resume={folder}"), folder)
    assert checkpoint.load(newest).step == 4
    aside = folder / "checkpoints/damaged-step-000004/weights.safetensors"
    assert aside.read_bytes() == damaged


@pytest.fixture
def save(tmp_path):
    """Save a small checkpoint of this step and keep the last two: save(4)."""

    def make(step, optimizer=None):
        made = checkpoint.Checkpoint(
            step=step,
            weights={"w": torch.zeros(2)},
            optimizer=optimizer or {},
            average={},
            config={},
            overrides=[],
            model="",
            data="",
            epochs=0.0,
            losses_before={},
            counters={},
        )
        checkpoint.save(tmp_path, made)
        checkpoint.rotate(tmp_path, keep=2, proven=step - 1)

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
    with pytest.raises(ValueError, match="so it is unusable"):
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
        UserError, match=r"before the first step, because its unet\.conv_in\.bias is not"
    ):
        quick("run", f"model.path={model}")
    assert not (tmp_path / "run/checkpoints").exists()


def test_pictures_that_are_gone_cost_the_grids_first_row_and_nothing_else(
    composed, pictures, tmp_path, monkeypatch
):
    from trainer.sampling.sampler import Sampler

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
    finished, composed, tmp_path, monkeypatch, failing, caplog
):
    folder = finished("run", "schedule.steps=2")
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
    assert "training continues" in caplog.text
    after = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert after == before
    assert not list((folder / "checkpoints").glob(".*"))


def test_the_reason_why_an_optimizer_state_cannot_be_written_is_told(save, tmp_path):
    """Real writes fail: torch's own error says "unexpected pos", and of a path nothing else."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not save .*step-000004: \[Errno 27\] File too"):
            save(4, optimizer={"state": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_write_leaves_a_whole_folder(tmp_path, replaces):
    """Die at the n-th fsync, rename or removal while writing a folder; then write it again.  Each
    attempt is a fork of one process that has the imports."""
    script = tmp_path / "die.py"
    script.write_text(
        """
import os, shutil, sys
from pathlib import Path
from trainer.system import disk
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os._exit(9)
        return function(*args, **kwargs)
    return call
for line in sys.stdin:
    text, deadline, calls = line.split()[0], int(line.split()[1]), 0
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.fsync, os.rename, Path.rename, shutil.rmtree = map(
        counted, (os.fsync, os.rename, Path.rename, shutil.rmtree)
    )
    with disk.whole_folder(Path(sys.argv[1])) as temporary:
        for name in "ab":
            (temporary / name).write_text(text)
    os._exit(0)
"""
    )
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "final"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def write(text, deadline):
        print(text, deadline, file=process.stdin, flush=True)
        return int(process.stdout.readline())

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
        if replaces:  # the old folder is in place, or beside for the next write to restore
            assert texts or list(tmp_path.glob(".final.old/a"))
    assert status == 0, "the write never came to its end"
    assert died >= 5
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["die.py", "final"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), UserError("the file is gone")], ids=["oom", "gone"]
)
def test_pictures_that_cannot_be_drawn_are_named_and_training_goes_on(
    quick, finished, monkeypatch, error
):
    drawn = ["log.sample_count=2", "log.sample_steps=2", "optim=adamw"]
    whole = finished("whole", *drawn)
    original = sampler.Sampler._denoise

    def failing(self, places):
        monkeypatch.setattr(sampler.Sampler, "_denoise", original)  # fail only once
        raise error

    monkeypatch.setattr(sampler.Sampler, "_denoise", failing)
    folder = quick("failing", *drawn)
    assert f"no pictures at step 0 ({error})" in (folder / "train.log").read_text()
    assert not (folder / "samples/step-000000.png").exists()
    assert (folder / "samples/step-000004.png").exists()
    assert_same_weights(weights(folder, 4), weights(whole, 4))


def test_memory_that_runs_out_in_an_evaluation_costs_its_loss_and_nothing_else(quick, monkeypatch):
    whole = quick("whole", "log.eval_every=2")
    original, calls = losses.evaluate, []

    def failing(*args):
        calls.append(args)
        if len(calls) in (2, 3):  # after step 2, and after step 4, the last
            raise torch.OutOfMemoryError("no room")
        return original(*args)

    monkeypatch.setattr(losses, "evaluate", failing)
    folder = quick("failing", "log.eval_every=2")
    said = (folder / "train.log").read_text()
    for step in (2, 4):
        assert f"no eval/loss at step {step} (no room)" in said
    assert [row["step"] for row in rows(folder) if "eval/loss" in row] == [0]
    assert json.loads((folder / "summary.json").read_text())["eval_loss_after"] is None
    assert_same_weights(weights(folder, 4), weights(whole, 4))
    assert (folder / "model/model_index.json").exists()  # the trained weights are not lost


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
    options = ["data=folder", f"data.path={pictures}", "data.resolution=64", "data.cache=null"]
    with pytest.raises(ValueError, match=r"red\.png is not finite"):
        run(composed(*QUICK, *options), tmp_path / "run")


@pytest.mark.parametrize("theirs", ["model/mine.txt", "config.yaml", "a-run.safetensors"])
def test_a_folder_of_other_files_is_not_written_to(composed, tmp_path, theirs):
    folder = tmp_path / "mine"
    (folder / theirs).parent.mkdir(parents=True)
    (folder / theirs).write_text("precious")
    with pytest.raises(UserError, match=r"is not a run's folder, and its .* would be overwritten"):
        run(composed(*QUICK, "name=a/run"), folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / theirs]
    assert (folder / theirs).read_text() == "precious"


def test_a_small_file_of_a_run_is_the_old_or_the_new_when_the_disk_is_full(tmp_path, monkeypatch):
    """The disk fills up in the middle of every file."""
    table = [{"overrides": ["a"], "eval_loss_after": 0.5}]
    (tmp_path / "0").mkdir()
    writers = {
        "config.yaml": lambda: record.write(tmp_path, {"optim": {}}, torch.device("cpu")),
        "environment.json": lambda: record.write(tmp_path, {"optim": {}}, torch.device("cpu")),
        "summary.json": lambda: report.write_summary(tmp_path, {"steps": 4}),
        "0/summary.json": lambda: report.write_summary(tmp_path / "0", table[0]),
        "sweep.md": lambda: callback._write(tmp_path),
        "wandb_id": lambda: trackers.wandb_id(tmp_path),
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
        pass  # a successful run does not fail because of it


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


def test_folders_that_a_file_system_cannot_flush_are_written_all_the_same(quick, monkeypatch):
    fsync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    folder = quick("run", "log.eval_points=2")
    assert checkpoint.completed(folder / "checkpoints")
    assert list((folder / "model").glob("unet/*.safetensors"))


def test_files_that_cannot_be_copied_are_one_line(tmp_path):
    failed = [("/a", "/b", "[Errno 28] No space left on device: '/b'"), ("/c", "/d", "another")]
    with (
        pytest.raises(UserError, match=r"model: \[Errno 28\] No space left on device: '/b' \("),
        disk.whole_folder(tmp_path / "model"),
    ):
        raise shutil.Error(failed)


def test_a_cache_that_is_only_read_is_read(tmp_path):
    """Fingerprints that cannot be stored are computed each time."""
    (tmp_path / "cache").write_text("as if it could not be written")
    for value in ("one", "two"):
        assert fingerprints.remembered({}, [], tmp_path / "cache", lambda v=value: v) == value


def test_a_checkpoint_of_another_version_is_neither_damaged_nor_passed_over(save, tmp_path, caplog):
    for step in (1, 2):
        save(step)
    path = tmp_path / "step-000002/checkpoint.json"
    record = json.loads(path.read_text())
    del record["version"], record["sha256"]["checkpoint.json"]
    record["sha256"]["checkpoint.json"] = checkpoint._sha256(checkpoint._canonical(record))
    path.write_text(json.dumps(record))
    with pytest.raises(checkpoint.OtherVersionError, match="another version of the trainer"):
        resuming.load_newest(checkpoint.completed(tmp_path))
    assert "damaged" not in caplog.text
