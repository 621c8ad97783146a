"""Steps whose loss or gradient is not finite: what they change, and when they stop a run."""

import json
import math
import re

import pytest
import torch
from helpers import QUICK, assert_same_weights, poisoned_from, rows, weights

import trainer.run
from trainer.errors import UserError
from trainer.objective import losses
from trainer.run import run
from trainer.storage import checkpoint
from trainer.training import guard, method
from trainer.training.gradients import Outcome


def steps_saved(folder):
    """The steps that have a checkpoint."""
    return [int(path.name[5:]) for path in checkpoint.completed(folder / "checkpoints")]


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
        trained = method.saved_tensors(state.model)
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


def test_a_run_that_only_skips_stops_with_the_reason(composed, tmp_path, monkeypatch):
    original = losses.loss
    monkeypatch.setattr(losses, "loss", lambda *a: original(*a) * float("inf"))
    says = "3 steps in a row without a finite loss.*No step succeeded, and there is no checkpoint"
    with pytest.raises(ValueError, match=says):
        run(composed(*QUICK, "runtime.max_skipped_steps=2"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_what_was_learned_before_a_run_only_skips_is_saved_and_nothing_is_deleted_for_it(
    quick, tmp_path, monkeypatch
):
    """The run can also be resumed from there, with more skipped steps allowed."""
    options = ["runtime.save_every=1", "runtime.keep_checkpoints=1", "log.eval_points=1"]
    original = losses.loss

    def failing():
        """The losses of steps 3 and 4 are not finite."""
        calls = []
        return lambda *a: original(*a) * (calls.append(a) or (1 if len(calls) < 3 else math.inf))

    monkeypatch.setattr(losses, "loss", failing())
    says = r"^1 step without a finite loss.* good step was 2; .* resume=\S*/run/.*/step-000001 "
    with pytest.raises(UserError, match=says):
        quick("run", *options, "runtime.max_skipped_steps=0")
    assert steps_saved(tmp_path / "run") == [1, 2]  # 1 is known to be good because step 2 was whole
    monkeypatch.setattr(losses, "loss", failing())
    whole = quick("whole", *options)
    monkeypatch.setattr(losses, "loss", lambda *a: original(*a) * math.inf)
    quick("run", *options, f"resume={tmp_path / 'run'}")
    assert_same_weights(weights(tmp_path / "run", 4), weights(whole, 4))


@pytest.mark.parametrize(("keep", "left"), [(1, [6, 9]), (2, [3, 6, 9])])
def test_steps_that_are_skipped_push_no_checkpoint_away(quick, tmp_path, monkeypatch, keep, left):
    """Steps 8 and 9 of 9 are skipped: step 9's checkpoint may hold weights that step 7 ruined."""
    monkeypatch.setattr(losses, "loss", poisoned_from(8))
    options = [f"runtime.keep_checkpoints={keep}", "runtime.max_skipped_steps=1"]
    with pytest.raises(UserError, match=r"last good step was 7; .*resume=\S*/step-000006 "):
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
    assert seen == [[], [1], [1], [1, 2], [2], [2]]  # before and after saving at each step


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
        r"^unet\.conv_in\.weight is not finite since step 3, .*; lower optim\.lr\. The last good "
        r"step was 3; resume from the checkpoint before it: resume=\S*/step-000002 "
    )
    options = [*options, "method.clip=rms", "schedule.steps=40"]
    with pytest.raises(UserError, match=says):
        quick("run", "runtime.save_every=1", "runtime.keep_checkpoints=1", *options)
    said = (tmp_path / "run/train.log").read_text()
    assert re.search(r"no checkpoint at step 3: unet\.\S+ is not finite; training continues", said)
    assert said.count("skipped") == 1
    assert steps_saved(tmp_path / "run") == [2]


def test_a_step_that_was_made_in_part_is_the_last_update_and_not_the_last_whole_step():
    judge = guard.Guard(max_in_a_row=9)
    assert judge.accepts(1, Outcome(loss=0.5, grad_norm=2.0, partially_applied=False))
    assert judge.accepts(2, Outcome(loss=0.5, grad_norm=math.nan, partially_applied=True))
    assert (judge.last_whole, judge.last_update) == (1, 2)
    bad = Outcome(loss=math.nan, grad_norm=math.nan, partially_applied=False)
    assert not judge.accepts(3, bad)
    assert (judge.last_whole, judge.last_update) == (1, 2)


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
