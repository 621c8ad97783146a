"""conf/experiment: the presets for large models."""

import pytest
from helpers import QUICK, assert_same_weights, weights

from trainer import config
from trainer.errors import UserError
from trainer.phases.assembly import assemble
from trainer.run import run
from trainer.storage import result, resuming

REAL = ("model.path=/", "data.path=/")
PRESETS = ("sdxl", "sdxl_lora", "sd15", "sd15_lora")
ON_TINY = ("model=tiny", "data=emoji24", "data.resolution=64", *QUICK)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_a_preset_works_on_the_tiny_model(composed, tmp_path, preset):
    made = composed(f"experiment={preset}", *ON_TINY)
    assert run(made, tmp_path / "run") < 2


@pytest.mark.parametrize(
    ("chosen", "lr"),
    [
        (["sdxl"], 1e-5),
        (["sdxl_lora"], 1e-4),
        (["sd15", "optim=lion"], 2e-6),
        (["sd15_lora", "optim=lion"], 2e-5),
        (["sdxl", "optim=prodigy_factored"], 1.0),
        (["large", "method=lora", "optim=peer/bnb_adamw8bit", "model=sdxl"], 1e-4),
        (["sdxl", "optim.lr=3e-5"], 3e-5),
    ],
)
def test_a_preset_begins_with_a_share_of_the_optimizers_rate(composed, monkeypatch, chosen, lr):
    monkeypatch.setattr("trainer.checks.validate._check_paths", lambda config: None)
    preset, *options = chosen
    made = composed(f"experiment={preset}", *REAL, *options)
    assert made.optim.lr == pytest.approx(lr)
    assert made.data.resolution == (512 if "15" in preset else 1024)


def test_every_preset_is_tried_here():
    others = {"large", "low_memory", "smoke"}
    assert set(config.choices_of("experiment")) == {*PRESETS, *others}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_results_in_between_are_kept_and_change_nothing(quick, method):
    chosen = (f"method={method}", "method.export=[diffusers]", "optim.lr=1e-3", "ema=bf16")
    whole = quick("whole", *chosen)
    folder = quick("run", *chosen, "method.export_every=2")
    assert_same_weights(weights(folder, 4), weights(whole, 4))
    kind = {"full": "model/unet/config.json", "lora": "lora/pytorch_lora_weights.safetensors"}
    assert (folder / "results/step-000002" / kind[method]).is_file()
    assert [path.name for path in (folder / "results").iterdir()] == ["step-000002"]
    assert (folder / kind[method]).is_file()


def test_only_the_newest_results_in_between_are_kept_if_the_run_says_how_many(quick):
    folder = quick("run", "method=lora", "method.export_every=1", "method.keep_exports=2")
    assert sorted(path.name for path in (folder / "results").iterdir()) == [
        "step-000002",
        "step-000003",
    ]
    assert (folder / "lora").is_dir()


def test_a_result_that_cannot_be_written_takes_no_other_ones_place(quick, monkeypatch):
    """Those of steps 2 and 3 fail; one of a later step, from before a resume, does not count."""
    write = result.write

    def failing(config, name, model, folder, step, pictures):
        written = write(config, name, model, folder, step, pictures)
        if step in (2, 3):
            raise UserError("no space left")
        (folder.parent / "step-000009").mkdir(exist_ok=True)
        return written

    monkeypatch.setattr(result, "write", failing)
    options = ("schedule.steps=5", "method.export_every=1", "method.keep_exports=2")
    folder = quick("run", "method=lora", *options)
    kept = sorted(path.name for path in (folder / "results").iterdir())
    assert kept == ["step-000001", "step-000004", "step-000009"]


def test_a_result_in_between_has_its_step_in_its_name(quick):
    folder = quick("run", "method=lora", "name=cats", "method.export_every=3")
    assert (folder / "results/step-000003/lora/cats-step-000003.safetensors").is_file()
    assert (folder / "lora/cats.safetensors").is_file()


def test_a_run_of_epochs_is_resumed_at_its_length(composed, tmp_path):
    """24 pictures in batches of 4: 6 steps per epoch."""
    options = ("schedule.epochs=0.5", "runtime.save_every=2")
    first = composed(*ON_TINY, *options)
    run(first, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step-000003").is_dir()
    checkpoint = tmp_path / "run/checkpoints/step-000002"
    again = composed(*ON_TINY, *options, f"resume={checkpoint}")
    run(again, tmp_path / "again")
    assert_same_weights(weights(tmp_path / "again", 3), weights(tmp_path / "run", 3))


def test_a_run_of_fewer_epochs_than_are_done_is_refused(composed, tmp_path):

    run(composed(*ON_TINY), tmp_path / "run")
    options = ("schedule.epochs=0.5", f"resume={tmp_path}/run", "runtime.allow_config_change=true")
    shorter = composed(*ON_TINY, *options)
    with pytest.raises(
        UserError, match=r"schedule\.epochs=0\.5, and the checkpoint is at 0\.666667"
    ):
        assemble(shorter, tmp_path / "again", resuming.to_resume(shorter))
