"""The remarks below a sweep's table: what its comparison does not show, and why."""

import pytest
from test_sweep import NUMBERS, RATES, column, configured, held_out, sweep_of

from trainer.sweep import sweep_table


def test_runs_that_diverged_or_made_the_model_worse_are_told():
    runs = held_out(a=(0.9, 0.9), b=(7.0, 7.0))
    assert "diverged" not in sweep_table(runs[:1])
    assert "worse than" not in sweep_table(runs[:1])
    assert "worse than" not in sweep_table(held_out(a=(1.0001, 0.9)))  # it has hardly moved
    assert "- rollbacks: " not in sweep_table(runs)
    runs[1] |= {"diverged": True, "rollbacks": 3}
    text = sweep_table(runs)
    assert column(text, "run", "rollbacks") == {"optim=a": "", "optim=b": "3"}
    assert "- rollbacks: how often a run went back to a checkpoint, " in text
    assert column(text, "run", "diverged") == {"optim=a": "", "optim=b": "1"}
    assert "first step, by eval: optim=b (1.0000, then 7.0000); lower their rates" in text


@pytest.mark.parametrize(("other", "differs"), [(1.001, False), (2.0, True), (None, False)])
def test_losses_of_other_points_are_said_not_to_rank_the_runs(other, differs):
    runs = [
        NUMBERS | {"overrides": [name], "eval_loss_after": 0.5, "eval_loss_before": before}
        for name, before in (("a", 1.0), ("b", other))
    ]
    assert ("- eval before differs" in sweep_table(runs)) == differs


REMARKS = {
    "rates": RATES,
    "tied": "not shown to differ from the best, optim=a: optim=b (",
    "picked": "is the best of those tried (up to 2) on the seeds that are reported",
    "few": "a spread over 2 seeds",
    "chance": "one seed does not show how much is chance",
    "memory": "shared a process on a CPU",
    "trained": "eval is on training pictures, so",
    "holdout": "held out on others",
}


@pytest.mark.parametrize(
    ("losses", "more", "said"),
    [
        ({"a": [0.1], "b": [0.2]}, {}, {"rates", "chance", "trained"}),
        ({"a": [0.1, 0.11, 0.12], "b": [0.2, 0.21, 0.22]}, {}, {"rates", "trained"}),
        # Overlapping spreads with equal ratios; and the other way round.
        ({"a": [0.1, 0.3, 0.2], "b": [0.15, 0.45, 0.3]}, {}, {"rates", "trained"}),
        ({"a": [0.1, 0.1, 0.1], "b": [0.11, 0.2, 0.3]}, {}, {"rates", "tied", "trained"}),
        ({"a": [0.1, 0.11], "b": [0.2, 0.21]}, {}, {"rates", "few", "trained"}),
        ({("a", 0.1): [0.1], ("a", 0.2): [0.2]}, {}, {"chance", "picked", "trained"}),
        # Each optimizer is compared at its best rate.
        (
            {("a", 0.1): [0.1, 0.11, 0.12], ("a", 0.2): [0.11] * 3, ("b", 0.1): [0.3] * 3},
            {},
            {"picked", "trained"},
        ),
        ({"a": [0.1]}, {"holdout_loss_after": 0.2}, {"holdout"}),
        ({"a": [0.1]}, {"on_cpu": True, "runs_before_in_process": 1}, {"trained", "memory"}),
        ({"a": [0.1]}, {"on_cpu": False, "runs_before_in_process": 1}, {"trained"}),
    ],
)
def test_what_a_comparison_does_not_show_is_said(losses, more, said):
    text = sweep_table(sweep_of(losses, **more))
    assert {name for name, remark in REMARKS.items() if remark in text} == said


@pytest.mark.parametrize(("slower", "said"), [(1.1, False), (2.0, True)])
def test_speeds_of_a_busy_machine_are_said_not_to_be_compared(slower, said):
    runs = sweep_of({"a": [0.1, 0.11, 0.12], "b": [0.2, 0.21, 0.22]})
    runs[1]["seconds_per_step"] *= slower
    text = sweep_table(runs)
    assert (f"s/step of optim=a is {slower:.1f} times as much" in text) == said


@pytest.mark.parametrize(
    ("spent", "other", "said"),
    [(0.2, {}, False), (0.01, {}, True), (None, {}, False), (0.01, {"device": "other"}, False)],
)
def test_what_takes_longer_beside_the_optimizer_is_the_machines_load(spent, other, said):
    runs = sweep_of({"a": [0.1], "b": [0.2]})
    runs[0] |= {"seconds_per_step": 0.11, "optimizer_seconds_per_step": 0.01}
    runs[1] |= {"seconds_per_step": 0.3, "optimizer_seconds_per_step": spent} | other
    text = sweep_table(runs)
    told = "without the optimizer, a step of optim=b took 0.290 s and one of optim=a 0.100 s"
    assert (told in text) == said


def test_the_extra_backward_pass_of_an_optimizer_is_no_load_of_the_machine():
    runs = [
        configured([f"optim.hessian_every={every}"], loss=0.1 * every, rate=every)
        | {"seconds_per_step": seconds, "optimizer_seconds_per_step": 0.01}
        for every, seconds in ((1, 0.3), (10, 0.1))
    ]
    assert "without the optimizer" in sweep_table(runs)
    for run, every in zip(runs, (1, 10), strict=True):
        run["config"]["optim"]["hessian_every"] = every
    assert "without the optimizer" not in sweep_table(runs)


def test_of_many_rows_that_may_be_equal_those_that_are_not_are_named():
    losses = {str(row): [0.1 + 0.001 * row, 0.11, 0.12] for row in range(10)} | {"z": [0.9] * 3}
    text = sweep_table(sweep_of(losses))
    assert "not shown to differ from the best, optim=0: 9 of 10, all but optim=z (" in text
    losses.pop("z")
    assert "not shown to differ from the best, optim=0: 9 of 9 (the" in sweep_table(
        sweep_of(losses)
    )


def test_runs_on_several_devices_are_said_to_be():
    runs = sweep_of({"a": [0.1], "b": [0.2], "c": [0.3]})
    for run, device in zip(runs, ("X", "X", "Y"), strict=True):
        run["device"] = device
    assert "on several devices (2 on X, 1 on Y)" in sweep_table(runs)
    assert "several devices" not in sweep_table(runs[:2])


@pytest.mark.parametrize(
    ("quartiles", "said"), [([0.1, 0.12], False), ([0.1, 0.2], True), (None, False)]
)
def test_a_run_whose_own_steps_took_different_times_is_named(quartiles, said):
    runs = sweep_of({"a": [0.1], "b": [0.2]})
    runs[1]["seconds_per_step_quartiles"] = quartiles
    assert ("several shapes: optim=b (0.100 to 0.200)" in sweep_table(runs)) == said


def test_of_many_runs_with_uneven_steps_the_worst_are_named():
    runs = sweep_of({name: [0.1] for name in "abcde"})
    for place, run in enumerate(runs):
        run["seconds_per_step_quartiles"] = [0.1, 0.2 + place / 10]
    named = "optim=e (0.100 to 0.600), optim=d (0.100 to 0.500), optim=c (0.100 to 0.400)"
    assert f"several shapes: {named} and 2 others" in sweep_table(runs)
