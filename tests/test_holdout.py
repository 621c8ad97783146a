"""Held-out pictures: which they are, and that no step trains on one."""

import json

import pytest
from helpers import rows

from trainer import batches
from trainer.data.holdout import held_out
from trainer.errors import UserError

NAMES = [f"{number:02d}.png" for number in range(30)]


@pytest.mark.parametrize("count", [0, 1, 7, 29])
def test_so_many_are_held_out(count):
    assert len(set(held_out(NAMES, count))) == count


def test_what_is_held_out_does_not_depend_on_the_order_and_hardly_on_what_is_added():
    def chosen(names, count=7):
        return {names[row] for row in held_out(names, count)}

    assert chosen(NAMES[::-1]) == chosen(NAMES)
    for number in range(50):
        more = chosen([*NAMES, f"new-{number}.png"])
        assert len(more - chosen(NAMES)) <= 1
    assert chosen(NAMES, 6) < chosen(NAMES, 7)


def test_names_that_are_equal_are_told_apart():
    assert len(set(held_out(["a.png"] * 5, 2))) == 2


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"data\.holdout=30: there are 30 pictures.*at most 29"):
        held_out(NAMES, 30)


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
    own, left_out = evaluated[:2]
    assert trained == own
    assert len(own) == 7
    assert len(left_out) == 17
    assert not own & left_out
    for row in (rows(folder)[0], rows(folder)[-1]):
        assert row["eval/holdout_loss"] != row["eval/loss"]
        assert row["eval/holdout_loss_t000_250"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["holdout_loss_after"] == rows(folder)[-1]["eval/holdout_loss"]
    assert "held out" in (folder / "train.log").read_text()
    assert rows(folder)[2]["train/epoch"] == pytest.approx(2)  # of the seven
