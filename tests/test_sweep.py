"""Sweeps: every combination runs, a failure is a row, a table at the end."""

import json
import math
from datetime import datetime

import pytest
from helpers import QUICK
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from trainer.cli import compose, resolvers
from trainer.reporting.measure import objective
from trainer.sweep import SweepTable, sweep_table
from trainer.sweep.job import record_failure
from trainer.sweep.runs import Comparison


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def tables(text):
    """The tables of a text by their first column title: rows of cells, the header first."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return {cells(block[0])[0]: [cells(line) for line in block[:1] + block[2:]] for block in blocks}


def column(text, table, title):
    titles, *rows = tables(text)[table]
    return {row[0]: row[titles.index(title)] for row in rows}


@pytest.mark.slow
def test_a_sweep_runs_the_product_and_prints_a_table(command, tmp_path):
    status, out, err = command(
        "-m", *QUICK, "optim=adafactor8bit,lion", "seed=0,1", "schedule.steps=1"
    )
    assert status == 0, err
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 + 2 + 2  # no table of rates: each optimizer ran at one
    for part in (
        "eval after",
        "s/step",
        "images/s",
        "total seconds",
        "optimizer state",
        "peak in training",
    ):
        assert part in table[0]
    assert sum(line.startswith("| optim=lion seed=") for line in table) == 2
    (kept,) = tmp_path.glob("runs/sweep-*/sweep.md")
    assert "over seeds" in kept.read_text()


@pytest.mark.slow
def test_a_failing_job_is_a_row_of_the_sweep_and_the_others_run(command):
    status, out, _ = command("-m", *QUICK, "optim.lr=1e-3,-1,1e-4", "schedule.steps=1")
    assert status == 1
    table = [line for line in out.splitlines() if line.startswith("|")]
    table, rates = table[:5], table[5:]
    assert len(rates) == 2 + 1
    assert table[-1].startswith("| optim.lr=-1 ")
    assert cells(table[-1])[1:4] == ["-1", "failed", ""]
    assert "- optim.lr=-1 failed: optim=adafactor8bit: Adafactor8bit: lr=-1.0" in out


def test_a_job_that_fails_without_a_word_is_called_by_its_error(tmp_path, capsys):
    record_failure(tmp_path, MemoryError(), ["optim=sgd"], {})
    table = sweep_table([json.loads((tmp_path / "summary.json").read_text())])
    assert "- optim=sgd failed: MemoryError" in table
    assert "error: optim=sgd: MemoryError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_goes_on_in_its_folder_with_more_values_and_runs_nothing_twice(command, tmp_path):
    """Its second run was stopped after saving, and the runs are numbered differently this time."""
    folder, steps = tmp_path / "sweep", ("schedule.steps=1", "schedule.warmup_steps=0")
    arguments = ("-m", *QUICK, *steps, f"hydra.sweep.dir={folder}")
    assert command(*arguments, "seed=0,1")[0] == 0
    first, second = (folder / f"{n}-adafactor8bit-full-seed{n}" for n in range(2))
    (second / "summary.json").unlink()
    before = (first / "summary.json").read_bytes()

    status, out, err = command(*arguments, "seed=2,0,1")
    assert status == 0, err
    assert (first / "summary.json").read_bytes() == before
    assert f"{first} is already finished" in out
    assert f"resuming from {second}/checkpoints/step-000001" in out
    assert column((folder / "sweep.md").read_text(), "over seeds", "ended well") == {
        "optim=adafactor8bit": "3 of 3"
    }
    assert {path.name for path in folder.glob("*seed*")} == {
        first.name,
        second.name,
        "0-adafactor8bit-full-seed2",
    }


def test_sweeps_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolvers, "datetime", Clock)
    for name in ("runs/sweep-20260102-030405", "runs/sweep-20260102-030405-2"):
        compose.register()
        made = OmegaConf.create({"dir": "${sweep_dir:}"})
        assert [made.dir, made.dir] == [name, name]
        (tmp_path / name).mkdir(parents=True)
        assert made.dir == name  # unchanged for all of its runs


def test_a_sweeps_table_is_kept_after_every_run_and_nowhere_else(tmp_path):
    done = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path / "0-a")}}})
    (tmp_path / "0-a").mkdir()
    (tmp_path / "0-a/summary.json").write_text(
        json.dumps({"overrides": [], "optimizer": "b", "error": "no"})
    )
    SweepTable().on_job_end(done, JobReturn())
    assert not (tmp_path / "sweep.md").exists()
    (tmp_path / "multirun.yaml").touch()
    SweepTable().on_job_end(done, JobReturn())
    assert "optim=b failed: no" in (tmp_path / "sweep.md").read_text()


def test_a_callback_without_runs_prints_nothing(tmp_path, capsys):
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert capsys.readouterr().out == ""


NUMBERS = {
    "eval_loss_before": 1.0,
    "seconds_per_step": 0.1,
    "optimizer_state_bytes": 10,
    "peak_training_bytes": 10,
    "skipped_steps": 0,
}


def test_a_diverged_run_comes_after_the_finite_ones():
    losses = {"a": math.nan, "b": 0.5, "c": 0.1}
    runs = [NUMBERS | {"overrides": [k], "eval_loss_after": v} for k, v in losses.items()]
    assert list(column(sweep_table(runs), "run", "lr")) == ["c", "b", "a"]


def test_runs_are_ranked_by_the_weights_that_are_exported():
    average = {"overrides": ["a"], "eval_loss_after": 0.9, "ema_loss_after": 0.1}
    runs = [
        NUMBERS | average | {"eval_loss_result": 0.1},
        NUMBERS | {"overrides": ["b"], "eval_loss_after": 0.5, "eval_loss_result": 0.5},
    ]
    assert list(column(sweep_table(runs), "run", "lr")) == ["a", "b"]


def held_out(**losses):
    """Runs of one seed: {optimizer: (eval, held out)}."""
    return [
        NUMBERS
        | {"overrides": [f"optim={name}", "seed=0"], "optimizer": name, "lr": 1e-3}
        | {"eval_loss_after": loss, "holdout_loss_after": other}
        for name, (loss, other) in losses.items()
    ]


def test_runs_are_ranked_by_held_out_pictures_where_all_that_ended_well_have_them():
    runs = held_out(a=(0.1, 0.9), b=(0.2, 0.3))
    failed = {"overrides": ["optim=c", "seed=0"], "error": "no"}
    text = sweep_table([*runs, failed])
    assert list(column(text, "run", "lr")) == ["optim=b", "optim=a", "optim=c"]
    assert "held out on others, which rank the runs" in text
    assert "by eval optim=a would be the best (0.1000, and optim=b 0.2000)" in text
    assert "by eval" not in sweep_table(held_out(a=(0.1, 0.2), b=(0.2, 0.3)))
    text = sweep_table(
        [*runs, NUMBERS | {"overrides": ["optim=d", "seed=0"]} | {"eval_loss_after": 1.0}]
    )
    assert list(column(text, "run", "lr")) == ["optim=a", "optim=b", "optim=d"]
    assert "eval ranks the runs, because not all of them have held-out pictures" in text


def test_the_best_rate_is_that_of_held_out_pictures():
    runs = held_out(a=(0.1, 0.9), b=(0.2, 0.3))
    for run, rate in zip(runs, (1e-3, 1e-4), strict=True):
        run |= {
            "overrides": ["optim=a", f"optim.lr={rate}", "seed=0"],
            "optimizer": "a",
            "lr": rate,
        }
    text = sweep_table(runs)
    titles, row = tables(text)["each at its best rate"]
    best = dict(zip(titles, row, strict=True))
    assert (best["lr"], best["eval after"], best["held out"]) == ("0.0001", "0.2000", "0.3000")


@pytest.mark.parametrize(
    ("summary", "value"),
    [
        ({"eval_loss_after": 0.5, "eval_loss_result": 0.4}, 0.4),
        ({"eval_loss_result": 0.4, "holdout_loss_after": 0.6}, 0.6),
        ({"eval_loss_result": 0.4, "holdout_loss_after": 0.6, "holdout_loss_result": 0.3}, 0.3),
        ({"eval_loss_result": None, "holdout_loss_result": 0.3}, math.inf),
    ],
)
def test_a_sweeper_minimises_what_ranks_the_runs(summary, value):
    assert objective(summary) == value


def test_runs_with_several_seeds_have_a_mean_and_a_spread():
    losses = {("optim=a", 0): 0.1, ("optim=a", 1): 0.3, ("optim=b", 0): 0.15, ("optim=b", 1): None}
    runs = [
        NUMBERS | {"overrides": [name, f"seed={seed}"], "seed": seed, "eval_loss_after": loss}
        for (name, seed), loss in losses.items()
    ]
    text = sweep_table(runs)
    assert column(text, "over seeds", "eval after") == {
        "optim=a": "0.2000 ± 0.1414",
        "optim=b": "0.1500",
    }
    assert "over seeds" not in tables(sweep_table([run for run in runs if run["seed"] == 0]))


def test_losses_that_only_some_runs_have_get_a_column_where_one_has_them():
    plain = NUMBERS | {"overrides": ["a"], "eval_loss_after": 0.2}
    failed = {"overrides": ["b"], "optimizer": "b", "error": "no"}
    assert "held out" not in sweep_table([plain, failed])
    assert "\n\n- optim=b failed: no" in sweep_table([failed])
    table = sweep_table([plain, failed, plain | {"overrides": ["c"], "holdout_loss_after": 0.25}])
    assert column(table, "run", "held out") == {"a": "", "c": "0.2500", "b": ""}


FAILED = "no finite loss"
RATES = "each optimizer ran at one learning rate"


def sweep_of(losses, lr=1e-3, **more):
    """Summaries of {optimizer: one loss per seed}, or {(optimizer, lr): ...}; FAILED is no loss."""
    runs = []
    for key, found in losses.items():
        (name, rate), swept = (key, True) if isinstance(key, tuple) else ((key, lr), False)
        rates = [f"optim.lr={rate:g}"] if swept else []
        for seed, loss in enumerate(found):
            run = {"overrides": [f"optim={name}", *rates, f"seed={seed}"], "seed": seed}
            run |= {"optimizer": name, "lr": rate}
            ended = (
                {"error": loss} if loss == FAILED else NUMBERS | {"eval_loss_after": loss} | more
            )
            runs.append(run | ended)
    return runs


def test_an_optimizer_that_fails_with_some_seeds_comes_after_those_that_never_do():
    losses = {
        "sgd": [FAILED, FAILED, FAILED],
        "lion": [0.29, FAILED, FAILED],
        "adamw": [0.30, 0.32, 0.31],
    }
    text = sweep_table(sweep_of(losses))
    ended = column(text, "over seeds", "ended well")
    assert list(ended.items()) == [
        ("optim=adamw", "3 of 3"),
        ("optim=lion", "1 of 3"),
        ("optim=sgd", "0 of 3"),
    ]
    assert column(text, "over seeds", "eval after")["optim=sgd"] == "failed"
    assert set(column(text, "over seeds", "lr").values()) == {"0.001"}


def test_over_seeds_memory_is_the_largest_and_what_is_counted_the_sum():
    runs = sweep_of({"adamw": [0.3, 0.4]}, loss_spikes=2)
    runs[0] |= {"peak_training_bytes": 5000}
    text = sweep_table(runs)
    assert column(text, "over seeds", "peak in training") == {"optim=adamw": "5.0 kB"}
    assert column(text, "over seeds", "spikes") == {"optim=adamw": "4"}


def test_every_run_tells_its_rate():
    text = sweep_table(sweep_of({"adamw": [0.3], "lion": [FAILED]}))
    assert column(text, "run", "lr") == {"optim=adamw": "0.001", "optim=lion": "0.001"}
    text = sweep_table(sweep_of({"prodigy": [0.3]}, lr=1.0, rate_found=0.00042))
    assert column(text, "run", "lr") == {"optim=prodigy": "1 x 0.00042"}


@pytest.mark.parametrize(
    ("losses", "lr", "note"),
    [
        ([0.5, 0.3, 0.4], "0.001", ""),
        ([0.2, 0.3, 0.4], "0.0001", "the lowest tried: a lower one may be better"),
        ([0.5, 0.3, 0.2], "0.01", "the highest tried: a higher one may be better"),
        ([0.5, 0.3, FAILED], "0.001", ""),
    ],
)
def test_where_rates_were_swept_each_optimizer_has_its_best_one(losses, lr, note):
    tried = {("adamw", 10 ** (place - 4)): [loss] for place, loss in enumerate(losses)}
    text = sweep_table(sweep_of(tried | {("lion", 1e-4): [0.9]}))
    title = "each at its best rate"
    assert column(text, title, "lr") == {"optim=adamw": lr, "optim=lion": "0.0001"}
    assert column(text, title, "note") == {
        "optim=adamw": note,
        "optim=lion": "one rate only: another may be better",
    }
    assert column(text, title, "rates tried")["optim=adamw"] == "0.0001, 0.001, 0.01"
    assert column(text, title, "optimizer state")["optim=lion"] == "10 B"
    assert "at one learning rate" not in text


def configured(overrides, seed=0, loss=0.1, rate=1e-3, **more):
    config = {"seed": seed, "optim": {"name": "a", "lr": rate}} | more
    known = {"optimizer": "a", "lr": rate, "seed": seed, "eval_loss_after": loss}
    return NUMBERS | known | {"overrides": overrides, "config": config}


def test_groups_are_told_by_configurations_and_called_by_the_shortest_of_their_overrides():
    runs = [
        configured(["optim.lr=0.001", "optim=a", "log.every=2"], 0, 0.1),
        configured(["optim=a", "optim.lr=1e-3", "seed=1"], 1, 0.2),
        configured(["optim=a", "seed=2"], 2, 0.3),  # 1e-3 is its default
        configured(["optim=a", "optim.lr=1e-4"], 0, 0.9, rate=1e-4),
    ]
    text = sweep_table(runs)
    assert column(text, "over seeds", "ended well") == {
        "optim=a": "3 of 3",
        "optim.lr=1e-4": "1 of 1",
    }
    assert column(text, "each at its best rate", "rates tried") == {"optim=a": "0.0001, 0.001"}
    assert list(column(text, "run", "lr")) == [
        *(f"optim=a seed={seed}" for seed in range(3)),
        "optim.lr=1e-4 seed=0",
    ]


def test_what_overrides_do_not_tell_apart_is_told_by_the_options():
    runs = [
        configured(["optim=a"], loss=0.1, loss_of={"kind": "mse"}),
        configured(["optim=a"], loss=0.2, loss_of={"kind": "huber"}),  # from another version
    ]
    assert list(column(sweep_table(runs), "run", "lr")) == [
        "optim=a loss_of.kind=mse",
        "optim=a loss_of.kind=huber",
    ]


def test_groups_of_the_same_overrides_that_differ_by_their_rate_have_names_of_their_own():
    """As with optim.lr=${seed}, or a preset that was edited in between."""
    runs = [configured(["optim=a"], 0, rate=1e-3), configured(["optim=a"], 1, rate=0.5)]
    names = list(column(sweep_table(runs), "run", "lr"))
    assert names == ["optim=a optim.lr=0.001 seed=0", "optim=a optim.lr=0.5 seed=1"]
    unknown = [configured(["optim=a"]) | {"config": {}} for _ in range(2)]
    assert len(Comparison([*unknown, *runs]).groups) == 3


def test_an_option_that_is_null_is_as_one_that_did_not_exist_yet():
    runs = [
        configured(["optim=a"], seed, model={"variant": None} if seed else {}) for seed in (0, 1)
    ]
    assert column(sweep_table(runs), "over seeds", "ended well") == {"optim=a": "2 of 2"}


def test_a_rate_that_could_not_be_resolved_is_a_row_like_others():
    failed = {"overrides": ["optim=a", "optim.lr=${eval:1e-4}"], "seed": 0, "error": "no"}
    text = sweep_table([*sweep_of({"a": [0.1]}), failed])
    assert column(text, "run", "lr")["optim.lr=${eval:1e-4}"] == ""


def external(*paths):
    """Runs of external optimizers, and one of the family."""
    made = [["optim=external", f"optim.class_path={path}"] for path in paths]
    return [
        NUMBERS
        | {"overrides": [*given, "seed=0"], "seed": 0, "lr": 1e-3, "eval_loss_after": 0.1 + place}
        | {"optimizer": given[0].partition("=")[2]}
        for place, given in enumerate([*made, ["optim=lion"]])
    ]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["lion_pytorch.Lion"], ["optim=Lion", "optim=lion"]),
        (["a.b.One", "'c.Two'"], ["optim=One", "optim=Two", "optim=lion"]),
        (["a.One", "b.One", "c.Two"], ["optim=a.One", "optim=b.One", "optim=Two", "optim=lion"]),
    ],
)
def test_an_external_optimizer_is_called_by_its_class(paths, names):
    text = sweep_table(external(*paths))
    assert list(column(text, "run", "lr")) == names
    assert RATES in text
    # Several classes count as several optimizers, even without one of the family.
    assert (RATES in sweep_table(external(*paths)[:-1])) == (len(paths) > 1)


def test_numbers_end_at_the_right_and_names_begin_at_the_left():
    titles, rule, *_ = sweep_table(sweep_of({"adamw": [0.3], "lion": [0.5]})).splitlines()
    assert rule.startswith("|---")
    assert rule.split("|")[1].endswith("-")
    assert all(part.endswith("-:") for part in rule.split("|")[2:-1])
    assert len(titles) == len(rule)


def test_a_bar_in_the_name_of_a_run_ends_no_cell():
    titles, _, row, *_ = sweep_table(sweep_of({"a|b": [0.3], "c": [0.5]})).splitlines()
    assert r"| optim=a\|b |" in row
    assert len(row) == len(titles)
