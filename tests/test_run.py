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

from trainer import checkpoint, losses, metrics
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
    assert grid.width > grid.height * 0.5
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
    without = losses.predict(reader.unet, batch)
    reader.load_lora_weights(tmp_path / "lora")
    state.pipeline.unet.eval()
    with torch.no_grad():
        here, there = losses.predict(state.pipeline.unet, batch), losses.predict(reader.unet, batch)
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


def test_resume_with_another_configuration_is_refused_with_the_difference(quick, command):
    folder = quick("run")
    status, _, err = command(*QUICK, "optim.lr=0.5", f"resume={folder}")
    assert status == 2
    assert "optim.lr: 0.001 -> 0.5" in err
    assert "runtime.allow_config_change=true" in err


# --- faults --------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(quick, caplog):
    folder = quick("run", "runtime.save_every=2")
    newest = folder / "checkpoints/step-000004"
    file = newest / "weights.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    loaded = checkpoint.load_newest(checkpoint.find(str(folder)))
    assert loaded.step == 2
    assert f"{newest} is damaged: weights.safetensors" in caplog.text


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
    with pytest.raises(ValueError, match=r"could not save .*step-000004.*No space left"):
        run(composed(*QUICK, *options), folder)
    monkeypatch.undo()
    assert "training goes on" in caplog.text
    after = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert after == before
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_kill_at_any_write_of_a_save_leaves_a_loadable_checkpoint(quick, tmp_path):
    """Die at the n-th fsync, rename or removal of a save that replaces an older checkpoint."""
    folder = quick("run", "schedule.steps=2")
    script = tmp_path / "die.py"
    script.write_text(
        """
import os, shutil, sys
from pathlib import Path
from trainer import checkpoint
folder, deadline = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadline:
            os._exit(9)
        return function(*args, **kwargs)
    return call
newest = checkpoint.load_newest(checkpoint.completed(folder))
newest.step += 1
os.fsync, os.rename, shutil.rmtree = map(counted, (os.fsync, os.rename, shutil.rmtree))
checkpoint.save(folder, newest, keep=1)
"""
    )
    died = 0
    for deadline in range(1, 20):
        status = subprocess.run(
            [sys.executable, script, folder / "checkpoints", str(deadline)], check=False
        ).returncode
        assert status in (0, 9)
        found = checkpoint.load_newest(checkpoint.completed(folder / "checkpoints"))
        assert found.weights
        if status == 0:
            break
        died += 1
    assert status == 0, "the save never came to its end"
    assert died >= 5


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

    def spoiled(self):
        latent = mode(self).clone()
        latent[2] = float("nan")
        return latent

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
    assert sum("lion-full" in line for line in table) == 2
    (kept,) = tmp_path.glob("runs/sweep-*/sweep.md")
    assert kept.read_text().count("\n") == 6


def test_the_clock_of_a_run_counts_training_only(quick, monkeypatch):
    slow = losses.evaluate
    monkeypatch.setattr(losses, "evaluate", lambda *a: (time.sleep(1), slow(*a))[1])
    folder = quick("run", "log.eval_every=1")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"] < 4
