"""The benchmark: it runs end to end, its sample is representative, its instruments work.  No test
asserts a speed."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from torch.nn import Parameter

sys.path.insert(0, str(REPOSITORY / "scripts"))
import bench_optim
from bench import candidates, memory, shapes


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "bench_optim.py", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_quick_run_writes_its_table_its_json_and_its_chart(tmp_path):
    ours = ["adamw_factored", "adafactor8bit:clip_threshold=none"]
    peers = ["torch/adamw-fused", "torch/adafactor"]
    files = ["--json", "bench.json", "--png", "bench.png"]
    done = run("--quick", "--ours", *ours, "--peers", *peers, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stderr

    names = {"adamw_factored", "adafactor8bit clip_threshold=none", *peers}
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {line.split("|")[1].strip(" *") for line in table[2:]} == names
    assert len({line.count("|") for line in table}) == 1

    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["slice"]["params"] == pytest.approx(1e6, rel=0.1)
    assert content["clock"] == "process CPU time"
    assert content["skipped"] == {}
    rows = {row["name"]: row for row in content["rows"]}
    assert set(rows) == names
    for row in rows.values():
        assert row["rounds"] == 2
        assert min(row["ratio"], row["ratio_best"], row["seconds"], row["tiny_ratio"]) > 0
    fused = rows["torch/adamw-fused"]  # two bf16 moments, plus torch's step counters
    assert fused["state_per_param"] == pytest.approx(4, rel=1e-3)
    assert fused["ideal_per_param"] == pytest.approx(14, rel=1e-3)

    with Image.open(tmp_path / "bench.png") as chart:
        chart.load()
    assert len(set(chart.resize((64, 64)).getdata())) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ours", "adamw_fractured"], "no optimizer 'adamw_fractured'; there are: sgd, adamw"),
        (["--ours", "lion:beta9=1"], "lion has no option 'beta9'; it has: lr"),
        (["--peers", "pytorch"], "no peer 'pytorch'; there are: none, torch/adamw-fused"),
        (["--quick", "--check"], "use --check without"),
        (["--isa", "baseline", "--check"], "use --isa avx2 or avx512"),
    ],
)
def test_a_wrong_option_is_refused_with_what_there_is(arguments, message, capsys):
    def choose():
        options = bench_optim.parse(arguments)
        return candidates.ours(options.ours, options.backend), candidates.peers(options.peers)

    with pytest.raises((SystemExit, candidates.UnknownCandidate)) as refusal:
        choose()
    assert message in str(refusal.value) + " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("wanted", [1e6, 8.2e6, 30e6, 98e6])
def test_the_sample_keeps_the_size_asked_for_and_the_unets_mix(wanted):
    pick, whole = shapes.sample(wanted), shapes.mix(shapes.unet())
    assert shapes.num_params(pick) == pytest.approx(wanted, rel=0.05)
    assert len(pick) >= shapes.MIN_TENSORS
    tolerance = 0.02 if wanted > 25e6 else 0.1  # truncated shapes change the mix
    for kind, share in shapes.mix(pick).items():
        assert share == pytest.approx(whole[kind], abs=tolerance)
    if wanted > 25e6:
        assert set(pick) <= set(shapes.unet())


def test_a_loras_matrices_are_those_of_all_attention_projections():
    """70 transformer blocks with two attentions, each with four projections."""
    matrices = shapes.lora(4)
    assert len(matrices) == 70 * 2 * 4 * 2
    assert all(
        down[0] == up[1] == 4 for down, up in zip(matrices[::2], matrices[1::2], strict=True)
    )
    assert {down[1] for down in matrices[::2]} == {640, 1280, 2048}  # 2048: of captions


def test_the_tiny_set_has_every_tensor_of_the_unet_and_no_large_one():
    assert len(shapes.tiny()) == 1680
    assert max(map(math.prod, shapes.tiny())) <= 32 * 32 * 9


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux")
def test_temporary_memory_is_seen_even_where_malloc_had_it_before():
    size = 24 << 20

    def step():
        torch.ones(size, dtype=torch.uint8)

    cpu = torch.device("cpu")
    step()
    if memory.peak_temporary(step, cpu) is None:
        pytest.skip("this container does not let a process reset its peak memory")
    assert memory.peak_temporary(step, cpu) == pytest.approx(size, rel=0.1)
    assert memory.peak_temporary(lambda: None, cpu) < size / 10


def test_state_that_two_parameters_share_counts_once():
    params = [Parameter(torch.zeros(8)) for _ in range(2)]
    optimizer = torch.optim.SGD(params)
    table = torch.zeros(256)
    for p in params:
        optimizer.state[p] = {"codes": torch.zeros(8, dtype=torch.uint8), "table": table, "t": 3}
    assert memory.state_bytes(optimizer) == 2 * 8 + 1024


def row(name, **values):
    measured = {"name": name, "ours": True, "ratio": 0.65, "tiny_ratio": 0.4, "scaling": 1.7}
    return SimpleNamespace(**measured | values)


@pytest.mark.parametrize(
    ("changed", "threads", "isa", "missed"),
    [
        ({}, 1, "avx512", []),
        ({"ratio": 0.72}, 1, "avx512", ["adafactor8bit"]),
        ({"ratio": 0.72}, 1, None, ["adafactor8bit"]),  # unknown: the strictest target
        ({"ratio": 0.72}, 1, "avx2", []),
        ({"tiny_ratio": 0.6}, 1, "avx2", ["adafactor8bit, tiny tensors"]),
        ({"scaling": 1.0}, 1, "avx512", []),  # judged with several threads only
        ({"scaling": 1.0}, 2, "avx512", ["adafactor8bit, 2 threads"]),
        ({"scaling": None}, 2, "avx512", ["adafactor8bit, 2 threads"]),
        ({"ratio": float("nan")}, 1, "avx512", ["adafactor8bit"]),
        (
            {"name": "adafactor8bit clip_norm=lagged"},
            1,
            "avx512",
            ["adafactor8bit was not measured"],
        ),
        ({"ours": False}, 1, "avx512", ["adafactor8bit was not measured"]),
    ],
)
def test_a_target_is_missed_by_what_is_slower_or_was_not_measured(changed, threads, isa, missed):
    others = [row(name) for name in bench_optim.SLICE_TARGETS if name != "adafactor8bit"]
    rows = [*others, row(**{"name": "adafactor8bit"} | changed)]
    verdicts = bench_optim.judge(rows, threads, isa)
    assert [line.split(":")[0] for met, line in verdicts if not met] == missed


def test_every_optimizer_with_a_target_is_in_the_family():
    assert {c.name for c in candidates.ours(list(bench_optim.SLICE_TARGETS), "auto")} == set(
        bench_optim.SLICE_TARGETS
    )
