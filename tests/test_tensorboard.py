"""TensorBoard: its event files hold what metrics.jsonl does, and a resumed run's take over."""

import importlib.util
import shutil

import pytest
from helpers import QUICK, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checks import validate
from trainer.errors import UserError
from trainer.run import run


def shown(folder):
    """What TensorBoard shows for a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_a_run_has_numbers_pictures_and_configuration_in_tensorboard(composed, tmp_path):
    config = composed(*QUICK, "log=tensorboard", "log.sample_count=2", "log.sample_steps=2")
    run(config, tmp_path / "run")
    found = shown(tmp_path / "run")
    written = rows(tmp_path / "run")
    assert set(found.Tags()["scalars"]) == {key for row in written for key in row} - {"step"}
    for key in found.Tags()["scalars"]:
        points = [(event.step, event.value) for event in found.Scalars(key)]
        expected = [(row["step"], pytest.approx(row[key])) for row in written if key in row]
        assert points == expected
    assert [event.step for event in found.Images("samples")] == [0, config.schedule.steps]
    assert "config/text_summary" in found.Tags()["tensors"]
    assert "summary/text_summary" in found.Tags()["tensors"]


def test_a_resumed_run_takes_over_in_tensorboard(composed, tmp_path):
    """Steps after the checkpoint are shown once, as the resumed run made them."""
    folder = tmp_path / "run"
    options = [*QUICK, "log=tensorboard", "log.every=1", "runtime.save_every=2"]
    run(composed(*options), folder)
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    begun = composed(*options, f"resume={folder}")
    run(begun, folder)
    steps = [event.step for event in shown(folder).Scalars("train/loss")]
    assert steps == list(range(1, begun.schedule.steps + 1))


def test_a_failing_tensorboard_never_stops_a_run(composed, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    run(composed(*QUICK, "log=tensorboard"), tmp_path / "run")
    assert caplog.text.count("TensorBoard is off") == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_absent_tensorboard_is_refused_before_anything_is_loaded(composed, monkeypatch):
    config = composed("log=tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        validate.check(config)
