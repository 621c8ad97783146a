"""A sweep's verdict: which optimizer was better, by loss, memory, speed and stability."""

import pytest

from trainer.sweep import verdict
from trainer.sweep.runs import Comparison


def run(name, loss, seed=0, lr=1e-3, **more):
    overrides = [f"optim={name}", f"optim.lr={lr}", f"seed={seed}"]
    known = {"optimizer_state_bytes": 1000, "seconds_per_step": 0.1, "skipped_steps": 0}
    known |= {"overrides": overrides, "optimizer": name, "seed": seed, "lr": lr}
    return known | {"eval_loss_after": loss} | more


def said(*runs):
    return {line.partition(":")[0]: line for line in verdict.of_runs(Comparison(runs))}


def test_the_best_rate_of_each_optimizer_counts_and_what_is_not_shown_is_said():
    lines = said(
        *(run("a", loss, seed, lr) for lr in (1e-3, 1e-2) for seed, loss in enumerate((5, 5.1, 5))),
        *(run("a", loss, seed, 3e-3) for seed, loss in enumerate((1.0, 1.01, 1.02))),
        *(run("b", loss, seed, 1e-4) for seed, loss in enumerate((1.01, 1.0, 1.03))),
        *(run("c", loss, seed) for seed, loss in enumerate((2.0, 2.01, 2.02))),
    )
    assert lines["quality"] == (
        "quality: the lowest loss (eval after) is that of `optim=a optim.lr=0.003`, "
        "1.0100 ± 0.0100 over 3 seeds; 1 of 2 others are shown to be worse, not so "
        "`optim=b optim.lr=0.0001`"
    )


def test_losses_of_different_predictions_are_not_compared():
    lines = said(run("a", 0.1, prediction="epsilon"), run("b", 0.2, prediction="flow_prediction"))
    assert lines["quality"].startswith("quality: not compared, as losses of epsilon and flow_pred")
    same = said(run("a", 0.1, prediction="epsilon"), run("b", 0.2, prediction="epsilon"))
    assert same["quality"].startswith("quality: the lowest loss")


def test_the_least_memory_and_time_are_told_with_those_of_the_best():
    lines = said(
        run("a", 1.0),
        run("b", 2.0, optimizer_state_bytes=10),
        run("c", 3.0, seconds_per_step=0.05),
    )
    assert lines["memory"].endswith("that of `optim=b`, 10 B (`optim=a`: 1.0 kB)")
    assert "memory" not in said(run("a", 1.0), run("b", 2.0))  # the same
    assert lines["speed"].endswith("that of `optim=c`, 0.050 s (`optim=a`: 0.100 s)")
    assert said(run("a", 1.0), run("b", 2.0, seconds_per_step=0.105))["speed"] == (
        "speed: alike, 0.100 to 0.105 s/step"
    )


@pytest.mark.parametrize(
    "of_b",
    [
        {"optimizer_seconds_per_step": 0.001},  # so the rest took twice the time
        {"optimizer_seconds_per_step": 0.1, "device": "Y"},
    ],
    ids=["other load", "several devices"],
)
def test_no_optimizer_is_the_fastest_where_a_remark_says_that_speeds_are_not_comparable(of_b):
    a = run("a", 1.0, device="X", optimizer_seconds_per_step=0.001)
    b = run("b", 2.0, seconds_per_step=0.2, **{"device": "X"} | of_b)
    assert said(a, b)["speed"] == "speed: not comparable, for the reason among the remarks"


@pytest.mark.parametrize(("second", "shown"), [(2.0, ""), (1.01, "not ")])
def test_a_single_other_is_told_without_counting(second, shown):
    noise = (0.0, 0.02, -0.01)
    runs = [run("a", 1.0 + x, seed) for seed, x in enumerate(noise)]
    runs += [run("b", second - x, seed) for seed, x in enumerate(noise)]
    assert said(*runs)["quality"].endswith(f"; the other is {shown}shown to be worse")


def test_runs_that_failed_diverged_went_back_or_skipped_steps_are_counted_at_all_rates():
    lines = said(
        run("a", 1.0),
        run("a", 9.0, lr=1.0, diverged=True),
        run("a", None, lr=2.0, error="no"),
        run("b", 2.0, skipped_steps=3),
        run("c", 3.0, rollbacks=2),
        run("d", 4.0),
    )
    assert lines["stability"] == (
        "stability: not all runs went well of `optim=a` (of 3 runs: 1 failed, 1 diverged), "
        "`optim=b` (of 1 run: 1 with skipped steps), `optim=c` (of 1 run: 1 with rollbacks)"
    )
    assert said(run("a", 1.0), run("b", 2.0))["stability"] == (
        "stability: every run ended well; none diverged or skipped a step"
    )


@pytest.mark.parametrize("others", [[], [run("b", None, error="no")]], ids=len)
def test_there_is_no_verdict_without_two_to_compare(others):
    assert not said(run("a", 1.0), *others)


def test_what_not_all_runs_have_measured_is_not_judged():
    lines = said(run("a", 1.0), run("b", 2.0, seconds_per_step=None, optimizer_state_bytes=None))
    assert {*lines} == {"quality", "stability"}
