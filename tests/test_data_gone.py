"""A cache that disappears during a run, or is temporarily unreadable."""

import errno
import shutil
from pathlib import Path

import pytest
from encoders import Vae, entries, truncate
from helpers import QUICK, assert_same_weights, weights

import trainer.run
from trainer.data import Store
from trainer.errors import UserError
from trainer.system import retry


def test_what_a_drive_cannot_give_at_once_is_read_again(load, cache, monkeypatch, caplog):
    samples = load().samples
    latents = Store(str(cache), "float32").latents(samples, "vae", Vae().make)
    pauses, failures, read = [], [], Path.read_bytes

    def failing(path):
        if failures:
            raise failures.pop()
        return read(path)

    monkeypatch.setattr("trainer.system.retry.time.sleep", pauses.append)
    monkeypatch.setattr("trainer.system.retry._hopeless", [])
    monkeypatch.setattr(Path, "read_bytes", failing)
    failures += [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "broken")]
    assert latents[0]["latent"].isfinite().all()
    assert pauses == [0.5, 2.0]
    assert "retrying in 2 s" in caplog.text
    failures += [OSError(errno.EIO, "broken")] * 4
    with pytest.raises(UserError, match="has become unreadable"):
        latents[0]
    assert not failures
    assert len(pauses) == 5
    monkeypatch.setattr("trainer.system.retry._hopeless", [OSError()] * 3)
    failures.append(OSError(errno.EIO, "broken"))
    with pytest.raises(UserError, match="has become unreadable"):
        latents[0]
    failures.append(FileNotFoundError(errno.ENOENT, "gone"))
    with pytest.raises(UserError, match="has become unreadable"):
        latents[0]
    assert len(pauses) == 5


def test_a_run_retries_reads_whatever_an_earlier_one_of_its_process_has_lost(
    composed, tmp_path, monkeypatch
):
    pauses, failures = [], [OSError(errno.EIO, "broken")]

    def failing():
        if failures:
            raise failures.pop()

    monkeypatch.setattr("trainer.system.retry.time.sleep", pauses.append)
    monkeypatch.setattr("trainer.system.retry._hopeless", [OSError()] * 3)
    trainer.run.begin(composed(*QUICK), tmp_path)
    retry.with_retries(failing)
    assert pauses == [0.5]


def test_a_run_whose_cache_is_gone_is_saved_and_goes_on(quick, cache, tmp_path, monkeypatch):
    options = [f"data.cache={cache}", "log.eval_points=2"]
    whole = quick("whole", *options)

    def gone(state, writer):
        if state.step == 2:
            shutil.rmtree(cache / "latents")

    between_steps = trainer.run._between_steps
    monkeypatch.setattr(trainer.run, "_between_steps", gone)
    with pytest.raises(
        UserError, match=r"to recreate it \(resume=\S*/run/checkpoints/step-000002\)$"
    ):
        quick("run", *options)
    monkeypatch.setattr(trainer.run, "_between_steps", between_steps)
    quick("run", *options, f"resume={tmp_path / 'run'}")
    assert_same_weights(weights(tmp_path / "run", 4), weights(whole, 4))


def test_an_evaluation_too_that_finds_no_cache_is_no_reason_to_lose_what_was_learned(
    quick, cache, monkeypatch
):
    original = trainer.run.evaluation.evaluate

    def gone(state, writer):
        if state.step == 2:
            shutil.rmtree(cache / "latents")
        return original(state, writer)

    monkeypatch.setattr(trainer.run.evaluation, "evaluate", gone)
    every = "log.eval_every=2"
    with pytest.raises(
        UserError, match=r"to recreate it \(resume=\S*/run/checkpoints/step-000002\)$"
    ):
        quick("run", f"data.cache={cache}", every, "log.eval_points=2")


@pytest.mark.parametrize("gone", ["deleted", "damaged"])
def test_an_entry_that_vanishes_during_the_run_is_named(load, cache, gone):
    samples = load().samples
    latents = Store(str(cache), "float32").latents(samples, "vae", Vae().make)
    for path in entries(cache):
        path.unlink() if gone == "deleted" else truncate(path)
    with pytest.raises(UserError, match=r"latents/.*has become unreadable.*resume"):
        latents[0]
