"""Held-out pictures: which they are, and that no step trains on one."""

import json

import pytest
from helpers import rows

from trainer import batches
from trainer.errors import UserError
from trainer.holdout import split

NAMES = [f"{number:02d}.png" for number in range(30)]


@pytest.mark.parametrize("count", [0, 1, 7, 29])
def test_a_split_is_of_all_rows_in_their_order(count):
    made = split(NAMES, count)
    assert len(made.held_out) == count
    assert sorted(made.training + made.held_out) == list(range(30))
    assert made.training == sorted(made.training)
    assert made.held_out == sorted(made.held_out)


def test_what_is_held_out_does_not_depend_on_the_order_and_hardly_on_what_is_added():
    def held_out(names, count=7):
        return {names[row] for row in split(names, count).held_out}

    assert held_out(NAMES[::-1]) == held_out(NAMES)
    for number in range(50):
        more = held_out([*NAMES, f"new-{number}.png"])
        assert len(more - held_out(NAMES)) <= 1
    assert held_out(NAMES, 6) < held_out(NAMES, 7)


def test_names_that_are_equal_are_told_apart():
    assert len(split(["a.png"] * 5, 2).held_out) == 2


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"data\.holdout=30: there are 30 pictures.*at most 29"):
        split(NAMES, 30)


def test_held_out_pictures_are_evaluated_and_never_trained_on(quick, monkeypatch):
    trained, evaluated = set(), []
    noised, eval_batches = batches.noised, batches.eval_batches

    def pictures(inputs):
        return {latent.numpy().tobytes() for latent in inputs.latents}

    def watch_training(inputs, *arguments):
        trained.update(pictures(inputs))
        return noised(inputs, *arguments)

    def watch_evaluation(among, gather, *arguments, **options):
        evaluated.append(pictures(gather(list(among))))
        return eval_batches(among, gather, *arguments, **options)

    monkeypatch.setattr(batches, "noised", watch_training)
    monkeypatch.setattr(batches, "eval_batches", watch_evaluation)
    folder = quick("run", "data.holdout=17", "data.batch_size=7")
    own, held_out = evaluated[:2]
    assert trained == own
    assert len(own) == 7
    assert len(held_out) == 17
    assert not own & held_out
    for row in (rows(folder)[0], rows(folder)[-1]):
        assert row["eval/holdout_loss"] != row["eval/loss"]
        assert row["eval/holdout_loss_t000_250"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["holdout_loss_after"] == rows(folder)[-1]["eval/holdout_loss"]
    assert "held out" in (folder / "train.log").read_text()
    assert rows(folder)[2]["train/epoch"] == pytest.approx(2)  # of the seven
