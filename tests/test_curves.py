"""A run's curves.png: it shows what its metrics contain, and never stops a run."""

import json

import pytest
from helpers import QUICK
from PIL import Image

from trainer.charts import points
from trainer.reporting import curves
from trainer.run import run
from trainer.system import disk


def titles(monkeypatch, rows):
    """The titles of the drawn panels, and the names in the legend."""
    told = []
    monkeypatch.setattr(
        curves.chart, "drawn", lambda panels, _, entries: told.append((panels, entries))
    )
    curves.draw(rows)
    return [panel.title for panel in told[0][0]], [entry.name for entry in told[0][1]]


def test_there_is_a_panel_for_what_has_two_points(monkeypatch):
    rows = [{"step": n, "train/loss": 1.0, "train/update_ratio": 0.1} for n in (1, 2)]
    rows.append({"step": 2, "eval/loss": 0.5})
    found = (["loss", "update / weights"], ["train/loss", "train/update_ratio"])
    assert titles(monkeypatch, rows) == found
    rows += [{"step": n, "eval/loss": 0.5, "optim/d": 1e-3} for n in (0, 1)]
    assert titles(monkeypatch, rows)[0] == ["loss", "update / weights", "found rate"]


@pytest.mark.parametrize("lr", [2.5e-4, 2.5e-5, 1e-3])
def test_a_rate_that_stays_the_same_is_drawn(lr):
    assert curves.draw([{"step": n, "train/lr": lr} for n in (1, 2)])


def test_what_follows_a_huge_spike_is_drawn():
    """As when a run in bf16 has diverged, and went back."""
    norms = [0.1] * 9 + [1e20] + [0.1] * 30
    assert curves.draw([{"step": n, "train/grad_norm_max": norm} for n, norm in enumerate(norms)])


def test_a_long_noisy_line_is_a_mean_before_what_it_is_the_mean_of(monkeypatch):
    rows = [{"step": n, "train/loss": 1.0 + n % 2} for n in range(1, 401)]
    told = []
    monkeypatch.setattr(curves.chart, "drawn", lambda panels, *_: told.extend(panels))
    curves.draw(rows)
    mean, each = told[0].lines
    assert [value for _, value in each.points] == [row["train/loss"] for row in rows]
    middle = [value for _, value in mean.points[50:-50]]
    assert max(middle) - min(middle) < 0.2  # means of 10 points that differ by 1


def test_a_line_of_many_points_keeps_its_spikes_and_its_end():
    known = [(n, 30.0 if n == 5000 else 1.0 + n % 2) for n in range(100_000)]
    found = points.thinned(known)
    assert len(found) <= 801
    assert {(5000, 30.0), known[-1]} <= set(found)
    assert found == sorted(found)
    assert points.thinned(known[:800]) == known[:800]


def test_one_point_is_no_curve():
    assert curves.draw([{"step": 0, "eval/loss": 1.0}]) is None
    assert curves.draw([]) is None


def test_a_run_draws_its_curves_also_when_it_fails(finished, composed, tmp_path, monkeypatch):
    folder = finished("run")
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > picture.height > 400
    monkeypatch.setattr("trainer.storage.result.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(composed(*QUICK), tmp_path / "failed")
    assert (tmp_path / "failed" / "curves.png").exists()


def test_curves_that_cannot_be_written_stop_no_run(composed, tmp_path, monkeypatch, caplog):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(disk, "replace_picture", full)
    run(composed(*QUICK), tmp_path / "run")
    assert "could not draw curves.png" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
