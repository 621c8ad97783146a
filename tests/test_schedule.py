"""Learning-rate schedules, as pure functions of the optimizer's step."""

from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from trainer.config import choices_of
from trainer.errors import UserError
from trainer.training.schedule import lr_scale, settled

CHOICES = choices_of("schedule")


@pytest.mark.parametrize(
    ("choice", "step", "scale"),
    [
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 99, 1.0),
        ("linear", 49, 1.0),
        ("linear", 50, 1.0),
        ("linear", 75, 0.1 + 0.9 * 25 / 50),
        ("linear", 99, 0.1 + 0.9 / 50),
        ("cosine", 50, 1.0),
        ("cosine", 75, 0.1 + 0.9 / 2),
        ("polynomial", 50, 1.0),
        ("polynomial", 75, 0.1 + 0.9 / 4),
        ("cosine_restarts", 50, 1.0),
        ("cosine_restarts", 75, 0.1 + 0.9 / 2),
    ],
)
def test_learning_rate_warms_up_holds_and_decays(schedule_config, choice, step, scale):
    decay = {} if choice == "constant" else {"hold": 0.5, "final_scale": 0.1}
    made = schedule_config(choice, steps=100, warmup_steps=1, **decay)
    assert lr_scale(made, step) == pytest.approx(scale)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_schedule_warms_up_peaks_at_one_and_makes_no_step_for_nothing(
    schedule_config, choice
):
    made = schedule_config(choice, steps=60, warmup_steps=7)
    scales = [lr_scale(made, step) for step in range(60)]
    assert scales[:7] == [(step + 1) / 8 for step in range(7)]
    assert max(scales) == scales[7] == 1
    assert min(scales) > 0
    assert scales[-1] == 1 if choice == "constant" else scales[-1] < 0.2


@pytest.mark.parametrize("choice", ["linear", "cosine", "polynomial", "constant"])
def test_after_the_warm_up_they_are_those_of_transformers(schedule_config, choice):
    made = schedule_config(choice, steps=90, warmup_steps=7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if choice == "constant" else choice
    more = {"power": 2.0, "lr_end": 0.0} if choice == "polynomial" else {}
    peer = get_scheduler(name, optimizer, 7, 90, more)
    for step in range(90):
        if step >= 7:
            assert lr_scale(made, step) == pytest.approx(peer.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        peer.step()


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
    decay = scales[81:]
    assert all(a > b for a, b in pairwise(decay))
    made.steps = 1001  # odd, so that a step lies in the middle
    begin = round(0.8 * 1001)
    assert lr_scale(made, (begin + 1001) // 2) == pytest.approx(middle, abs=0.01)


def test_a_wsd_run_that_is_made_longer_has_stayed_where_it_was(schedule_config):
    """The point of this schedule: its stable part does not depend on the run's length."""
    short, long = (schedule_config("wsd", steps=steps, warmup_steps=5) for steps in (100, 1000))
    assert [lr_scale(short, s) for s in range(80)] == [lr_scale(long, s) for s in range(80)]


@pytest.mark.parametrize("cycles", [3, 49])  # 49 * (1 / 49) is just below 1
def test_restarts_are_those_of_torch(schedule_config, cycles):
    """CosineAnnealingWarmRestarts, with a cycle length that divides the run's."""
    steps = 30 * cycles
    options = {"steps": steps, "warmup_steps": 0, "final_scale": 0.0, "cycles": cycles}
    made = schedule_config("cosine_restarts", **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 30)
    for step in range(steps):
        assert lr_scale(made, step) == pytest.approx(peer.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        peer.step()


def test_a_power_of_one_is_linear(schedule_config):
    options = {"warmup_steps": 20, "hold": 0.3, "final_scale": 0.1}
    linear = schedule_config("linear", **options)
    made = schedule_config("polynomial", power=1.0, **options)
    assert all(lr_scale(made, s) == pytest.approx(lr_scale(linear, s)) for s in range(550))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (60, 6), (200, 20), (5000, 20)])
def test_a_short_run_warms_up_for_a_tenth_of_it(schedule_config, steps, warmup):
    assert settled(schedule_config("cosine", steps=steps), 3).warmup_steps == warmup


@pytest.mark.parametrize(("epochs", "steps"), [(2, 15), (0.5, 4), (0.01, 1), (100, 750)])
def test_epochs_are_as_many_steps_as_they_take(schedule_config, epochs, steps):
    known = settled(schedule_config("constant", steps=9, epochs=epochs), 7.5)
    assert (known.steps, known.warmup_steps) == (steps, min(20, steps // 10))


@pytest.mark.parametrize("per_epoch", [12.5, 7.5, 25 / 3, 50 / 3])
@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_run_of_epochs_is_as_long_from_whichever_step_it_goes_on(
    schedule_config, per_epoch, epochs
):
    made = schedule_config("constant", epochs=epochs, warmup_steps=None)
    whole = settled(made, per_epoch)
    for step in range(1, whole.steps):
        assert settled(made, per_epoch, (step, step / per_epoch)) == whole


def test_a_warm_up_longer_than_the_epochs_is_refused(schedule_config):
    open_ended = schedule_config("linear", steps=550, epochs=2, warmup_steps=20)
    with pytest.raises(UserError, match=r"warmup_steps=20 is out of range.* \[0, 6\]"):
        settled(open_ended, 3)
