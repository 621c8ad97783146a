"""Weights & Biases: an offline run holds everything, and its failures never stop training."""

import json
import math
import struct
import time

import pytest
import wandb
from helpers import QUICK, rows
from wandb.proto import wandb_internal_pb2

from trainer.errors import UserError
from trainer.objective import losses
from trainer.reporting.metrics import Metrics
from trainer.run import run
from trainer.sweep import page
from trainer.sweep.folders import ended_runs
from trainer.sweep.upload import upload

BLOCK = 32768


def records(path):
    """The records of a .wandb file.

    The format is LevelDB's log: 7 bytes of file header, then blocks of 32 KiB with chunks of
    (crc32, length, type) + data, type 1 = whole, 2 = first, 3 = middle, 4 = last.
    """
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def written_whole(path):
    """The records of a .wandb file once it is complete: on a busy machine, W&B's process may still
    be writing after `finish` has returned."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        kept = list(records(path))
        if any(record.HasField("exit") for record in kept):
            return kept
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def test_an_offline_run_holds_config_metrics_and_pictures(composed, tmp_path):
    folder = tmp_path / "day" / "run"
    run(
        composed(*QUICK, "log=wandb", "log.sample_count=2", "log.sample_steps=2"),
        folder,
    )
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    kept = written_whole(file)
    config = {i.key: i.value_json for r in kept if r.HasField("run") for i in r.run.config.update}
    assert '"adafactor8bit"' in config["optim"]
    history = history_of(kept)
    names = {key for row in history for key in row}
    written = {key for row in rows(folder) for key in row if key != "step"}
    assert written <= names
    assert any(name.startswith("samples") for name in names)
    losses = [float(row["eval/loss"]) for row in history if "eval/loss" in row]
    assert losses == [row["eval/loss"] for row in rows(folder) if "eval/loss" in row]
    (media,) = folder.glob("wandb/offline-run-*/files/media/images")
    assert len([*media.glob("samples_*.png")]) == 2  # before and after
    assert len([*media.glob("sample/0[01]_*.png")]) == 4  # each of two captions
    assert '"avocado"' in [row.get("sample/01/caption") for row in history]


def history_of(kept):
    """What was logged, a dictionary for each call."""
    return [
        {i.key or "/".join(i.nested_key): i.value_json for i in r.history.item}
        for r in kept
        if r.HasField("history")
    ]


def ending(folder):
    """The exit status and the summary of the last session of an offline run."""
    kept = written_whole(max(folder.glob("wandb/offline-run-*/*.wandb")))
    told = {i.key: i.value_json for r in kept if r.HasField("summary") for i in r.summary.update}
    return [r.exit.exit_code for r in kept if r.HasField("exit")], told


def test_a_run_that_fails_has_failed_in_wandb_too(composed, tmp_path, monkeypatch):
    original, calls = losses.loss, []
    monkeypatch.setattr(
        losses, "loss", lambda *a: original(*a) * (calls.append(a) or (1, math.inf)[len(calls) > 2])
    )
    options = [*QUICK, "log=wandb", "runtime.max_skipped_steps=0"]
    with pytest.raises(UserError, match=r"^1 step without"):
        run(composed(*options), tmp_path / "run")
    statuses, told = ending(tmp_path / "run")
    assert statuses == [1]
    assert json.loads(told["error"]).startswith("1 step without")
    assert json.loads(told["steps"]) == 3
    monkeypatch.undo()
    run(composed(*QUICK, "log=wandb"), tmp_path / "good")
    statuses, told = ending(tmp_path / "good")
    assert statuses == [0]
    assert "error" not in told


def test_a_run_whose_export_fails_has_failed_in_wandb_too(composed, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("could not save: no space")

    monkeypatch.setattr("trainer.storage.result.write", full)
    with pytest.raises(UserError, match="no space"):
        run(composed(*QUICK, "log=wandb"), tmp_path / "run")
    statuses, told = ending(tmp_path / "run")
    assert statuses == [1]
    assert json.loads(told["error"]).startswith("could not save: no space; resume from")


def test_the_runs_of_a_sweep_are_told_apart(composed, tmp_path, monkeypatch):
    """By what distinguishes them, in groups over seeds; a single run by its folder, without a
    group."""
    told = {}
    monkeypatch.setattr(wandb, "init", lambda **options: told.update(options))
    config = composed("log=wandb", "optim=lion")
    folder = tmp_path / "sweep-1" / "0-lion-full-seed3"
    folder.mkdir(parents=True)
    Metrics(folder, config, 0)
    assert (told["name"], told["group"]) == ("0-lion-full-seed3", None)
    assert told["tags"] == ["lion", "full", "tiny_sdxl"]
    (folder.parent / "multirun.yaml").touch()
    Metrics(folder, config, 0, ["optim=lion", "optim.lr=1e-3", "seed=3"])
    assert told["name"] == "optim=lion optim.lr=1e-3 seed=3"
    assert told["group"] == "sweep-1 optim=lion optim.lr=1e-3"
    assert (told["config"]["sweep"], told["config"]["case"]) == (
        "sweep-1",
        "optim=lion optim.lr=1e-3",
    )
    assert told["tags"] == ["lion", "full", "tiny_sdxl", "sweep-1"]
    Metrics(folder, config, 0)  # without a plan
    assert (told["name"], told["group"]) == (folder.name, "sweep-1")
    (tmp_path / "mine").mkdir()
    Metrics(tmp_path / "mine", config, 0)
    assert told["name"] == "lion-full mine"


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_failing_wandb_never_stops_a_run(composed, tmp_path, monkeypatch, caplog, where):
    def broken(*_, **__):
        raise ConnectionError("no network")

    if where == "init":
        monkeypatch.setattr(wandb, "init", broken)
    else:

        class Run:
            log = finish = broken

        monkeypatch.setattr(wandb, "init", lambda **_: Run())
    run(composed(*QUICK, "log=wandb"), tmp_path / "run")
    assert caplog.text.count("W&B is off") == 1
    assert len(rows(tmp_path / "run")) == 6


def test_an_absent_wandb_never_stops_a_run(composed, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    run(composed(*QUICK, "log=wandb"), tmp_path / "run")
    assert "W&B is off" in caplog.text
    assert len(rows(tmp_path / "run")) == 6


def swept(folder, log):
    """A sweep of two optimizers and two seeds that has ended."""
    for number, (name, seed, loss) in enumerate(
        [("lion", 0, 0.3), ("lion", 1, 0.4), ("adamw", 0, 0.1), ("adamw", 1, 0.2)]
    ):
        run = folder / f"{number}-{name}"
        run.mkdir(parents=True)
        config = {"seed": seed, "optim": {"name": name}, "log": log}
        (run / "config.yaml").write_text(json.dumps(config))
        summary = {"overrides": [f"optim={name}", f"seed={seed}"], "optimizer": name, "seed": seed}
        (run / "summary.json").write_text(json.dumps(summary | {"eval_loss_after": loss}))
    found = ended_runs(folder)
    page.write(folder, found, [])
    return found


def test_a_sweep_is_compared_in_a_run_of_its_own(tmp_path):
    log = {"wandb": {"project": "cats", "mode": "offline", "entity": None}}
    sweep = tmp_path / "sweep-1"
    upload(sweep, swept(sweep, log), ["optim=sgd"])
    (file,) = sweep.glob("*/wandb/offline-run-*/*.wandb")
    kept = written_whole(file)
    (run,) = [r.run for r in kept if r.HasField("run")]
    assert (run.project, run.job_type) == ("cats", "comparison")
    assert [*run.tags] == ["comparison", "sweep-1"]
    assert run.notes.startswith("# sweep-1")
    assert "`optim=sgd`" in run.notes
    _, told = ending(sweep / "comparison")
    assert json.loads(told["best/optimizer"]) == "adamw"
    assert json.loads(told["best/eval after"]) == 0.1
    assert {"runs", "over seeds"} <= {key.partition("/")[0] for key in history_of(kept)[0]}
    (table,) = file.parent.glob("files/media/table/runs_*.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [row["optimizer"] for row in rows] == ["adamw", "adamw", "lion", "lion"]
    assert [row["final_loss"] for row in rows] == [0.1, 0.2, 0.3, 0.4]


def test_a_sweep_that_is_not_in_wandb_is_not_compared_there(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("started"))
    upload(tmp_path, swept(tmp_path, {"wandb": None}), [])


def test_a_comparison_that_wandb_refuses_does_not_stop_the_sweep(tmp_path, monkeypatch, capsys):
    def broken(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb, "init", broken)
    log = {"wandb": {"project": "cats", "mode": "online", "entity": None}}
    upload(tmp_path, swept(tmp_path, log), [])
    assert "W&B has no comparison" in capsys.readouterr().out
