"""What is due between steps, and after which steps."""

from fractions import Fraction

import pytest
from helpers import QUICK, rows

from trainer.errors import UserError
from trainer.objective import losses
from trainer.phases.intervals import EVALUATING, Intervals
from trainer.storage import checkpoint


def steps_saved(folder):
    """The steps of a run's checkpoints."""
    return [checkpoint.step_of(path) for path in checkpoint.completed(folder / "checkpoints")]


@pytest.fixture
def due(composed):
    """-> (the steps of 10 after which to evaluate, evaluations left after 0, 1, ... 10 steps)."""

    def found(every, batches_per_epoch=Fraction(4)):
        config = composed(*QUICK, "schedule.steps=10", f"log.eval_every={every}")
        intervals = Intervals(config, batches_per_epoch)
        steps = [step for step in range(1, 11) if intervals.is_due(EVALUATING, step)]
        return steps, [intervals.left(done)[EVALUATING] for done in range(11)]

    return found


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (0, []),
        (3, [3, 6, 9]),
        (5, [5]),  # after the last step it is done at the end anyway
        (10, []),
        (11, []),
        ("1epoch", [4, 8]),
        ("2 epochs", [8]),
        ("0.5epochs", [2, 4, 6, 8]),
        ("0.1epochs", list(range(1, 10))),
        ("0epochs", []),
        ("'3'", [3, 6, 9]),  # as from an environment variable
    ],
)
def test_an_interval_is_of_steps_or_of_epochs(due, every, steps):
    found, left = due(every)
    assert found == steps
    assert left == [1 + sum(step > done for step in steps) for done in range(11)]


@pytest.mark.parametrize(
    ("batches_per_epoch", "steps"),
    [(Fraction(5, 2), [3, 5, 8]), (Fraction(10, 3), [4, 7]), (Fraction(1, 3), list(range(1, 10)))],
)
def test_an_epoch_that_ends_within_a_step_ends_with_it(due, batches_per_epoch, steps):
    assert due("1epoch", batches_per_epoch)[0] == steps


@pytest.mark.parametrize(
    "wrong", ["-1", "1ep", "epoch", "-1epoch", "1e2epochs", "0.5", "True", "None"]
)
@pytest.mark.parametrize(
    "key", ["log.eval_every", "log.sample_every", "runtime.save_every", "method.export_every"]
)
def test_what_is_no_interval_is_refused_by_its_name(composed, key, wrong):
    with pytest.raises(
        UserError, match=f"^{key}={wrong} is not an interval; use steps .* or epochs"
    ):
        composed(*QUICK, f"{key}={wrong}")


def test_a_run_does_everything_at_the_end_of_an_epoch(quick):
    """24 pictures in batches of 4, two batches per step: 3 steps per epoch."""
    folder = quick(
        *("run", "data.batch_size=4", "runtime.accumulation=2", "schedule.steps=7"),
        *("runtime.keep_checkpoints=9", "runtime.save_every=1epoch", "method.export_every=2epochs"),
        *("log.eval_every=1epoch", "log.eval_points=2", "log.sample_every=1epoch"),
        *("log.sample_count=1", "log.sample_steps=1"),
    )
    assert [row["step"] for row in rows(folder) if "eval/loss" in row] == [0, 3, 6, 7]
    assert steps_saved(folder) == [3, 6, 7]
    assert [path.name for path in (folder / "results").iterdir()] == ["step-000006"]
    drawn = {path.name for path in (folder / "samples").glob("step-*.png")}
    assert drawn == {f"step-{step:06d}.png" for step in (0, 3, 6, 7)}


def test_a_checkpoint_that_is_owed_at_the_end_is_saved_once(quick, monkeypatch):
    original, calls, saved = losses.loss, [], []

    def failing(*arguments):
        calls.append(arguments)
        return original(*arguments) * (float("inf") if len(calls) == 3 else 1.0)

    save = checkpoint.save
    monkeypatch.setattr(losses, "loss", failing)
    monkeypatch.setattr(checkpoint, "save", lambda *a: saved.append(a[1].step) or save(*a))
    quick("run", "runtime.save_every=3", "schedule.steps=4")
    assert saved == [4]


def test_a_checkpoint_that_was_due_after_a_skipped_step_follows_the_next_whole_one(
    quick, monkeypatch
):
    original, calls = losses.loss, []

    def failing(*arguments):
        """The losses of steps 2 and 3 are not finite."""
        calls.append(arguments)
        return original(*arguments) * (float("inf") if len(calls) in (2, 3) else 1.0)

    monkeypatch.setattr(losses, "loss", failing)
    folder = quick("run", "runtime.save_every=2", "schedule.steps=7", "runtime.keep_checkpoints=9")
    assert steps_saved(folder) == [4, 6, 7]
    said = (folder / "train.log").read_text()
    assert (
        said.count("no checkpoint at step 2, which was skipped; one will be saved after the") == 1
    )
