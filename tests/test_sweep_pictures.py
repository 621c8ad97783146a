"""What a sweep draws: a sheet of its runs' pictures, a chart of their losses, and its heading."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.charts import chart, points
from trainer.charts.chart import Line, Panel
from trainer.charts.strokes import Style, style
from trainer.reporting import metrics
from trainer.sampling import pictures
from trainer.sweep import curves, sheet
from trainer.sweep.callback import _write
from trainer.sweep.page import head
from trainer.sweep.runs import Comparison

CAPTIONS = [f"caption {n}" for n in range(3)]


def made(folder, name, colour="red", captions=CAPTIONS, losses=(1.0, 0.1), originals=None, **more):
    """A run's folder with its summary, pictures of one colour, and losses."""
    run = folder / name
    drawn = [Image.new("RGB", (64, 64), colour) for _ in captions]
    pictures.save(run / "samples/step-000004", drawn, captions)
    pictures.save(run / "samples/step-000000", [Image.new("RGB", (64, 64))] * len(drawn), captions)
    if originals:
        pictures.save(
            run / "samples/original", [Image.new("RGB", (64, 64), originals)] * 3, captions
        )
    rows = [{"step": 2 * n, "eval/loss": loss} for n, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"overrides": [f"optim={name}", "seed=0"], "lr": 1e-3, "steps": 4} | more
    summary |= {"eval_loss_after": losses[-1]}
    (run / "summary.json").write_text(json.dumps(summary))
    return summary | {"folder": str(run)}


def bands(picture):
    """The colours of a sheet's last column from top to bottom, without repeats."""
    column = [picture.getpixel((picture.width - 48, y)) for y in range(picture.height)]
    known = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 0, 0): "before", (0, 128, 0): "green"}
    found = [known[pixel] for pixel in column if pixel in known]
    return [c for n, c in enumerate(found) if n == 0 or found[n - 1] != c]


def test_a_sheet_has_a_row_a_run_the_best_first_and_what_was_drawn_before(tmp_path):
    runs = [made(tmp_path, "a", "red", losses=(1, 0.5)), made(tmp_path, "b", "blue")]
    assert [c for c in bands(sheet.sheet(runs)) if c != "before"] == ["blue", "red"]
    assert bands(sheet.sheet(runs))[0] == "before"


def test_a_sheet_begins_with_the_pictures_of_the_data(tmp_path):
    runs = [made(tmp_path, "a", "red", originals="green")]
    assert bands(sheet.sheet(runs)) == ["green", "before", "red"]


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


def test_a_sheet_of_many_runs_has_one_of_each_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "_ROWS", 2)
    runs = [made(tmp_path, "a", "red", losses=(1, 0.1)), made(tmp_path, "b", "blue", losses=(1, 0))]
    again = made(tmp_path, "a2", "green", losses=(1, 0.3), overrides=["optim=a", "seed=1"])
    third = made(tmp_path, "c", "green", losses=(1, 0.9))
    assert [c for c in bands(sheet.sheet([*runs, again])) if c != "before"] == ["blue", "red"]
    assert [c for c in bands(sheet.sheet([*runs, third])) if c != "before"] == ["blue", "red"]


def test_a_chart_has_a_colour_a_group_and_none_without_two_points(tmp_path):
    runs = [made(tmp_path, name) for name in ("a", "b")]
    blue, orange = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    assert {blue, orange} <= colours(curves.draw(runs))
    assert orange not in colours(curves.draw(runs[:1]))
    assert curves.draw([made(tmp_path, "c", losses=(1,))]) is None


def test_forty_groups_have_strokes_of_their_own():
    assert len({(one.colour, *one.dashes) for one in map(style, range(40))}) == 40


def line(*losses, **more):
    return Line(style=Style(colour="#ff0000"), points=list(enumerate(losses)), **more)


def has_red(panel):
    """Whether red is drawn between the first step and the last."""
    entry = chart.LegendEntry(Style(colour="#000000"), "", "")
    picture = chart.drawn([panel], "", [entry])
    middle = chart._LEFT + chart._PANEL // 2
    column = [picture.getpixel((middle, y)) for y in range(picture.height)]
    return (255, 0, 0) in column


def test_where_a_loss_is_known_before_and_after_alone_no_line_joins_them():
    known = [line(1.0, 0.1), line(1.0, 0.5)]
    assert not has_red(Panel(title="", lines=known, ceiling=None))
    assert has_red(Panel(title="", lines=[line(1.0, 0.5, 0.1)], ceiling=None))


def test_the_range_is_that_of_runs_that_ended_well_up_to_the_ceiling():
    lines = [line(1.0, 5.0, 0.5), line(1.0, 90.0, failed=True)]
    assert Panel(title="", lines=lines, ceiling=None).range() == pytest.approx((0.46, 5.4))
    assert Panel(title="", lines=lines, ceiling=2.0).range() == pytest.approx((0.46, 2.16))
    assert Panel(title="", lines=lines[1:], ceiling=None).range()[1] > 90


def test_a_smoothed_line_is_centred_and_ends_with_what_is_known():
    known = [(n, float(n == 4)) for n in range(9)]
    assert [round(value, 2) for _, value in points.smoothed(known, 5)] == [
        *(0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0)
    ]
    assert points.smoothed(known[:5], 5)[-1] == (4, 1.0)
    assert points.smoothed(known, 1) == known


def lines_of(runs):
    """The lines of eval/loss: their points, bands and crosses."""
    rows = {id(run): metrics.read(Path(run["folder"]) / "metrics.jsonl") for run in runs}
    known = {key: points.of(found, "eval/loss") for key, found in rows.items()}
    last = {key: found[-1]["step"] for key, found in rows.items()}
    return curves._lines(Comparison(runs).groups, known, last)


def test_seeds_are_a_mean_in_a_band_and_one_that_failed_a_line_with_a_cross(tmp_path):
    losses = {0: (1.0, 0.2, 0.1), 1: (1.0, 0.4, 0.3), 2: (1.0, 7.0)}
    runs = [
        made(
            tmp_path,
            f"a{seed}",
            losses=found,
            overrides=["optim=a", f"seed={seed}"],
            **({"error": "no", "steps": 3} if seed == 2 else {}),
        )
        for seed, found in losses.items()
    ]
    whole, failed = lines_of(runs)
    assert whole.points == [(0, 1.0), (2, pytest.approx(0.3)), (4, pytest.approx(0.2))]
    assert whole.band == [(0, 1.0, 1.0), (2, 0.2, 0.4), (4, 0.1, 0.3)]
    assert whole.cross is None
    assert (failed.points, failed.cross) == ([(0, 1.0), (2, 7.0)], (3, 7.0))


@pytest.mark.parametrize(
    ("losses", "pieces"),
    [
        ([1, 4, 4, 1], [[(0, 1), (0.5, 2)], [(2.5, 2), (3, 1)]]),
        ([1, 16, 1, 1], [[(0, 1), (0.25, 2)], [(1.75, 2), (2, 1), (3, 1)]]),
        ([1, 2, 1], [[(0, 1), (1, 2), (2, 1)]]),
        ([4, 1], [[(0.5, 2), (1, 1)]]),
        ([4, 8], []),
    ],
)
def test_a_run_that_diverges_keeps_its_slope_to_where_it_leaves_and_comes_back(losses, pieces):
    found = chart.inside([*enumerate(losses)], 2)
    assert found == pieces


def test_one_point_is_no_piece_of_a_line():
    points = [(0, 1.0)]
    assert chart.inside(points[:1], 3.0) == []


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
    assert chart.ticks(last) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.002, 20.0, [0.01, 0.1, 1, 10]),
        (0.09, 1.2, [0.1, 0.2, 0.5, 1]),
        (0.105, 0.165, [0.11, 0.12, 0.13, 0.14, 0.15, 0.16]),
        (0.12011, 0.12041, [0.12015, 0.1202, 0.12025, 0.1203, 0.12035, 0.1204]),
        (1.2, 3.9, [1.5, 2, 2.5, 3, 3.5]),
    ],
)
def test_losses_have_round_ticks_however_close_they_are(low, high, ticks):
    assert chart.log_ticks(low, high) == pytest.approx(ticks)


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
        "Shared options: `schedule.steps=4`",
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
