"""Held-out pictures: how they are chosen, and that no step trains on them."""

import json

import pytest
from helpers import QUICK, rows

from trainer.data.holdout import holdout
from trainer.errors import UserError
from trainer.objective import batches
from trainer.run import run

DIGESTS = [f"{number:064x}" for number in range(30)]


@pytest.mark.parametrize("count", [0, 1, 7, 29])
def test_as_many_as_are_wanted_are_held_out(count):
    assert len(holdout(DIGESTS, count)) == count


def test_what_is_held_out_does_not_depend_on_the_order_and_hardly_on_what_is_added():
    assert holdout(DIGESTS[::-1], 7) == holdout(DIGESTS, 7)
    for number in range(50):
        assert len(holdout([*DIGESTS, f"new-{number}"], 7) - holdout(DIGESTS, 7)) <= 1
    assert holdout(DIGESTS, 6) < holdout(DIGESTS, 7)


def test_equal_pictures_are_held_out_together():
    assert len(holdout([*DIGESTS, *DIGESTS], 7)) == 7


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"data\.holdout=30: there are 30 diff.*at most 29"):
        holdout(DIGESTS * 2, 30)
    with pytest.raises(UserError, match=r"there is 1 different picture .*hold out none$"):
        holdout(DIGESTS[:1], 2)


def test_the_result_of_a_run_is_the_held_out_loss_of_what_it_exports(composed, tmp_path):
    config = composed(*QUICK, "data.holdout=17", "data.batch_size=7", "ema=fp32")
    result = run(config, tmp_path / "run")
    assert result == rows(tmp_path / "run")[-1]["eval/ema_holdout_loss"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert result == summary["holdout_loss_result"] != summary["holdout_loss_after"]


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
    assert rows(folder)[2]["train/epoch"] == pytest.approx(2)  # of seven pictures
