"""The length of a resumed run: longer, shorter, or already complete."""

import shutil

import pytest
import torch
from helpers import QUICK, assert_same_weights, rows
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.run import run
from trainer.storage import checkpoint, resuming


@pytest.mark.parametrize(
    ("before", "longer", "says"),
    [
        (["schedule=linear"], "schedule.steps=8", "goes on at 0.0005714, in a schedule of 8 steps"),
        (["schedule=linear", "schedule.epochs=0.6"], "schedule.epochs=1.3", "goes on at 0.0005714"),
        (["schedule=constant"], "schedule.steps=8", None),
    ],
)
def test_a_run_that_becomes_longer_says_where_its_rate_goes_on_and_needs_no_permission(
    finished, composed, caplog, before, longer, says
):
    folder = finished("run", *before)
    run(composed(*QUICK, *before, longer, f"resume={folder}"), folder)
    rates = [row["train/lr"] for row in rows(folder) if "train/lr" in row]
    assert len(rates) == 8
    assert "resuming with a changed configuration: schedule." in caplog.text
    if says:
        assert says in caplog.text
        assert "of 4 steps, had come to 0\n" in caplog.text
        assert f"{rates[4]:.4g}" in says
    else:
        assert "learning rate" not in caplog.text


@pytest.mark.parametrize(
    ("before", "shorter"),
    [([], "schedule.steps=3"), (["schedule.epochs=0.6"], "schedule.epochs=0.5")],
)
def test_a_run_that_becomes_shorter_needs_permission(finished, composed, before, shorter):
    folder = finished("run", *before, "runtime.save_every=2")
    shutil.rmtree(folder / "checkpoints/step-000004")
    options = [*QUICK, *before, shorter, f"resume={folder}"]
    with pytest.raises(UserError, match=r"would make the run shorter \(4 -> 3 steps\)"):
        run(composed(*options), folder)
    run(composed(*options, "runtime.allow_config_change=true"), folder)
    assert (folder / "checkpoints/step-000003").is_dir()


@pytest.mark.parametrize(("every", "kept"), [(2, [2, 4]), (3, [3])])
def test_the_result_of_a_run_that_becomes_longer_is_kept_where_an_export_was_due(
    quick, every, kept
):
    options = ["method=lora", f"method.export_every={every}", "name=cat"]
    folder = quick("run", *options)
    before = load_file(folder / "lora/cat.safetensors")
    quick("run", *options, "schedule.steps=5", f"resume={folder}")
    assert [checkpoint.step_of(path) for path in checkpoint.completed(folder / "results")] == kept
    if every == 2:
        old = load_file(folder / "results/step-000004/lora/cat-step-000004.safetensors")
        assert_same_weights(before, old)
    after = load_file(folder / "lora/cat.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("length", ["schedule.steps=4", "schedule.epochs=0.6"])
def test_a_run_that_is_complete_is_said_to_be_so_in_the_first_lines(
    finished, composed, caplog, length
):
    folder = finished("run", length)
    to_resume = ["optim.lr=0.5", "runtime.allow_config_change=true", f"resume={folder}"]
    (step,) = (path.name for path in (folder / "checkpoints").iterdir())
    caplog.clear()
    resuming.to_resume(composed(*QUICK, length, *to_resume))
    said = next(line for line in caplog.messages if "already complete" in line)
    assert f"step {int(step[-6:])} was its last" in said
    assert f"set {length.partition('=')[0]}=..., and to resume another run" in said
    caplog.clear()
    longer = length.partition("=")[0] + "=9"
    resuming.to_resume(composed(*QUICK, longer, *to_resume))
    assert "complete" not in caplog.text
