"""Differences with the same seeds: their intervals, and which of them show something."""

import math
from random import Random

import pytest
from test_sweep import FAILED, column, sweep_of

from trainer.sweep import paired, sweep_table
from trainer.sweep.runs import Comparison

TITLE = "minus the best, 95 % interval"


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (99, 1.9842)],
)
def test_the_quantile_is_that_of_published_tables(freedom, value):
    assert paired.quantile(freedom) == pytest.approx(value, abs=5e-5)


def test_the_interval_is_that_of_student():
    """A sample whose interval can be told by hand: sd 1, n 3."""
    found = paired.interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.margin == pytest.approx(4.3027 / math.sqrt(3), abs=5e-5)
    assert not found.shows_one
    assert paired.interval([1.0, 1.1, 1.2]).shows_one


def test_a_table_has_the_difference_from_the_best_by_the_seeds_in_common():
    losses = {"a": [0.1, 0.3, 0.2], "b": [0.21, 0.40, 0.30], "c": [0.9, FAILED, FAILED]}
    found = column(sweep_table(sweep_of(losses)), "over seeds", TITLE)
    assert found == {
        "optim=a": "",
        "optim=b": "+0.1033 [+0.0890, +0.1177] n=3",
        "optim=c": "",
    }


def test_of_sweeps_whose_rows_are_equal_at_most_one_in_twenty_shows_a_difference():
    """Ten rows of three seeds, by each row alone half of the sweeps show one."""
    random, shown = Random(0), 0
    for _ in range(200):
        losses = {str(row): [random.gauss(1, 0.1) for _ in range(3)] for row in range(10)}
        groups = Comparison(sweep_of(losses)).groups
        shown += any(one.shows_one for one in paired.differences(groups)[1:])
    assert shown <= 10


def test_that_intervals_are_of_all_rows_together_is_said():
    losses = {"a": [0.1, 0.2], "b": [0.2, 0.4], "c": [0.5, 0.6]}
    assert "the intervals are of 3 rows together" in sweep_table(sweep_of(losses))
    losses.pop("c")
    assert "rows together" not in sweep_table(sweep_of(losses))


def test_without_two_seeds_in_common_there_is_no_such_column():
    text = sweep_table(sweep_of({"a": [0.1, FAILED], "b": [FAILED, 0.2]}))
    assert "over seeds" in text
    assert TITLE not in text
