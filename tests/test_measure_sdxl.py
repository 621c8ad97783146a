"""The measurement script for the real UNet, run on a small one: its output is consistent."""

import json
import subprocess
import sys

from conftest import REPOSITORY

from trainer.config import ASSETS

sys.path.insert(0, str(REPOSITORY / "scripts"))
import measure_sdxl

TINY = ASSETS / "tiny_sdxl" / "unet" / "config.json"


def measured(capsys, *arguments):
    status = measure_sdxl.main(
        ["--unet", str(TINY), "--latent", "8x16", "--json", "--device", "cpu", *arguments]
    )
    return status, json.loads(capsys.readouterr().out)


def test_the_measured_unet_is_sdxls():
    config = json.loads(measure_sdxl.UNET.read_text())
    unet = measure_sdxl.empty_unet(measure_sdxl.UNET)
    assert config["sample_size"] == 128
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert len(list(unet.parameters())) == 1680


def test_a_measurement_trains_and_its_parts_add_up_to_the_peak(capsys):
    status, found = measured(capsys)
    assert status == 0
    held = dict(found["bytes"])
    peak = held.pop("peak")
    assert sum(held.values()) == peak
    assert held["weights"] == 2 * found["trained_parameters"] == 2 * 2_743_620
    assert held["gradients_alive"] < held["weights"] / 8
    assert 100_000 < held["optimizer_state"] < 150_000
    first, second = found["steps"]
    assert first["loss"] != second["loss"]
    assert first["grad_norm"] > 0


def test_options_of_the_trainer_are_taken(capsys):
    options = ["method=lora", "method.rank=4", "optim=adamw", "runtime.fused_backward=false"]
    _, found = measured(capsys, *options, "method.clip=global")
    assert found["method"] == "lora"
    assert found["optim"] == "adamw"
    held = found["bytes"]
    assert held["gradients_alive"] == 4 * found["trained_parameters"]  # adapters are fp32
    assert held["optimizer_state"] > 8 * found["trained_parameters"]


def test_a_peak_above_the_limit_is_a_failure(capsys):
    status, _ = measured(capsys, "--steps", "1", "--most-gb", "0.01")
    assert status == 1


def test_blocks_that_are_freed_go_back_to_the_system_where_the_model_is_large():
    """Every other of many 1 MB blocks is freed, in a new process because the allocator keeps its
    settings."""
    script = """
import torch
from trainer.system import memory
for _ in range(3):  # what makes the allocator keep such blocks by itself
    torch.ones(2 << 20)
told = [memory.return_freed_blocks(size) for size in (10 << 20, 2 << 30)]
blocks = [torch.ones(1 << 18) for _ in range(64)]
full = memory.resident_bytes()
del blocks[::2]
print(*told, full - memory.resident_bytes())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    small, large, freed = done.stdout.split()
    assert small == "False"
    assert (large == "True") == (int(freed) > 20 << 20)
