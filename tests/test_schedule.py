"""Learning-rate schedules: pure functions of the optimizer's step."""

from itertools import pairwise

import pytest
import torch

from trainer.schedule import lr_scale

CHOICES = ["constant", "linear", "cosine", "polynomial", "cosine_restarts", "wsd"]


@pytest.mark.parametrize(
    ("choice", "step", "scale"),
    [
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 99, 1.0),
        ("linear", 49, 1.0),
        ("linear", 99, 0.1),
        ("linear", 74, 0.1 + 0.9 * (1 - 24 / 49)),
        ("cosine", 50, 1.0),
        ("cosine", 99, 0.1),
        ("polynomial", 50, 1.0),
        ("polynomial", 74, 0.1 + 0.9 * (25 / 49) ** 2),
        ("polynomial", 99, 0.1),
        ("cosine_restarts", 50, 1.0),
        ("cosine_restarts", 99, 0.1),
    ],
)
def test_learning_rate_warms_up_holds_and_decays(schedule_config, choice, step, scale):
    decay = {} if choice == "constant" else {"hold": 0.5, "final_scale": 0.1}
    made = schedule_config(choice, steps=100, warmup_steps=1, **decay)
    assert lr_scale(made, step) == pytest.approx(scale)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_schedule_warms_up_peaks_at_one_and_ends_where_it_says(schedule_config, choice):
    made = schedule_config(choice, steps=60, warmup_steps=7)
    scales = [lr_scale(made, step) for step in range(60)]
    assert scales[:7] == [(step + 1) / 8 for step in range(7)]
    assert max(scales) == scales[7] == 1
    assert min(scales) >= 0
    final = getattr(made, "final_scale", 1.0)
    assert scales[-1] == pytest.approx(final)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_runs_of_a_few_steps_have_a_rate(schedule_config, choice, steps):
    for warmup in range(steps + 1):
        made = schedule_config(choice, steps=steps, warmup_steps=warmup)
        assert all(0 <= lr_scale(made, step) <= 1 for step in range(steps))
        assert lr_scale(made, 0) > 0


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)]
)
def test_wsd_stays_until_its_share_of_decay_begins(schedule_config, shape, middle):
    made = schedule_config("wsd", steps=101, warmup_steps=10, decay=0.2, shape=shape)
    scales = [lr_scale(made, step) for step in range(101)]
    assert set(scales[10:82]) == {1.0}
    assert scales[-1] == pytest.approx(0)
    decay = scales[81:]
    assert all(a > b for a, b in pairwise(decay))
    made.steps = 1001  # so that a step lies in the middle
    begin = round(0.8 * 1001)
    assert lr_scale(made, (begin + 1000) // 2) == pytest.approx(middle, abs=0.01)


def test_a_wsd_run_that_is_made_longer_has_stayed_where_it_was(schedule_config):
    """What the schedule is for: the stable part does not depend on the run's length."""
    short, long = (schedule_config("wsd", steps=steps, warmup_steps=5) for steps in (100, 1000))
    assert [lr_scale(short, s) for s in range(80)] == [lr_scale(long, s) for s in range(80)]


def test_restarts_are_those_of_torch(schedule_config):
    """CosineAnnealingWarmRestarts, with cycles of a length that divides the run's."""
    # The last step is the end of the third cycle of 30.
    options = {"steps": 91, "warmup_steps": 0, "final_scale": 0.0, "cycles": 3}
    made = schedule_config("cosine_restarts", **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 30)
    for step in range(90):
        assert lr_scale(made, step) == pytest.approx(peer.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        peer.step()
    assert lr_scale(made, 90) == pytest.approx(0)


def test_a_power_of_one_is_linear(schedule_config):
    options = {"hold": 0.3, "final_scale": 0.1}
    linear = schedule_config("linear", **options)
    made = schedule_config("polynomial", power=1.0, **options)
    assert all(lr_scale(made, s) == pytest.approx(lr_scale(linear, s)) for s in range(550))
