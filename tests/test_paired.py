"""Ratios over the same seeds: their intervals, and which of them are significant."""

import math
from random import Random

import pytest
from test_sweep import FAILED, column, sweep_of

from trainer.sweep import paired, sweep_table
from trainer.sweep.runs import Comparison

TITLE = "over the best, 95 % interval"


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (99, 1.9842)],
)
def test_the_quantile_is_that_of_published_tables(freedom, value):
    assert paired.quantile(freedom) == pytest.approx(value, abs=5e-5)


def test_the_interval_is_that_of_student():
    """A sample whose interval can be computed by hand: sd 1, n 3."""
    (found,) = paired.together([[1.0, 2.0, 3.0]])
    assert (found.log, found.count) == (2.0, 3)
    assert found.mean == pytest.approx(math.exp(2))
    assert found.interval[0] == pytest.approx(math.exp(2 - found.margin))
    assert found.margin == pytest.approx(4.3027 / math.sqrt(3), abs=5e-5)
    assert not found.shows_one
    assert paired.together([[1.0, 1.1, 1.2]])[0].shows_one


def test_a_table_has_the_ratio_to_the_best_by_the_seeds_in_common():
    losses = {"a": [0.1, 0.3, 0.2], "b": [0.15, 0.45, 0.31], "c": [0.9, FAILED, FAILED]}
    found = column(sweep_table(sweep_of(losses)), "over seeds", TITLE)
    assert found == {
        "optim=a": "",
        "optim=b": "1.516 [1.447, 1.590] n=3",
        "optim=c": "",
    }


def shown(rows, seeds, sweeps, worse=0.0, twins=0, wild=0):
    """Simulate sweeps whose second half of the rows is worse by a factor of 1 + `worse` -> how many
    show a difference where there is none, and the share of worse rows that are shown to be."""
    random, wrong, found = Random(0), 0, 0.0
    for _ in range(sweeps):
        losses = {
            str(row): [1 + worse * (row >= rows // 2) + random.gauss(0, 0.02) for _ in range(seeds)]
            for row in range(rows)
        }
        for row in range(twins):
            losses[f"{row} in 8 bits"] = [loss + random.gauss(0, 1e-4) for loss in losses[str(row)]]
        for row in range(wild):
            losses[f"wild {row}"] = [1.0, *[20.0] * (seeds - 1)]
        groups = Comparison(sweep_of(losses)).groups
        apart = [
            g.name
            for g, one in zip(groups, paired.ratios(groups), strict=True)
            if one and one.shows_one
        ]
        late = {f"optim={row}" for row in range(rows // 2, rows)}
        wrong += bool({*apart} - (late if worse else set()))
        found += len(late & {*apart}) / len(late)
    return wrong, found / sweeps


def test_of_sweeps_whose_rows_are_equal_about_one_in_twenty_shows_a_difference():
    """Ten rows of three seeds; judged row by row, half of the sweeps would show one."""
    assert shown(10, 3, 200)[0] <= 14


@pytest.mark.parametrize(("twins", "wild"), [(0, 0), (2, 0), (0, 1)])
def test_rows_that_are_worse_are_shown_to_be_with_three_seeds(twins, wild):
    """Worse by four standard deviations.  From its own three seeds alone, one row in fifty would be
    shown; neither a twin, whose ratio hardly varies, nor a row of which a run diverged hides that
    the others are alike."""
    wrong, found = shown(10, 3, 60, worse=0.08, twins=twins, wild=wild)
    assert wrong <= 4
    assert found > 0.6


def test_variances_are_moderated_towards_the_typical_one():
    """The more alike, the more strongly; a single known variance is left as it is."""
    assert paired.moderate([(2.0, 2)]) == [(2.0, 2)]
    assert paired.moderate([(0.0, 1)] * 3) == [(0.0, 1)] * 3
    of_two = paired.moderate([(1.0, 2), (1.2, 2)])
    assert (
        paired.moderate([(1.0, 2), (1.2, 2), *[(0.0, 2)] * 20])[:2] == of_two
    )  # twins add nothing
    alike = paired.moderate([(1.0, 2), (1.1, 2), (0.9, 2)])
    assert len({*alike}) == 1
    assert alike[0][1] == 6
    assert paired.moderate([(1.0, 2), (1.1, 2), (0.9, 2), (100.0, 2)]) == [*alike, (100.0, 2)]
    apart = paired.moderate([(10.0**n, 4) for n in range(-3, 4)])
    assert apart == sorted(apart)
    assert apart[-1][0] == pytest.approx(1000, rel=0.2)
    assert {freedom for _, freedom in apart} == {4}


def test_the_trigamma_function_is_inverted():
    assert paired._inverse_trigamma(math.pi**2 / 6) == pytest.approx(1.0)
    assert paired._inverse_trigamma(math.pi**2 / 2) == pytest.approx(0.5)


def test_that_intervals_are_of_all_rows_together_is_said():
    losses = {"a": [0.1, 0.2], "b": [0.2, 0.4], "c": [0.5, 0.6]}
    assert "the intervals are of 3 rows together" in sweep_table(sweep_of(losses))
    losses.pop("c")
    assert "rows together" not in sweep_table(sweep_of(losses))


def test_without_two_seeds_in_common_there_is_no_such_column():
    text = sweep_table(sweep_of({"a": [0.1, FAILED], "b": [FAILED, 0.2]}))
    assert "over seeds" in text
    assert TITLE not in text
