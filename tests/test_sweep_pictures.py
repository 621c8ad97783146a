"""What a sweep draws: its runs' pictures below each other, their losses as lines, and its head."""

import json

import pytest
from PIL import Image

from trainer import pictures
from trainer.sweep import curves, sheet
from trainer.sweep.callback import _write
from trainer.sweep.head import head

CAPTIONS = [f"caption {n}" for n in range(3)]


def made(folder, name, colour="red", captions=CAPTIONS, losses=(1.0, 0.1), **more):
    """A run's folder with its summary, pictures of one colour, and losses."""
    run = folder / name
    drawn = [Image.new("RGB", (64, 64), colour) for _ in captions]
    pictures.save(run / "samples/step-000004", drawn, captions)
    pictures.save(run / "samples/step-000000", [Image.new("RGB", (64, 64))] * len(drawn), captions)
    rows = [{"step": 2 * n, "eval/loss": loss} for n, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"overrides": [f"optim={name}", "seed=0"], "lr": 1e-3, "steps": 4} | more
    summary |= {"eval_loss_after": losses[-1]}
    (run / "summary.json").write_text(json.dumps(summary))
    return run, summary


def bands(picture):
    """The colours of a sheet's last column from top to bottom, each once."""
    column = [picture.getpixel((picture.width - 48, y)) for y in range(picture.height)]
    known = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 0, 0): "before"}
    found = [known[pixel] for pixel in column if pixel in known]
    return [c for n, c in enumerate(found) if n == 0 or found[n - 1] != c]


def test_a_sheet_has_a_row_a_run_the_best_first_and_what_was_drawn_before(tmp_path):
    runs = [made(tmp_path, "a", "red", losses=(1, 0.5)), made(tmp_path, "b", "blue")]
    assert [c for c in bands(sheet.sheet(runs)) if c != "before"] == ["blue", "red"]
    assert bands(sheet.sheet(runs))[0] == "before"


def test_a_run_that_failed_or_drew_other_captions_has_no_row(tmp_path):
    runs = [
        made(tmp_path, "a", "red"),
        made(tmp_path, "b", "blue", captions=["another"], losses=(1, 0.5)),
        made(tmp_path, "c", "blue", error="no"),
    ]
    assert "blue" not in bands(sheet.sheet(runs))
    assert sheet.sheet(runs[2:]) is None


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 20)}


def test_a_chart_has_a_colour_a_group_and_none_without_two_points(tmp_path):
    runs = [made(tmp_path, name) for name in ("a", "b")]
    blue, orange = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    assert {blue, orange} <= colours(curves.draw(runs))
    assert orange not in colours(curves.draw(runs[:1]))
    assert curves.draw([made(tmp_path, "c", losses=(1,))]) is None


def test_a_run_that_diverges_leaves_at_the_top_and_may_come_back():
    points = [(0, 1.0), (1, 5.0), (2, 9.0), (3, 2.0)]
    assert curves._inside(points, 3.0) == [[(0, 1.0), (1, 3.0)], [(2, 3.0), (3, 2.0)]]
    assert curves._inside(points[:1], 3.0) == []


@pytest.mark.parametrize(
    ("last", "ticks"),
    [
        (4, [0, 1, 2, 3, 4]),
        (40, [0, 10, 20, 30, 40]),
        (550, [0, 100, 200, 300, 400, 500]),
        (0, [0]),
    ],
)
def test_steps_have_a_few_round_ticks(last, ticks):
    assert curves._ticks(last) == ticks


def test_the_head_says_what_all_runs_have_in_common():
    runs = [
        {
            "overrides": [f"optim={name}", "schedule.steps=4"],
            "steps": 4,
            "model": "tiny",
            "method": "full",
            "device": "cpu",
            "ended": f"2026-11-26T20:4{minute}:07+00:00",
        }
        for minute, name in enumerate("ab")
    ]
    text = head("sweep-1", [*runs, {"overrides": ["optim=c", "schedule.steps=4"], "error": "no"}])
    assert text.splitlines()[0] == "# sweep-1"
    for part in (
        "3 runs, 1 of them failed; 4 steps; model tiny; method full; on cpu",
        "ended from 2026-11-26 20:40 to 2026-11-26 20:41",
        "In all of them: `schedule.steps=4`",
    ):
        assert part in text


def test_a_sweeps_folder_has_its_table_with_the_pictures(tmp_path, monkeypatch, capsys):
    made(tmp_path, "a")
    _write(tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    for name in ("curves.png", "sweep.png"):
        assert (tmp_path / name).is_file()
        assert f"![]({name})" in text

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    _write(tmp_path)
    assert "![](" not in (tmp_path / "sweep.md").read_text()
    assert "No space left" in capsys.readouterr().out
