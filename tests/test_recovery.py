"""A run that diverges, or whose steps are not finite, goes back to a checkpoint
(`runtime.on_divergence=rollback`), or stops."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import QUICK, assert_same_weights, deterministic, poisoned_from, rows, weights
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.objective import losses
from trainer.phases import evaluation, recovery, stepping
from trainer.reporting import watch
from trainer.run import run
from trainer.storage import checkpoint
from trainer.storage.steps import completed, step_name, step_of
from trainer.system import processes
from trainer.training import method

ROLLBACK = (
    *("schedule.steps=20", "schedule=constant", "data.batch_size=2", "method.export=[]"),
    *("optim=adamw", "runtime.save_every=4", "runtime.on_divergence=rollback"),
)


@pytest.fixture
def after_step(monkeypatch):
    """after_step(action): call it with the state after each step."""

    def register(action):
        original = stepping.take

        def take(state, measures=False):
            values = original(state, measures)
            action(state)
            return values

        monkeypatch.setattr(stepping, "take", take)

    return register


@pytest.fixture
def ruined(after_step, monkeypatch):
    """ruined(9, ...): such steps, once each, also multiply all weights.  Means are of so few steps
    that a run of a few seconds has them."""
    monkeypatch.setattr(watch, "WINDOW", 8)
    monkeypatch.setattr(watch, "_SHORT", 5)

    def at(*steps):
        left = {*steps}

        def ruin(state):
            if state.step in left:
                left.remove(state.step)
                with torch.no_grad():
                    for weight in method.trained_parameters(state.model).values():
                        weight.mul_(3)

        after_step(ruin)

    return at


@pytest.fixture
def three_infinite(monkeypatch):
    """The losses of steps 6, 7 and 8 are not finite."""
    original, calls = losses.loss, []

    def loss(*arguments):
        calls.append(arguments)
        return original(*arguments) * (math.inf if 6 <= len(calls) < 9 else 1)

    monkeypatch.setattr(losses, "loss", loss)


def went_back(folder):
    """(step, step of the checkpoint) of each rollback in a run's log."""
    log = (folder / "train.log").read_text()
    found = re.findall(r"step (\d+): .* are those of step-(\d+) again.*\(rollback", log)
    return [(int(step), int(saved)) for step, saved in found]


def optimizer_of(folder, step):
    path = folder / f"checkpoints/step-{step:06d}/optimizer.pt"
    return torch.load(path, weights_only=True)["state"]


def averages(folder, step):
    return load_file(folder / f"checkpoints/step-{step:06d}/average.safetensors")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_rollback_restores_all_but_the_step_and_resuming_from_it_gives_the_same_bits(
    composed, tmp_path, quick, ruined
):
    """Checkpoints of the time of the divergence are deleted."""
    ruined(13)
    options = [
        *(*ROLLBACK, "runtime.save_every=2", "runtime.keep_checkpoints=99", "ema=bf16"),
        *("optim=adafactor8bit", "runtime.fused_backward=true", "method.clip=lagged"),
        "model.dtype=bfloat16",
    ]
    whole = quick("whole", *options)
    ((step, saved),) = went_back(whole)
    assert 4 <= saved <= 13 < step
    assert [s for s in map(step_of, completed(whole / "checkpoints")) if s >= saved][:2] == [
        saved,
        step,
    ]
    assert_same_weights(weights(whole, saved), weights(whole, step))
    assert_same_weights(averages(whole, saved), averages(whole, step))
    then, now = optimizer_of(whole, saved), optimizer_of(whole, step)
    assert all(torch.equal(then[i][key], now[i][key]) for i in then for key in then[i])
    rate = {row["step"]: row["train/lr"] for row in rows(whole) if "train/lr" in row}
    assert rate[step + 1] == rate[step] / 2
    found = summary_of(whole)
    assert (found["rollbacks"], found["diverged"], found["steps"]) == (1, False, 20)
    assert found["eval_loss_after"] < found["eval_loss_before"]

    at = f"resume={whole}/checkpoints/step-{step:06d}"
    run(composed(*QUICK, *options, at), tmp_path / "rest")
    said = (tmp_path / "rest/train.log").read_text()
    assert "after 1 of 3 rollbacks: trains at 0.5 times the schedule's learning rate" in said
    assert_same_weights(weights(whole, 20), weights(tmp_path / "rest", 20))
    last = [
        [row for row in deterministic(folder) if row["step"] > step]
        for folder in (whole, tmp_path / "rest")
    ]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    "loss",
    [
        ["loss=huber", "loss.delta=0.01"],
        ["loss.weighting=min_snr", "loss.gamma=0.01"],
        ["loss.weighting=debiased"],
    ],
)
def test_a_divergence_is_noticed_whatever_the_loss(quick, ruined, loss):
    ruined(13)
    assert went_back(quick("run", *ROLLBACK, *loss, "schedule.steps=18"))


def test_a_run_that_is_killed_after_a_rollback_loses_nothing_that_was_due(
    composed, tmp_path, quick, ruined, monkeypatch
):
    """In the evaluation of that step, before the checkpoint."""
    options = [*ROLLBACK, "log.eval_every=2", "schedule.steps=16"]
    ruined(13)
    whole = quick("whole", *options)
    ((step, _),) = went_back(whole)

    def killed(state, writer):
        if state.step == step:
            raise KeyboardInterrupt
        return evaluate(state, writer)

    evaluate = evaluation.evaluate
    ruined(13)
    monkeypatch.setattr(evaluation, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        quick("killed", *options)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    ruined(13)
    folder = tmp_path / "killed"
    run(composed(*QUICK, *options, f"resume={folder}"), folder)
    assert deterministic(folder) == deterministic(whole)
    assert_same_weights(weights(folder, 16), weights(whole, 16))


@pytest.mark.parametrize("after", [1, 2])
def test_a_second_divergence_goes_back_at_most_to_the_first_rollback(quick, ruined, after):
    """Its checkpoint has the weights of the one before, which went well until then."""
    ruined(13, 14 + after)
    options = ["runtime.save_every=2", "schedule.steps=32"]
    (first, _), (_, second) = went_back(quick("run", *ROLLBACK, *options))
    assert first == 14
    assert first <= second < 14 + after


def test_one_kept_checkpoint_is_enough_to_go_back(quick, ruined):
    ruined(13)
    options = ["runtime.save_every=2", "runtime.keep_checkpoints=1", "schedule.steps=16"]
    assert went_back(quick("run", *ROLLBACK, *options))


@pytest.mark.parametrize(("keep", "every"), [(1, 1), (1, 10), (2, 20), (2, 49), (1, 60)])
def test_a_checkpoint_to_go_back_to_is_never_long_ago(tmp_path, keep, every):
    """One that fewer than the 50 steps until the next have followed is proven only later."""
    for step in range(every, 400, every):
        (tmp_path / step_name(step)).mkdir()
        proven = step - watch.WINDOW
        checkpoint.rotate(tmp_path, keep, proven)
        steps = [step_of(path) for path in completed(tmp_path)]
        assert len(steps) <= keep + 2
        assert proven - 2 * watch.WINDOW < max((s for s in steps if s <= proven), default=every)


def test_a_run_that_only_skips_steps_goes_back(quick, three_infinite):
    folder = quick("run", *ROLLBACK, "runtime.max_skipped_steps=2", "schedule.steps=10")
    assert went_back(folder) == [(8, 4)]
    said = (folder / "train.log").read_text()
    assert "3 steps in a row without a finite loss and gradient; weights and optimizer" in said
    assert summary_of(folder)["skipped_steps"] == 3
    assert "\nrollbacks   1, to a checkpoint (train.log says why)\n" in said


def test_weights_that_are_not_finite_are_restored(quick, after_step):
    def ruin(state):
        if state.step == 5 and not state.guard.rollbacks:
            next(iter(method.trained_parameters(state.model).values())).data.fill_(math.nan)

    after_step(ruin)
    folder = quick("run", *ROLLBACK, "schedule.steps=8")
    assert went_back(folder) == [(6, 4)]
    assert "weight is not finite since step 5; weights and" in (folder / "train.log").read_text()


def test_after_the_last_rollback_a_run_stops_and_names_a_checkpoint(composed, tmp_path, ruined):
    ruined(9, *range(14, 20))
    options = [*QUICK, *ROLLBACK, "runtime.save_every=2", "runtime.max_rollbacks=1"]
    with pytest.raises(UserError, match=r"diverges again, after 1 rollback; .*resume=.*/step-0000"):
        run(composed(*options, "schedule.steps=60"), tmp_path / "run")


@pytest.mark.parametrize("keep", [1, 9])
def test_a_run_that_is_to_stop_names_a_checkpoint_from_before_the_divergence(
    composed, tmp_path, ruined, keep
):
    ruined(13)
    options = [*QUICK, *ROLLBACK, "runtime.on_divergence=stop", f"runtime.keep_checkpoints={keep}"]
    with pytest.raises(UserError, match=r"the run diverges; lower optim\.lr=") as raised:
        run(composed(*options), tmp_path / "run")
    named = Path(str(raised.value).partition("resume=")[2].split()[0])
    assert named.exists()
    assert step_of(named) <= 13
    assert summary_of(tmp_path / "run")["error"] == str(raised.value)
    assert summary_of(tmp_path / "run")["diverged"]


def test_a_run_that_is_only_warned_keeps_a_checkpoint_from_before_the_divergence(quick, ruined):
    ruined(9)
    options = ["runtime.on_divergence=warn", "runtime.save_every=7", "runtime.keep_checkpoints=1"]
    folder = quick("run", *ROLLBACK, *options, "schedule.steps=24")
    assert (folder / "train.log").read_text().count("the run diverges; stop it") == 1
    assert {7, 24} == {step_of(path) for path in completed(folder / "checkpoints")}


def test_without_a_checkpoint_a_run_that_diverges_starts_again(composed, tmp_path, ruined):
    ruined(3)
    options = [*QUICK, *ROLLBACK, "runtime.save_every=0"]
    with pytest.raises(UserError, match="there is no checkpoint from before it: start again"):
        run(composed(*options), tmp_path / "run")


def test_after_the_last_rollback_steps_that_are_not_finite_end_the_run(
    composed, tmp_path, monkeypatch
):
    monkeypatch.setattr(losses, "loss", poisoned_from(6))
    options = [*QUICK, *ROLLBACK, "runtime.max_skipped_steps=1", "runtime.max_rollbacks=2"]
    with pytest.raises(UserError, match=r"finite loss and gradient, after 2 rollbacks; lower"):
        run(composed(*options), tmp_path / "run")


def test_no_checkpoint_is_deleted_while_another_process_may_read_it(
    quick, three_infinite, monkeypatch
):
    seen = []
    for place, name in ((checkpoint, "load"), (processes, "meet"), (recovery, "delete")):
        call = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, n=name, f=call: seen.append(n) or f(*a))
    options = ["runtime.max_skipped_steps=2", "schedule.steps=8", "runtime.keep_checkpoints=9"]
    assert went_back(quick("run", *ROLLBACK, *options))
    assert seen == ["load", "meet", "delete"]


def test_a_damaged_checkpoint_is_passed_over(quick, three_infinite, after_step):
    def damage(state):
        if state.step == 5:
            (state.checkpoints / "step-000004/weights.safetensors").write_bytes(b"")

    after_step(damage)
    options = ["runtime.save_every=2", "runtime.max_skipped_steps=2", "schedule.steps=9"]
    folder = quick("run", *ROLLBACK, *options)
    assert went_back(folder) == [(8, 2)]
    assert "step-000004 is damaged" in (folder / "train.log").read_text()
