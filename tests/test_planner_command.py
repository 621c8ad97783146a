"""`python -m trainer.planner`: its text, its numbers, its exit status."""

import json
import re
import sys
import threading

import pytest

from trainer.checks.validate import to_dataclasses
from trainer.cli import compose
from trainer.cli.command import told_if_long
from trainer.errors import UserError
from trainer.planner.__main__ import _completed, _gigabytes, main

FUSED = ("runtime.fused_backward=true", "method.clip=exact")
CHECKPOINTING = "runtime.gradient_checkpointing=true"
UNSEEN = "log.sample_count=0"  # the rehearsal of drawing takes as long as that of training


@pytest.fixture
def command(monkeypatch, capsys):
    """Call it as from a shell: command("optim=lion") -> exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer.planner", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return call


def test_a_run_to_resume_is_planned_with_its_options(command, tmp_path):
    options = ["method=lora", "optim=adamw", "data.resolution=32", UNSEEN]
    (tmp_path / "checkpoint.json").write_text(json.dumps({"overrides": options}))
    _, out, _ = command(f"resume={tmp_path}")
    assert out.startswith("method=lora")
    assert "optim=adamw, 32 px" in out


def test_the_command_says_whether_it_fits(command):
    status, out, _ = command("optim=adamw", UNSEEN)
    assert status == 0
    assert "fits: a run needs" in out
    assert "optimizer state          22.0 MB" in out
    assert "fragmentation" not in out  # on a CPU
    status, out, _ = command("optim=adamw", UNSEEN, "--card", "0.56")
    assert status == 1
    assert re.search(
        r"does not fit: a run needs .* \(the peak and 5% for fragmentation\), and", out
    )
    assert "model.dtype=bfloat16" in out.partition("options that need less")[2]
    assert out.count("  fits  ") == 1


@pytest.mark.parametrize(
    ("given", "times"),
    [
        ([], 1),
        (["experiment=sdxl_lora", "optim=lion"], 1),
        (["model=sdxl", "data.resolution=512"], 2),  # with data=folder
        (["data=folder", "data.sources=[{path: .}]"], 1),
    ],
)
def test_paths_that_a_plan_does_not_need_are_filled_in_without_composing_again(
    given, times, monkeypatch
):
    calls, composition = [], compose.composition
    monkeypatch.setattr(compose, "composition", lambda *a: calls.append(a) or composition(*a))
    overrides, config = _completed(given)
    assert len(calls) == times
    assert config == to_dataclasses(compose.composed(overrides))


@pytest.mark.parametrize("size", ["8", "8GB", "8 GB", "8g", "8.0GiB"])
def test_a_card_has_its_size_with_or_without_a_unit(size):
    assert _gigabytes(size) == 8


def test_what_takes_long_is_told_on_stderr(capsys, monkeypatch):
    class Timer(threading.Timer):
        """Its time is up when the test says so."""

        def start(self):
            timers.append(self)

        def is_up(self):
            if not self.finished.is_set():
                self.function()

    timers = []
    monkeypatch.setattr(threading, "Timer", Timer)
    with told_if_long("planning"):
        pass
    timers[0].is_up()
    assert capsys.readouterr().err == ""
    with told_if_long("planning"):
        timers[1].is_up()
    assert capsys.readouterr().err == "planning ...\n"


def test_a_remedy_without_an_option_that_is_given_is_passed_over(command):
    taken = ("model.dtype=bfloat16", "data.batch_size=1", CHECKPOINTING, *FUSED, UNSEEN)
    status, out, err = command("optim=adamw8bit", "optim.betas=[0.9,0.99]", *taken, "--card", "0.1")
    assert status == 1
    assert "error" not in err
    assert "optim=adafactor8bit" not in out  # it has no betas
    assert "method=lora" in out.partition("options that need less")[2]  # the next remedy


def test_the_command_has_numbers(command):
    status, out, _ = command("optim=lion", UNSEEN, "--json", "--card", "8")
    found = json.loads(out)
    assert status == 0
    assert found["in_training"]["optimizer_state"] > 4 * 2_743_620
    assert found["training"] <= found["needed"] <= found["free"]


def test_a_sweep_has_a_line_for_each_run(command):
    status, out, _ = command("-m", "optim=adamw,lion", "seed=0,1", "data.batch_size=4", UNSEEN)
    assert status == 0
    lines = out.splitlines()
    names = [f"optim={name} seed={seed}" for name in ("adamw", "lion") for seed in (0, 1)]
    assert [line.partition(": ")[0] for line in lines] == names
    assert all(": fits: a run needs" in line for line in lines)
    status, out, _ = command(
        *("optim=adamw,adafactor8bit", UNSEEN, "--multirun", "--json", "--card", "0.56")
    )
    assert status == 1
    plans = [json.loads(line) for line in out.splitlines()]
    assert [plan["overrides"] for plan in plans] == [["optim=adamw"], ["optim=adafactor8bit"]]
    states = [plan["in_training"]["optimizer_state"] for plan in plans]
    assert states[0] > 100 * states[1]


def test_the_runs_of_a_sweep_are_those_that_hydra_makes():
    compose.register()
    runs = compose.runs_of(["seed=range(0,2)", "+optim.foo=1,2", "method=lora"])
    assert runs == [
        [f"seed={seed}", f"+optim.foo={foo}", "method=lora"] for seed in (0, 1) for foo in (1, 2)
    ]
    assert compose.runs_of(["sweep=optimizers"])[1] == ["optim=adamw", "sweep=optimizers"]
    both = compose.runs_of(["optim=adamw,lion", "optim.betas=[0.9,0.99]"])  # not Adafactor's
    assert both == [[f"optim={name}", "optim.betas=[0.9,0.99]"] for name in ("adamw", "lion")]
    chosen = ["sweep=optimizers", "optim=lion"]
    assert compose.runs_of(chosen) == [chosen]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "optim=adamw,lionn"), "did you mean 'lion'?"),
        (("-m", "data.path=/a=b"), "this value needs quotes"),
        (("-m", 'name=a=",b'), r"""write 'name="a=\",b"'"""),
        (("-m", "optim.lrr=1"), "did you mean 'lr'?"),
        (("--card", "-1"), "-1 is not above 0"),
        (("--card", "big"), "invalid float value: 'big'"),
        (("--card", "4080"), "4080: it is the size of the GPU's memory in GB, such as 16"),
        (("optim=adamv",), "did you mean 'adamw'?"),
        (("method=lora", "method.targets=[nothing]"), "nothing matches no linear"),
        (("model.path=/nowhere",), "model.path=/nowhere does not exist"),
        (("noise.flow_shift=3",), "noise.flow_shift=3 is for flow matching"),
        (("noise.prediction=epsilon",), "epsilon prediction has nothing to predict from"),
        (("noise.timestep_high=2000",), "the model has timesteps in [0, 1000)"),
    ],
)
def test_a_wrong_option_is_one_line(command, arguments, says):
    status, _, error = command(*arguments)
    assert status == 2
    assert says in error


@pytest.mark.parametrize("swept", ["optim=glob(a*)", "optim.lr=interval(0,1)"])
def test_a_sweep_that_only_a_sweeper_can_list_is_one_line(swept):
    with pytest.raises(UserError, match=r"the planner supports lists, choice\(\) and range\(\)"):
        compose.runs_of([swept])
