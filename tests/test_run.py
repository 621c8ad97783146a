"""Whole runs of a few steps on the shipped model: they learn, repeat, stop, resume and export."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import new_process
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from trainer import batches, checkpoint, losses, metrics
from trainer.run import run

QUICK = (
    "schedule.steps=4",
    "schedule.warmup_steps=1",
    "data.batch_size=4",
    "log.every=1",
    "log.eval_points=6",
    "log.sample_count=0",
    "runtime.threads=1",
)


@pytest.fixture
def quick(composed, tmp_path):
    """Run in this process: quick("a", "optim=lion") -> the folder `a` of a finished short run."""

    def make(name, *overrides):
        folder = tmp_path / name
        run(composed(*QUICK, *overrides), folder)
        return folder

    return make


def rows(folder):
    return metrics.read(folder / "metrics.jsonl")


def deterministic(folder):
    """The rows without times and memory."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))}
        for row in rows(folder)
    ]


def weights(folder, step):
    return load_file(folder / f"checkpoints/step-{step:06d}/weights.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- what a run writes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_writes_a_pipeline_that_diffusers_loads(quick, dtype):
    folder = quick("full", f"model.dtype={dtype}", "log.sample_count=2", "log.sample_steps=2")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "model")
    trained = weights(folder, 4)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor.float(), trained[name].float()), name
    grid = Image.open(folder / "samples/step-000004.png")
    assert grid.size == (64 + 2 * 96, 14 + 3 * 96 + 6)  # titles, two columns; original, before, now
    for name in ("config.yaml", "environment.json", "summary.json", "train.log"):
        assert (folder / name).stat().st_size > 0


def test_metrics_have_the_promised_keys_and_start_with_an_eval(quick):
    written = rows(quick("metrics", "optim=adamw"))
    assert written[0].keys() == {"step", "eval/loss"}
    assert written[0]["step"] == 0
    expected = {"loss", "lr", "grad_norm", "update_ratio", "epoch", "skipped_steps"}
    for row in written[1:5]:
        assert {key.removeprefix("train/") for key in row if key.startswith("train/")} == expected
        assert row["memory/optimizer_state_bytes"] == 8 * 2_743_620 + 330 * 16
        assert row["perf/images_per_second"] > 0
        assert 0 < row["train/update_ratio"] < 1
    assert written[-1].keys() == {"step", "eval/loss"}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 16.0)])
def test_lora_export_in_diffusers_gives_the_picture_of_the_trained_model(
    composed, tmp_path, rank, alpha
):
    """alpha != rank included: a reader that lost alpha would draw another picture."""
    from trainer.run import assemble, finish, train

    config = composed(
        *QUICK, "method=lora", f"method.rank={rank}", f"method.alpha={alpha}", "optim.lr=0.05"
    )
    state = assemble(config, tmp_path, None)
    writer = metrics.Metrics(tmp_path, config, 0)
    train(state, writer, [])
    finish(state, writer)

    reader = StableDiffusionXLPipeline.from_pretrained(config.model.path).to(torch.float32)
    batch = state.eval_batches[0]
    without = batches.predict(reader.unet, batch)
    reader.load_lora_weights(tmp_path / "lora")
    state.pipeline.unet.eval()
    with torch.no_grad():
        here, there = (
            batches.predict(state.pipeline.unet, batch),
            batches.predict(reader.unet, batch),
        )
    assert torch.allclose(here, there, atol=1e-5)
    assert not torch.allclose(there, without, atol=1e-2)


@pytest.mark.parametrize(
    "optimizer",
    [
        "optim=sgd",
        "optim=lion",
        "optim=adafactor",
        "optim=adopt_factored",
        "optim=external optim.class_path=torch.optim.RAdam +optim.options.betas=[0.9,0.99]",
    ],
)
def test_every_optimizer_trains_the_unet(quick, optimizer):
    folder = quick("run", *optimizer.split(), "schedule.steps=2", "log.eval_points=2")
    assert all(row.get("train/skipped_steps", 0) == 0 for row in rows(folder))
    assert rows(folder)[0]["eval/loss"] != rows(folder)[-1]["eval/loss"]


# --- the same again ------------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_bitwise_equal_and_another_seed_is_not(quick):
    first, again, other = quick("a"), quick("b"), quick("c", "seed=1")
    assert_same_weights(weights(first, 4), weights(again, 4))
    assert deterministic(first) == deterministic(again)
    assert deterministic(first)[1]["train/loss"] != deterministic(other)[1]["train/loss"]
    # eval points do not depend on the seed, so that seeds can be compared
    assert rows(first)[0] == rows(other)[0]


def test_optimizers_see_the_same_data_noise_and_timesteps(quick):
    """The first loss is taken before any optimizer has acted, the others differ by its doing."""
    runs = [rows(quick(name, f"optim={name}")) for name in ("adamw", "lion", "adafactor8bit")]
    assert len({written[1]["train/loss"] for written in runs}) == 1
    assert len({written[1]["train/grad_norm"] for written in runs}) == 1
    assert len({written[4]["train/loss"] for written in runs}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_in_a_new_process_is_bitwise_identical(tmp_path, method, dtype):
    overrides = [*QUICK, f"method={method}", f"model.dtype={dtype}", "runtime.keep_checkpoints=9"]
    whole = new_process(*overrides, "hydra.run.dir=whole", cwd=tmp_path)
    parts = new_process(*overrides, "runtime.save_every=2", "hydra.run.dir=parts", cwd=tmp_path)
    assert whole.returncode == parts.returncode == 0, whole.stderr + parts.stderr
    # As if killed after the checkpoint of step 2.
    subprocess.run(["rm", "-r", tmp_path / "parts/checkpoints/step-000004"], check=True)
    resumed = new_process(*overrides, "resume=parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 2" in resumed.stdout
    assert_same_weights(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))
    assert deterministic(tmp_path / "whole") == deterministic(tmp_path / "parts")
    states = [
        torch.load(tmp_path / name / "checkpoints/step-000004/optimizer.pt", weights_only=True)
        for name in ("whole", "parts")
    ]
    for index, state in states[0]["state"].items():
        assert_same_weights(state, states[1]["state"][index])


def test_resume_moves_the_weights_and_counts_on(quick, composed, tmp_path):
    folder = quick("run", "schedule.steps=2")
    longer = [*QUICK, "schedule.steps=4", f"resume={folder}", "runtime.allow_config_change=true"]
    run(composed(*longer), folder)
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [1, 2, 3, 4]
    before, after = weights(folder, 2), weights(folder, 4)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_changed_learning_rate_is_used_after_resume_where_it_is_allowed(
    quick, composed, tmp_path
):
    folder = quick("run", "schedule.steps=2", "schedule=constant")
    options = ["schedule=constant", "optim.lr=0.01", f"resume={folder}"]
    run(composed(*QUICK, *options, "runtime.allow_config_change=true"), folder)
    assert [row["train/lr"] for row in rows(folder) if "train/lr" in row] == pytest.approx(
        [0.0005, 0.001, 0.01, 0.01]
    )


def test_another_optimizer_on_resume_is_refused(quick, command):
    folder = quick("run")
    changed = ["optim=lion", "runtime.allow_config_change=true"]
    status, _, err = command(*QUICK, *changed, f"resume={folder}")
    assert status == 2
    assert "optim.name: adafactor8bit -> lion cannot change" in err


def test_other_pictures_on_resume_are_refused(composed, pictures, tmp_path):
    options = [*QUICK, "data=folder", f"data.path={pictures}", "data.resolution=64"]
    run(composed(*options), tmp_path / "run")
    (pictures / "red.txt").write_text("another caption")
    with pytest.raises(ValueError, match="pictures or captions are not those"):
        run(composed(*options, f"resume={tmp_path / 'run'}"), tmp_path / "run")


def test_a_run_goes_on_in_its_folder_from_its_newest_checkpoint_and_forks_from_an_older(
    quick, in_tmp
):
    folder = quick("run", "runtime.save_every=2")
    newest, older = (folder / f"checkpoints/step-00000{n}" for n in (4, 2))
    assert checkpoint.run_folder_of(str(folder)) == folder
    assert checkpoint.run_folder_of(str(newest)) == folder
    assert checkpoint.run_folder_of(str(older)) is None
    copy = in_tmp / "copy"
    older.rename(copy)
    assert checkpoint.run_folder_of(str(copy)) is None


def test_resume_latest_takes_the_newest_run(command, in_tmp):
    for name in ("first", "second"):
        status, _, err = command(*QUICK, f"name={name}")
        assert status == 0, err
    status, out, _ = command(*QUICK, "name=second", "resume=latest")
    assert status == 0
    assert "second/checkpoints/step-000004" in out
    (folder,) = in_tmp.glob("runs/*/*-second")
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [1, 2, 3, 4]


def test_a_fresh_run_in_a_used_folder_is_refused(quick, composed):
    folder = quick("run")
    with pytest.raises(ValueError, match=f"{folder} holds a run"):
        run(composed(*QUICK), folder)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    names = [path.name for path in checkpoint.completed(tmp_path)]
    assert names == ["step-000020", "step-999999", "step-1000000"]


def test_resume_with_another_configuration_is_refused_with_the_difference(quick, command):
    folder = quick("run")
    status, _, err = command(*QUICK, "optim.lr=0.5", f"resume={folder}")
    assert status == 2
    assert "optim.lr: 0.001 -> 0.5" in err
    assert "runtime.allow_config_change=true" in err


# --- faults --------------------------------------------------------------------------------------


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
        "safetensors": "trainer.checkpoint.save_file",
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_where_it_stopped(tmp_path, number):
    overrides = [*QUICK, "schedule.steps=2000", "hydra.run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *overrides],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait(timeout=120) == 128 + number
    assert "resume=" in output
    saved = checkpoint.load_newest(checkpoint.find(str(tmp_path / "run")))
    assert saved.step >= 3


def test_a_step_without_a_finite_loss_changes_nothing(quick, composed, tmp_path, monkeypatch):
    """Step 2 of 4 yields NaN: the run equals one whose step 2 never reached the optimizer."""
    calls = 0
    original = losses.loss

    def poisoned(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls == 2 else 1.0)

    monkeypatch.setattr(losses, "loss", poisoned)
    folder = quick("poisoned", "runtime.save_every=1", "runtime.keep_checkpoints=9")
    assert_same_weights(weights(folder, 1), weights(folder, 2))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(folder, 2).values(), weights(folder, 3).values(), strict=True)
    )
    written = [row for row in rows(folder) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in written] == [0, 1, 1, 1]
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 1


def test_a_run_that_only_skips_stops_with_the_reason(composed, tmp_path, monkeypatch):
    original = losses.loss
    monkeypatch.setattr(losses, "loss", lambda *a: original(*a) * float("inf"))
    with pytest.raises(ValueError, match="3 steps in a row without a finite loss"):
        run(composed(*QUICK, "runtime.max_skipped_steps=2"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


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


def test_progress_lines_carry_loss_speed_and_eta(quick, capfd):
    quick("run")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for part in ("loss", "images/s", "ETA"):
        assert part in lines[0]


@pytest.mark.slow
def test_a_sweep_runs_the_product_and_prints_a_table(tmp_path):
    done = new_process(
        "-m", *QUICK, "optim=adafactor8bit,lion", "seed=0,1", "schedule.steps=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    for part in ("eval after", "s/step", "optimizer state", "peak memory"):
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
    assert "failed: " in table[-1]


def test_a_callback_without_runs_prints_nothing(tmp_path, capsys):
    from omegaconf import OmegaConf

    from trainer.report import SweepTable

    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert capsys.readouterr().out == ""


def test_the_clock_of_a_run_counts_training_only(quick, monkeypatch):
    """A clock that only evaluation moves: training has taken no time."""
    now = [0.0]
    original = losses.evaluate

    def evaluate(*arguments):
        now[0] += 100.0
        return original(*arguments)

    monkeypatch.setattr(losses, "evaluate", evaluate)
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    folder = quick("run", "log.eval_every=1")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"] < 100
