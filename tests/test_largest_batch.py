"""The planner's search for the largest batch that fits: `trainer/planner/largest_batch.py`."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trainer import planner
from trainer.planner import __main__ as planner_command
from trainer.planner import largest_batch
from trainer.planner.__main__ import _completed, _plan

UNSEEN = "log.sample_count=0"
GB = 10**9
SHAPES = {  # batch size -> peak in GB
    "line": lambda size: 5 + 0.6 * size,
    "gradients first": lambda size: max(9, 3 + 0.6 * size),
    "share of libraries": lambda size: 1.15 * (1 + size) if size < 3 else 2 + size,
    "whole blocks": lambda size: 5 + round(0.6 * size, 1),
    "constant": lambda size: 5,
}


def found(shape, free, size=1):
    """Search in a made-up model -> its result, and the sizes that were planned for it."""
    tried = []

    def plan(size):
        tried.append(size)
        peak = round(SHAPES[shape](size) * GB)
        needed = round(1.05 * peak)
        return SimpleNamespace(
            config=SimpleNamespace(data=SimpleNamespace(batch_size=size)),
            training_bytes=peak,
            needed_bytes=needed,
            fits=lambda room: needed <= room.free_bytes,
            fragmented=0.05,
        )

    room = planner.Room(free_bytes=round(free * GB), where="a card")
    first = plan(size)
    return largest_batch.find(first, room, plan), tried


def sizes(result):
    return tuple(
        plan and plan.config.data.batch_size for plan in (result.fitting, result.too_large)
    )


@pytest.mark.parametrize("size", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("free", [5, 5.9, 8, 9.5, 12, 24, 80])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_batch_is_planned_and_so_is_its_successor(shape, free, size):
    most = max(size, largest_batch.LIMIT)
    fitting = [n for n in range(1, most + 1) if 1.05 * SHAPES[shape](n) <= free]
    best = max(fitting, default=None)
    result, tried = found(shape, free, size)
    assert sizes(result) == (best, None if best == most else (best or 0) + 1)
    assert len(tried) == len({*tried})


@pytest.mark.parametrize(("size", "most"), [(1, 4), (4, 4), (40, 4)])
def test_where_the_peak_is_a_line_three_more_rehearsals_are_enough(size, most):
    for free in (8, 10, 12, 16, 24, 48):
        result, tried = found("line", free, size)
        assert result.fitting
        assert len(tried) <= most, (free, tried)


def test_the_answer_has_both_needs_or_says_what_was_not_tried():
    says = {
        (8, 1): "the largest data.batch_size that fits is 4 (7.8 GB); 5 needs 8.4 GB",
        (5, 9): "no data.batch_size fits: 1 needs 5.9 GB",
        (999, 1): "data.batch_size=256 fits (166.5 GB), and larger ones were not tried",
    }
    for (free, size), said in says.items():
        assert str(found("line", free, size)[0]) == said


@pytest.fixture
def command(monkeypatch, capsys):
    """Call it as from a shell: command("optim=lion") -> exit status, stdout."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer.planner", *arguments, "--largest-batch"])
        with pytest.raises(SystemExit) as left:
            planner_command.main()
        return left.value.code, capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def a_plan():
    return _plan(_completed([UNSEEN])[1], "cuda")


@pytest.fixture
def planned(a_plan, monkeypatch):
    """Every run needs what that plan says, but activations in proportion to its batch size, because
    a rehearsal takes seconds; -> the planned configurations."""
    configs = []

    def plan(config, device_type):
        configs.append(config)
        training = replace(a_plan.rehearsal.training, activations=config.data.batch_size * 10**7)
        rehearsal = replace(a_plan.rehearsal, training=training)
        resident = 10**8 * len(configs) if device_type == "cpu" else 0
        return replace(a_plan, config=config, rehearsal=rehearsal, process_bytes=resident)

    monkeypatch.setattr(planner_command, "_plan", plan)
    return configs


def test_the_command_plans_it_without_drawing_whether_the_run_fits_or_not(command, planned):
    for size, status in ((2, 0), (40, 1)):
        planned.clear()
        options = ("optim=adafactor8bit", "log.prompts=[a]", f"data.batch_size={size}")
        code, out = command(*options, "--json", "--card", "0.56")
        numbers = json.loads(out)
        assert (code, numbers["largest_batch"]["batch_size"]) == (status, 7)
        assert numbers["largest_batch"]["needed"] <= numbers["free"]
        assert {7, 8} <= {config.data.batch_size for config in planned}
        given, *tried = planned
        assert given.log.prompts
        assert not any(config.log.prompts or config.log.sample_count for config in tried)


def test_it_is_a_line_below_the_verdict_or_the_end_of_a_sweeps_line(command, planned, monkeypatch):
    monkeypatch.setattr(largest_batch, "LIMIT", 2)
    says = r"data\.batch_size=2 fits \(.* MB\), and larger ones were not tried"
    _, out = command("data.batch_size=1", UNSEEN)
    assert re.fullmatch(says, out.splitlines()[-1])
    _, out = command("-m", "data.batch_size=1,2", UNSEEN)
    first, second = out.splitlines()
    assert re.fullmatch(f"data.batch_size=1: fits: a run needs .* free; {says}", first)
    assert re.fullmatch(f"data.batch_size=2: fits: a run needs .* free; {says}", second)


def test_on_a_cpu_it_counts_this_process_as_the_plan_does(command, planned, monkeypatch):
    """Though rehearsals add to what the process uses."""
    monkeypatch.setattr(largest_batch, "LIMIT", 2)
    _, out = command("data.batch_size=1", UNSEEN, "--json")
    numbers = json.loads(out)
    more = numbers["largest_batch"]["needed"] - numbers["needed"]
    assert 10**7 <= more < 1.2 * 10**7  # a picture's activations, and 5 % for fragmentation
    assert numbers["in_training"]["process"] == 10**8


def test_without_it_nothing_more_is_planned(planned, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer.planner", UNSEEN])
    with pytest.raises(SystemExit):
        planner_command.main()
    assert len(planned) == 1
    assert "largest" not in capsys.readouterr().out


def test_rehearsals_of_two_sizes_are_as_far_apart_as_the_plans_of_their_runs(command, monkeypatch):
    monkeypatch.setattr(largest_batch, "LIMIT", 2)
    options = ("method.train=[unet]", "data.resolution=32", UNSEEN, "--card", "8")
    _, out = command(*options, "data.batch_size=1", "--json")
    two = json.loads(out)["largest_batch"]
    monkeypatch.setattr(largest_batch, "LIMIT", 1)
    _, out = command(*options, "data.batch_size=2", "--json")
    assert two == {"batch_size": 2, "needed": json.loads(out)["needed"]}
