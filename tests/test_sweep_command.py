"""`python -m trainer.sweep`: rewrites a sweep's tables, and exports them for other programs."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
from test_sweep import sweep_of

from trainer.reporting import report
from trainer.sweep import files
from trainer.sweep.__main__ import main


@pytest.fixture
def compare(capsys):
    """Run the command: compare(folder, "--csv", file) -> (exit status, stdout, stderr)."""

    def call(*arguments):
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = leaving.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def folder_of(path, losses, is_sweep=True):
    """A folder of runs with these losses, {optimizer: one per seed}."""
    for place, run in enumerate(sweep_of(losses)):
        folder = path / f"{place}-run"
        folder.mkdir(parents=True)
        report.write_summary(folder, run)
        rows = ({"step": n, "eval/loss": 1 / (n + 1)} for n in range(3))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
    if is_sweep:
        (path / "multirun.yaml").touch()
    return path


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "sweep", {"a_b": [0.1, 0.2], "c": [0.3, "no finite loss"]})


def test_the_page_of_a_sweep_is_written_anew(compare, folder):
    (folder / "sweep.md").write_text("old")
    status, out, _ = compare(folder)
    assert status == 0
    assert "| optim=a_b seed=0 |" in out
    assert out.rstrip().endswith(str(folder / "sweep.md"))
    assert (folder / "sweep.md").read_text().startswith("# sweep\n")
    assert (folder / "curves.png").is_file()
    assert compare(folder, "--out", folder)[0] == 0


def test_a_reader_that_has_enough_is_no_error_and_the_files_are_there(folder):
    command = [sys.executable, "-m", "trainer.sweep", folder, "--csv", folder / "runs.csv"]
    ours, theirs = os.pipe()
    os.close(ours)
    found = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(theirs)
    assert (found.returncode, found.stderr) == (-signal.SIGPIPE, b"")
    assert (folder / "runs.csv").is_file()
    assert (folder / "sweep.md").is_file()


def test_runs_of_several_folders_are_compared_and_kept_where_it_is_said(compare, folder, tmp_path):
    other = folder_of(tmp_path / "others", {"d": [0.05]}, is_sweep=False) / "0-run"
    status, out, _ = compare(folder, other)
    assert status == 0
    assert out.splitlines()[2].startswith("| optim=d")
    assert not (folder / "sweep.md").exists()
    place = tmp_path / "made/here"
    assert compare(folder, other, other.parent, "--out", place)[0] == 0
    assert "5 runs, 1 of them failed" in (place / "sweep.md").read_text()
    status, _, err = compare(folder, other, "--out", place)
    assert (status, err) == (
        2,
        f"error: {place}/sweep.md already exists; name another\n",
    )


def test_other_programs_read_every_run(compare, folder, tmp_path):
    paths = {kind: tmp_path / f"new/runs.{kind}" for kind in ("csv", "json", "latex")}
    options = [word for kind, path in paths.items() for word in (f"--{kind}", path)]
    assert compare(folder, *options)[0] == 0
    with open(paths["csv"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[:2]] == ["optim=a_b seed=0", "optim=a_b seed=1"]
    assert [row["final_loss"] for row in rows] == ["0.1", "0.2", "0.3", ""]
    assert rows[3]["error"] == "no finite loss"
    assert rows[0]["overrides"] == "optim=a_b seed=0"
    assert rows[0]["folder"] == str(folder / "0-run")

    found = json.loads(paths["json"].read_text())
    assert found["ranked_by"] == "eval/loss"
    assert [group["ended_well"] for group in found["over_seeds"]] == [2, 1]
    assert len(found["runs"]) == 4
    assert any("failed: no finite loss" in remark for remark in found["remarks"])

    tex = paths["latex"].read_text()
    assert tex.count(r"\begin{tabular}{l") == tex.count(r"\end{tabular}") == 2
    assert r"optim=a\_b & 2 of 2 & 0.001 & 0.1500 $\pm$ 0.0707" in tex
    assert r"95 \% interval" not in tex  # only one seed in common
    tex = files.as_latex(sweep_of({"a|<b>": [0.1], "c": [0.2]}))
    assert r"optim=a\textbar{}\textless{}b\textgreater{} &" in tex


def test_a_ratio_is_in_json_by_its_parts(compare, tmp_path):
    folder = folder_of(tmp_path / "s", {"a": [0.1, 0.2], "b": [0.3, 0.5]})
    compare(folder, "--json", tmp_path / "s.json")
    first, second = json.loads((tmp_path / "s.json").read_text())["over_seeds"]
    assert first["over_the_best"] is None
    assert second["over_the_best"]["mean"] == pytest.approx((3 * 2.5) ** 0.5)
    assert second["over_the_best"]["seeds"] == 2
    low, high = second["over_the_best"]["interval"]
    assert low < 1 < high


@pytest.mark.parametrize("kind", ["csv", "json", "latex"])
def test_a_file_that_exists_is_left_as_it_is(compare, folder, tmp_path, kind):
    path = tmp_path / "mine"
    path.write_text("mine")
    status, out, err = compare(folder, f"--{kind}", path)
    assert (status, out) == (2, "")
    assert err == f"error: {path} already exists; name another\n"
    assert path.read_text() == "mine"
    assert not (folder / "sweep.md").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("gone", "is not a folder"), ("", "contains no finished run")]
)
def test_a_folder_without_runs_is_one_line(compare, tmp_path, name, says):
    status, _, err = compare(tmp_path / name)
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1


def test_the_help_says_what_is_written(compare):
    status, out, _ = compare("--help")
    assert status == 0
    for word in ("FOLDER", "--out", "--csv", "--json", "--latex", "Exit status"):
        assert word in out
