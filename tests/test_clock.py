"""Time and pictures of a run over all its sessions: time per step, time left."""

import itertools
import json
import logging
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import QUICK, deterministic, rows

from trainer.data.plan import BatchPlan
from trainer.reporting import report
from trainer.reporting.clock import Clock
from trainer.reporting.report import closing_lines
from trainer.run import run
from trainer.storage import checkpoint
from trainer.storage.resuming import drop_other_measure
from trainer.system import console
from trainer.system.memory import Peaks

LONGER = ["schedule.steps=6", "runtime.allow_config_change=true"]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def clock():
    """A clock that has seen these steps, each (seconds, shape), of two pictures."""

    def make(*steps, after=None):
        made = Clock()
        if after:
            made.load_state_dict(json.loads(json.dumps(after.state_dict())))
        for seconds, shape in steps:
            made.step(seconds, [shape], 2)
        return made

    return make


def test_steps_that_meet_a_shape_for_the_first_time_are_no_measure_of_speed(clock):
    compiled = clock((30.0, "a"), (1.0, "a"), (20.0, "b"), (2.0, "b"), (3.0, "a"))
    pace = compiled.pace(5)
    assert (pace.seconds_per_step, pace.images_per_second) == (2.0, 1.0)
    assert clock((30.0, "a"), (20.0, "b")).pace(2).seconds_per_step == 25.0  # no other steps


def test_every_session_warms_up_and_the_speed_is_that_of_all(clock):
    one = clock((30.0, "a"), (1.0, "a"))
    both = clock((40.0, "a"), (3.0, "a"), after=one)
    assert both.pace(4).seconds_per_step == 2.0
    assert (both.seconds, both.pictures) == (74.0, 8)


def test_one_slow_step_does_not_change_how_fast_a_run_is_told_to_be(clock):
    one = clock((30.0, "a"), *[(1.0, "a")] * 5, (500.0, "a"))
    resumed = clock((40.0, "a"), *[(1.0, "a")] * 3, after=one)
    pace = resumed.usual_pace(11)
    assert (pace.seconds_per_step, pace.images_per_second) == (1.0, 2.0)
    assert resumed.pace(11).seconds_per_step > 50  # the basis for estimating the time left
    assert resumed.quartiles() == [1.0, 1.0]


def test_the_speed_is_that_of_the_last_steps_and_its_state_stays_small(clock):
    one = clock(*[(9.0, "a")] * 600, *[(1.0, "a"), (3.0, "a")] * 250)
    assert len(one.state_dict()["times"]) == 500
    assert one.usual_pace(1100).seconds_per_step == 2.0
    assert one.quartiles() == [1.0, 3.0]
    assert clock((9.0, "a"), (1.0, "a")).quartiles() is None


def test_metrics_have_the_pace_since_the_row_before(clock):
    one = clock((30.0, "a"), (1.0, "a"))
    assert one.lately().seconds_per_step == 15.5
    one.step(2.0, ["a"], 2)
    assert one.lately().seconds_per_step == 2.0


def test_the_time_left_has_what_is_done_between_steps(clock, monkeypatch):
    one = clock((9.0, "a"), (1.0, "a"))
    assert one.left(2, 30, {"drawing": 3}) == 28.0  # the cost of drawing is not known yet
    ticks = iter([0.0, 5.0, 5.0, 12.0])
    monkeypatch.setattr("trainer.reporting.clock.time.monotonic", lambda: next(ticks))
    for _ in range(2):
        with one.aside("drawing"):
            pass
    assert one.left(2, 30, {"drawing": 3}) == 28.0 + 3 * 6.0


def test_a_summary_has_the_time_of_everything(finished):
    summary = summary_of(finished("run"))
    assert summary["wall_seconds"] > summary["seconds"] > 0
    assert summary["pictures"] == 16


def test_a_finished_run_that_is_resumed_says_so_and_keeps_its_numbers(finished, composed, caplog):
    folder = finished("run")
    before = summary_of(folder)
    caplog.set_level(logging.INFO)
    run(composed(*QUICK, f"resume={folder}"), folder)
    assert "already at step 4 of 4: nothing to train" in caplog.text
    after = summary_of(folder)
    assert before["peak_training_bytes"] > 0
    assert {k: v for k, v in after.items() if k != "overrides"} == {
        k: v for k, v in before.items() if k != "overrides"
    }


def test_a_finished_run_that_is_resumed_has_every_row_once(quick, finished):
    folder = finished("run")
    before = deterministic(folder)
    assert deterministic(quick("run", f"resume={folder}")) == before


def test_what_a_run_has_counted_goes_on_when_it_is_resumed(finished, composed, monkeypatch):
    folder = finished("run", "schedule=constant")
    saved = checkpoint.load(folder / "checkpoints/step-000004").counters
    assert saved["peaks"]["training"] == summary_of(folder)["peak_training_bytes"]
    peak = 1 << 50
    load = checkpoint.load

    def with_peak(path):
        found = load(path)
        found.counters["peaks"]["training"] = peak
        found.counters["clock"]["wall_seconds"] = 1e6
        return found

    monkeypatch.setattr(checkpoint, "load", with_peak)
    run(composed(*QUICK, "schedule=constant", *LONGER, f"resume={folder}"), folder)
    summary = summary_of(folder)
    assert summary["peak_training_bytes"] == summary["peak_memory_bytes"] == peak
    assert summary["wall_seconds"] > 1e6
    assert summary["pictures"] == 24


def test_a_run_that_becomes_longer_has_the_time_of_its_former_end(finished, composed):
    """A checkpoint's clock stops before the evaluation, the export and the drawing after it."""
    folder = finished("run", "schedule=constant")
    report.write_summary(folder, summary_of(folder) | {"wall_seconds": 1e6})
    run(composed(*QUICK, "schedule=constant", *LONGER, f"resume={folder}"), folder)
    assert summary_of(folder)["wall_seconds"] > 1e6


def test_peaks_of_earlier_sessions_count():
    peaks = Peaks(torch.device("cpu"))
    peaks.load_state_dict({"training": 1 << 50, "rest": 1 << 51})
    peaks.end("training")
    peaks.end("rest")
    assert (peaks.training, peaks.run) == (1 << 50, 1 << 51)


@pytest.fixture
def trained_on(monkeypatch):
    """The drawn batches by number."""
    drawn, original = {}, BatchPlan.batch

    def noting(self, seed, number):
        drawn[number] = original(self, seed, number)
        return drawn[number]

    monkeypatch.setattr(BatchPlan, "batch", noting)
    return drawn


@pytest.mark.parametrize(
    ("change", "size", "number"),
    [
        ("data.batch_size=8", 8, 2),
        ("data.batch_size=2", 2, 8),
        ("runtime.accumulation=3", 12, 4),
    ],
)
def test_changed_batches_go_on_with_the_pictures_that_come_next(
    quick, composed, trained_on, change, size, number
):
    """After 4 batches of 4 from 24 pictures, the same endless sequence goes on from the 17th."""
    options = ["schedule=constant", "log.every=1"]
    folder = quick("run", *options)
    order = list(itertools.chain(*(trained_on[n] for n in range(4))))
    trained_on.clear()
    run(composed(*QUICK, *options, change, *LONGER, f"resume={folder}"), folder)
    assert min(trained_on) == number
    first_epoch = order + list(itertools.chain(*(trained_on[n] for n in sorted(trained_on))))[:8]
    assert len(set(first_epoch)) == len(first_epoch) == 16 + min(2 * size, 8)
    written = [row for row in rows(folder) if "train/epoch" in row]
    assert [row["train/epoch"] for row in written] == pytest.approx(
        [n * 4 / 24 for n in (1, 2, 3, 4)] + [(16 + n * size) / 24 for n in (1, 2)]
    )
    assert summary_of(folder)["pictures"] == 16 + 2 * size


def test_fewer_steps_than_are_done_are_refused(finished, command):
    folder = finished("run")
    status, _, err = command(*QUICK, "schedule.steps=3", f"resume={folder}")
    assert status == 2
    assert "schedule.steps=3, and the checkpoint is at 4" in err


def test_losses_at_other_points_are_not_compared(quick, composed, caplog):
    caplog.set_level(logging.INFO)
    folder = quick("run")
    assert "of what it was" in caplog.text
    caplog.clear()
    run(composed(*QUICK, *LONGER, "log.eval_points=5", f"resume={folder}"), folder)
    assert "log.eval_points changed, so eval/loss is no longer comparable" in caplog.text
    assert "of what it was" not in caplog.text
    assert summary_of(folder)["eval_loss_before"] is None


@pytest.mark.parametrize(
    ("option", "before"),
    [
        (None, None),
        ("log.eval_points", 5),
        ("model.quantization", "int8"),
        ("noise.prediction", "epsilon"),
        ("noise.zero_terminal_snr", True),
        ("the data", "others"),
        ("the model", "another"),
    ],
)
def test_what_changes_the_measure_of_a_loss_drops_that_of_before(composed, caplog, option, before):
    config = composed("log.eval_points=6", "noise.prediction=v_prediction")
    there = asdict(config) | {"the data": "data", "the model": "model"}
    *group, key = option.split(".") if option else ["unknown"]
    (there[group[0]] if group else there)[key] = before
    resumed = SimpleNamespace(
        config=there,
        losses_before={"loss": 2.0},
        data=there["the data"],
        model=there["the model"],
    )
    drop_other_measure(resumed, config, "model", "data")
    assert (not resumed.losses_before) == (option is not None)
    assert (f"{option} changed" in caplog.text) == (option is not None)


NUMBERS = {
    **{"steps": 8, "seconds": 2.0, "wall_seconds": 9.0, "images_per_second": 4.0},
    **{"optimizer_state_bytes": 1, "peak_memory_bytes": 2, "peak_training_bytes": 1},
    **{"eval_loss_before": 2.0, "eval_loss_after": 0.5, "skipped_steps": 0},
    "rollbacks": None,
    **{"prediction_before": "epsilon", "prediction": "epsilon"},
}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "eval/loss   2.0000 -> 0.5000 (25% of what it was)"),
        ({"eval_loss_after": math.nan}, "eval/loss   2.0000 -> nan"),
        ({"eval_loss_before": math.nan}, "eval/loss   0.5000"),
        ({"skipped_steps": 7}, "skipped     7 of 8 steps, without a finite loss and gradient"),
        ({"ema_loss_after": 0.25}, "averaged    0.2500"),
    ],
)
def test_the_closing_lines_say_what_there_is(changed, line):
    assert line in closing_lines(NUMBERS | changed, {}).splitlines()


def test_nothing_is_said_of_what_there_is_not():
    assert len(closing_lines(NUMBERS, {}).splitlines()) == 2


def test_a_peak_that_nobody_knows_is_left_out():
    said = closing_lines(NUMBERS | {"peak_training_bytes": None}, {})
    assert "peak memory 2 B in total" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0:00"), (83.4, "1:23"), (3599.4, "59:59"), (3599.6, "1:00:00"), (12799, "3:33:19")],
)
def test_a_time_of_an_hour_or_more_has_hours(seconds, said):
    assert console.duration(seconds) == said


def test_what_takes_long_between_steps_is_told(caplog, monkeypatch, capsys):
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr("trainer.system.console.time.monotonic", lambda: now[0])
    with console.Aside("drawing", 4, "pictures") as aside:
        for seconds in (10, 25, 10, 20):
            now[0] += seconds
            aside.advance(1)
    assert [record.getMessage() for record in caplog.records] == [
        "drawing: 4 pictures",
        "drawing: 2 of 4 pictures, ETA 0:35",
        "drawing: 4 of 4 pictures, ETA 0:00",
    ]
