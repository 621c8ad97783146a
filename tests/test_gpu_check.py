"""scripts/gpu_check.py without a GPU: it says so, judges given results, and its checks pass for
kernels compiled for the host and fail for broken ones."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from cuda_host import Host, on_host

import optim
from optim import cuda, gpu, native, newton_schulz

sys.path.insert(0, str(REPOSITORY / "scripts"))
import gpu_check
from bench import cases, checks, gpu_measures, graph, outcomes, sanitizer, shapes
from bench.outcomes import Finding, Section, Skip
from bench.subject import Subject
from bench.workload import Workload

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="it is not built")
DEADLINE = float("inf")
FEW = [case for case in checks.REPEATED if case.name in ("adamw_factored", "adafactor8bit", "sgd")]


# The script ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2_from_anywhere(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "gpu_check.py", "--json", "x.json"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "there is no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_what_compiles_its_kernels_is_no_pass(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "unavailable", lambda: "no cuda-core; pip install it")
    assert gpu_check.main([]) == 2
    assert "pip install it" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--only", "seed"), ("--seconds", "0")])
def test_a_wrong_option_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse([option, value])
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_sections_are_run_in_order_and_only_those_asked_for(host_subject):
    args = gpu_check.parse(["--only", "sync", "compile"])
    assert [x.name for x in gpu_check.sections(host_subject, args)] == ["compile", "sync"]
    names = [x.name for x in gpu_check.sections(host_subject, gpu_check.parse([]))]
    assert names == list(gpu_check.CLAIMS)


# Verdicts -----------------------------------------------------------------------------------------


def outcomes_of(*found, budget=100.0, least=1.0):
    def check(deadline):
        one = found[check.at]
        check.at += 1
        if isinstance(one, Exception):
            raise one
        return one

    check.at = 0
    said = []
    sections = [Section(f"s{i}", "a | claim", least, check) for i in range(len(found))]
    return outcomes.run(sections, budget, said.append), said


HOLDS = Finding(holds=True, line="12 things", facts={"n": 12}, tables=["| a |"])
FAILS = Finding(holds=False, line="1 of 12 is wrong")


def test_every_section_gets_its_verdict_whatever_the_others_do():
    found, said = outcomes_of(HOLDS, RuntimeError("broken\nmore"), Skip("no tool"), FAILS, HOLDS)
    assert [x.verdict for x in found] == ["PASS", "FAIL", "SKIPPED", "FAIL", "PASS"]
    assert found[1].line == "RuntimeError: broken"
    assert [line.split("]")[0].split()[0] for line in said] == [f"[{i}/5" for i in range(1, 6)]
    assert "SKIPPED s2: no tool" in said[2]
    assert outcomes.status(found) == 1
    assert outcomes.status([x for x in found if x.verdict != "FAIL"]) == 0


def test_what_no_longer_fits_is_skipped_and_says_so():
    found, said = outcomes_of(HOLDS, HOLDS, budget=5, least=10)
    assert {x.verdict for x in found} == {"SKIPPED"}
    assert "it needs 10 s, and 5 s are left" in said[0]


def test_the_report_has_facts_verdicts_tables_and_tracebacks():
    found, _ = outcomes_of(HOLDS, ValueError("oops"))
    facts = {"device": "made up", "torch": "1.0"}
    text = outcomes.markdown(found, facts)
    assert text.startswith("- device: made up\n- torch: 1.0\n\n| section | claim |")
    assert "| s0 | a \\| claim | PASS |" in text
    assert "**s0**\n\n| a |" in text
    assert "Traceback" in text
    content = json.loads(json.dumps(outcomes.as_json(found, facts)))
    assert content["device"] == "made up"
    assert [x["verdict"] for x in content["sections"]] == ["PASS", "FAIL"]
    assert content["sections"][0]["facts"] == {"n": 12}


def timing(name, seconds, **values):
    usual = {"ours": True, "alone": seconds * 2, "state_bytes": 10**7, "ideal_per_param": 6.0,
             "copy_share": 0.9}  # fmt: skip
    return gpu_measures.Timing(name=name, seconds=seconds, **usual | values)


def good_rows():
    return [timing(name, 4e-3) for name in (*gpu_measures.ONE_PASS, "adafactor8bit")]


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        (good_rows(), []),
        (good_rows()[1:], ["adamw_factored", "adamw_factored"]),  # not measured
        ([*good_rows()[:-1], timing("adafactor8bit", 8e-3)], ["adafactor8bit"]),
        ([*good_rows()[:-1], timing("adafactor8bit", float("nan"))], ["adafactor8bit"]),
        ([*good_rows()[1:], timing("adamw_factored", 4e-3, copy_share=0.7)], ["adamw_factored"]),
    ],
)
def test_a_target_is_missed_by_what_is_slower_or_was_not_measured(rows, missed):
    verdicts = gpu_measures.judge(rows, "NVIDIA H200", whole=True)
    assert [line.split(":")[0] for met, line in verdicts if not met] == missed


def test_targets_are_judged_on_the_device_and_the_size_they_are_for():
    assert gpu_measures.judge([], "NVIDIA H100 80GB HBM3", whole=True)
    assert not gpu_measures.judge(good_rows(), "NVIDIA GeForce RTX 4090", whole=True)
    assert not gpu_measures.judge(good_rows(), "NVIDIA H200", whole=False)


def test_rows_are_sorted_and_compared_with_torchs_fused_adamw():
    rows = [timing("slow", 3e-2, ours=False), timing(gpu_measures.REFERENCE, 1e-2, ours=False),
            timing("sgd", 5e-3)]  # fmt: skip
    gpu_measures.compare(rows)
    assert [(row.name, row.ratio) for row in rows] == [
        ("sgd", pytest.approx(0.5)),
        (gpu_measures.REFERENCE, 1.0),
        ("slow", pytest.approx(3.0)),
    ]
    lines = gpu_measures.times(rows).splitlines()
    assert lines[2].startswith("| **sgd** | 5.00 | 0.50 | 10.00 | 90% | 6.00 | 10.00 |")
    alone = [timing("sgd", 5e-3)]
    gpu_measures.compare(alone)
    assert "| nan |" in gpu_measures.times(alone)


def test_every_optimizer_measured_is_in_the_family():
    names = {name.partition(":")[0] for name in gpu_measures.OURS}
    assert names <= set(optim.FAMILY)
    assert set(gpu_measures.ONE_PASS) | set(gpu_measures.MOST_MS) <= set(gpu_measures.OURS)
    assert gpu_measures.REFERENCE in gpu_measures.candidates.PEERS


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_the_rules_of_one_pass_have_one(case):
    passes = max(sum(tiles for _, tiles in kind.passes()) for kind in cases.kinds_of(case))
    assert passes >= 1
    if case.name in gpu_measures.ONE_PASS and not case.options:
        assert passes == 1


@pytest.mark.slow
def test_the_model_is_scaled_down_to_the_memory_that_is_free():
    whole = shapes.num_params(shapes.unet())
    assert shapes.num_params(gpu_measures.pick(140 << 30, quick=False)) == whole
    room = 10 << 30
    fitting = shapes.num_params(gpu_measures.pick(room, quick=False))
    assert 0.9 * room < fitting * gpu_measures.BYTES_PER_PARAM < 1.1 * room
    quick = shapes.num_params(gpu_measures.pick(140 << 30, quick=True))
    assert quick == pytest.approx(gpu_measures.QUICK_PARAMS, rel=0.05)
    with pytest.raises(Skip, match=r"0\.1 GB of free"):
        gpu_measures.pick(10**8, quick=False)


# The checks, on kernels compiled for the host -----------------------------------------------------


class HostSubject(Subject):
    """The host's processor instead of a GPU."""

    def __init__(self, folder):
        self.device, self.native, self.folder = torch.device("cpu"), True, folder
        self.gpu = Host(folder)

    def fresh(self):
        return self.gpu

    def engines(self):
        return on_host(self.gpu)

    def wait(self):
        pass

    def side_stream(self):
        return contextlib.nullcontext()

    no_waiting = side_stream


@pytest.fixture(scope="module")
def host_subject(tmp_path_factory):
    return HostSubject(tmp_path_factory.mktemp("kernels"))


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        checks.compiles,
        checks.agrees_with_the_cpu,
        checks.repeats,
        checks.skips_nonfinite,
        checks.never_waits,
    ],
    ids=lambda check: check.__name__,
)
def test_a_check_holds_for_right_kernels(check, host_subject):
    few = FEW[:2] if check is checks.repeats else FEW  # it takes six runs per case
    finding = check(host_subject, few, DEADLINE)
    assert finding.holds, finding
    assert finding.line
    assert str(finding.facts.get("not_bitwise", {})) == "{}"


def test_kernels_that_are_compiled_again_are_noticed(host_subject, monkeypatch):
    def loaded(card, names):
        card.num_compiled += len(names)
        return dict.fromkeys(names)

    cards = [SimpleNamespace(num_compiled=0, here=contextlib.nullcontext) for _ in range(2)]
    for card in cards:
        card.load = partial(loaded, card)
    monkeypatch.setattr(host_subject, "fresh", iter(cards).__next__)
    finding = checks.compiles(host_subject, FEW[:1], DEADLINE)
    assert not finding.holds
    assert "0 of them from the disk" in finding.line


@needs_native
@pytest.mark.slow
def test_without_the_cpu_engine_plain_pytorch_is_near_enough(host_subject, monkeypatch):
    monkeypatch.setattr(host_subject, "native", False)
    finding = checks.agrees_with_the_cpu(host_subject, FEW, DEADLINE)
    assert finding.holds, finding
    assert "plain PyTorch" in finding.line
    assert finding.facts["not_bitwise"]


WRONG = {"lr": 0.02}


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "said"),
    [(checks.agrees_with_the_cpu, "weights"), (checks.repeats, "by step_param")],
)
def test_a_check_does_not_hold_for_another_step(check, said, host_subject, monkeypatch):
    made = []

    def make(case, device="cpu", **options):
        made.append(case)
        return cases.make(case, device, **options | (WRONG if len(made) % 2 == 0 else {}))

    monkeypatch.setattr(checks, "make", make)
    finding = check(host_subject, FEW[:1], DEADLINE)
    assert not finding.holds
    assert said in str(finding.facts["wrong"])


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "holds"), [(5, True), (4, False)])
def test_orthogonal_matrices_may_differ_by_what_bf16_explains(
    steps, holds, host_subject, monkeypatch
):
    on_a_gpu, real = itertools.cycle([False, True]), newton_schulz.orthogonalized

    def by_turns(x, usual):
        if not next(on_a_gpu):
            return real(x, usual)
        with checks.orthogonalizing_in(torch.bfloat16):
            return real(x, steps)

    monkeypatch.setattr(newton_schulz, "orthogonalized", by_turns)
    assert (not checks.wrong_directions(host_subject)) == holds


def test_a_gradient_that_is_used_though_it_cannot_be_is_noticed(host_subject, monkeypatch):
    monkeypatch.setattr(checks, "BAD", (1.0, float("nan")))
    finding = checks.skips_nonfinite(host_subject, FEW[:1], DEADLINE)
    assert not finding.holds
    assert "counted 3, not 6" in finding.line


@needs_native
@pytest.mark.slow
def test_launches_are_counted_and_the_counter_is_taken_off_again(host_subject):
    params, optimizer = cases.make(FEW[0])
    cases.set_grads(params, 0)
    with host_subject.engines():
        count = host_subject.launches(optimizer.step)
    per_kind = [len(kind.passes()) for kind in cases.kinds_of(FEW[0])]
    assert 0 < count <= sum(per_kind)
    assert "launch" not in vars(host_subject.gpu)


def test_what_is_over_time_says_how_far_it_came(host_subject):
    finding = checks.agrees_with_the_cpu(host_subject, FEW, time.monotonic() - 1)
    assert not finding.holds
    assert f"{len(FEW)} cases not reached" in finding.line


# Measurements ------------------------------------------------------------------------------------


class HostWatch:
    """Wall time instead of CUDA events."""

    bandwidth = 1e10

    def __init__(self, device, rounds):
        pass

    def on_device(self, call, prepare):
        prepare()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    alone = on_device


@pytest.fixture
def measured(host_subject, monkeypatch):
    """Replace what `gpu_measures` needs from CUDA, and shrink the UNet's tensors."""
    unet = gpu_measures.Unet(torch.device("cpu"), quick=True)
    unet._work = Workload(shapes.tiny(150), torch.bfloat16, unet.device)
    monkeypatch.setattr(gpu_measures, "OURS", ("adamw_factored", "adafactor8bit"))
    monkeypatch.setattr(gpu_measures, "ROOMS", (1, 1 << 20))
    monkeypatch.setattr(gpu_measures, "Stopwatch", HostWatch)
    monkeypatch.setattr(gpu_measures, "activities", lambda call: call())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with host_subject.engines():
        yield unet


@needs_native
@pytest.mark.slow
def test_launches_temporary_memory_and_buckets_are_measured(measured, host_subject, monkeypatch):
    few = gpu_measures.launches_are_few(host_subject, measured, DEADLINE)
    assert few.holds
    assert "the profiler saw nothing" in few.line
    assert all(0 < row["launches"] <= 32 for row in few.facts["rows"])
    monkeypatch.setattr(gpu_measures, "MOST_LAUNCHES", 2)
    assert not gpu_measures.launches_are_few(host_subject, measured, DEADLINE).holds

    for peak, holds in ((0, True), (10**6, False)):
        monkeypatch.setattr(gpu_measures, "peak_temporary", lambda call, device, peak=peak: peak)
        assert gpu_measures.holds_nothing_large(host_subject, measured, DEADLINE).holds == holds

    usual = cuda.ROOM
    finding = gpu_measures.waves(host_subject, measured, DEADLINE)
    small, large = finding.facts["rows"]
    assert small["launches"] > large["launches"]  # smaller buckets, so more of them
    assert usual == cuda.ROOM


@needs_native
@pytest.mark.slow
def test_times_are_taken_of_ours_and_of_peers_and_say_what_is_missing(measured, host_subject):
    peers = [gpu_measures.REFERENCE, "came_pytorch", "torch/adafactor"]
    finding = gpu_measures.is_fast(host_subject, measured, peers, DEADLINE)
    names = {row["name"] for row in finding.facts["rows"]}
    assert {"adamw_factored", "adafactor8bit", gpu_measures.REFERENCE} <= names
    assert finding.holds, finding  # samples of the UNet are not judged
    assert "not judged here" in finding.line
    reference = next(r for r in finding.facts["rows"] if r["name"] == gpu_measures.REFERENCE)
    assert reference["ratio"] == 1.0
    late = gpu_measures.is_fast(host_subject, measured, ["none"], time.monotonic() - 1)
    assert not late.holds
    assert "not measured: adamw_factored, adafactor8bit" in late.line


def test_the_model_that_a_graph_holds_trains_the_same_way_every_time():
    one, two = (graph.Training(torch.device("cpu"), "sgd") for _ in range(2))
    for training in (one, two):
        training.step()
    assert torch.equal(one.weights(), two.weights())
    assert not torch.equal(one.weights(), one.start)


@pytest.mark.parametrize(
    ("statuses", "holds", "said"),
    [
        ([0, 0], True, "memcheck clean; racecheck clean"),
        ([0, 9], False, "memcheck clean; racecheck not clean"),
        ([1, 0], False, "memcheck not clean; racecheck clean"),
        ([None, 0], True, "memcheck was not through in"),
    ],
)
def test_what_the_sanitizer_finds_is_a_failure(statuses, holds, said, monkeypatch, host_subject):
    answers = iter(statuses)

    def run(command, timeout, **_):
        assert command[0] == sanitizer.SANITIZER
        status = next(answers)
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr(sanitizer.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(sanitizer.subprocess, "run", run)
    finding = sanitizer.is_clean(host_subject, time.monotonic() + 60)
    assert finding.holds == holds
    assert said in finding.line


def test_without_the_sanitizer_it_is_skipped(monkeypatch, host_subject):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda tool: None)
    with pytest.raises(Skip, match="compute-sanitizer is not installed"):
        sanitizer.is_clean(host_subject, DEADLINE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_quick_check_passes():
    assert gpu_check.main(["--quick"]) == 0
