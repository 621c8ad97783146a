"""Resuming a stopped run: bitwise, in the right folder, with what it began with."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import new_process
from helpers import QUICK, assert_same_weights, deterministic, rows, weights
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file

from trainer.cli import arguments, compose
from trainer.config import ASSETS
from trainer.errors import UserError
from trainer.phases import stepping
from trainer.run import run
from trainer.storage import checkpoint, resuming, run_folder


def assert_same_states(a, b, step):
    """The states of both runs' optimizers after this step are bitwise equal."""
    path = f"checkpoints/step-{step:06d}/optimizer.pt"
    a, b = (torch.load(folder / path, weights_only=True)["state"] for folder in (a, b))
    for index, state in a.items():
        assert_same_weights(state, b[index])


@pytest.mark.slow
def test_resume_in_a_new_process_is_bitwise_identical(quick, tmp_path):
    """LoRA's is in `test_processes.py`."""
    options = ["model.dtype=bfloat16", "runtime.keep_checkpoints=9"]
    whole, parts = quick("whole", *options), quick("parts", *options, "runtime.save_every=2")
    shutil.rmtree(parts / "checkpoints/step-000004")  # as if killed after the checkpoint of step 2
    resumed = new_process(*QUICK, *options, "resume=parts", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 2" in resumed.stdout
    assert_same_weights(weights(whole, 4), weights(parts, 4))
    assert deterministic(whole) == deterministic(parts)
    assert_same_states(whole, parts, 4)


@pytest.mark.parametrize(
    "options",
    [
        [
            *("optim=prodigy_factored", "model.dtype=bfloat16", "optim.growth_rate=1.5"),
            *("noise.offset=0.1", "noise.pyramid=0.5", "noise.input_perturbation=0.1"),
            *("noise.timesteps=logit_normal", "loss=huber", "loss.schedule=snr"),
        ],
        [
            *("optim=sophia", "optim.hessian_every=3", "optim.storage=8bit"),
            *("loss.weighting=min_snr", "data.holdout=8"),
        ],
        [
            *("method=lora", "method.dropout=0.5", "runtime.accumulation=2"),
            "method.train=[unet,text_encoder]",
        ],
    ],
    ids=lambda x: x[0],
)
def test_what_all_parameters_share_what_is_done_now_and_then_and_dropout_go_on_bitwise(
    finished, composed, options
):
    """Prodigy's learning rate; Sophia's curvature, which is estimated in steps 1, 4 and 7."""
    options = [*options, "schedule=constant", "schedule.steps=8"]
    options += ["runtime.save_every=5", "runtime.keep_checkpoints=9"]
    whole, parts = finished("whole", *options), finished("parts", *options)
    shutil.rmtree(parts / "checkpoints/step-000008")
    run(composed(*QUICK, *options, f"resume={parts}"), parts)
    assert_same_weights(weights(whole, 8), weights(parts, 8))
    assert deterministic(whole) == deterministic(parts)
    assert_same_states(whole, parts, 8)
    found = [row["optim/d"] for row in rows(whole) if "optim/d" in row]
    assert not found or 1e-6 < found[4] < found[7]


def test_resume_moves_the_weights_and_counts_on(finished, composed, tmp_path):
    folder = finished("run", "schedule.steps=2")
    longer = [*QUICK, "schedule.steps=4", f"resume={folder}", "runtime.allow_config_change=true"]
    run(composed(*longer), folder)
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [1, 2, 3, 4]
    before, after = weights(folder, 2), weights(folder, 4)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_changed_learning_rate_is_used_after_resume_where_it_is_allowed(
    quick, composed, tmp_path
):
    folder = quick("run", "schedule.steps=2", "schedule=constant")
    options = ["schedule=constant", "optim.lr=0.01", f"resume={folder}"]
    run(composed(*QUICK, *options, "runtime.allow_config_change=true"), folder)
    assert [row["train/lr"] for row in rows(folder) if "train/lr" in row] == pytest.approx(
        [0.0005, 0.001, 0.01, 0.01]
    )


def test_a_checkpoint_of_before_an_option_existed_is_resumed(
    quick, finished, composed, monkeypatch
):
    folder = finished("run", "runtime.save_every=2")
    shutil.rmtree(folder / "checkpoints/step-000004")
    load = checkpoint.load

    def older(path):
        found = load(path)
        del found.config["noise"]["offset"], found.config["optim"]["cautious"]
        return found

    monkeypatch.setattr(checkpoint, "load", older)
    given = [*QUICK, f"resume={folder}", "noise.offset=0.5"]
    with pytest.raises(UserError, match=r"noise\.offset: None -> 0\.5"):
        run(composed(*given), folder, given)
    quick("run", f"resume={folder}")
    assert (folder / "checkpoints/step-000004").is_dir()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["ema=fp32"]),
        (
            ["optim=external", "optim.class_path=torch.optim.SGD", "optim.lr=0.01"],
            ["+optim.options.weight_decay=5.0"],
        ),
    ],
)
def test_what_is_chosen_anew_is_another_configuration(finished, composed, before, after):
    folder = finished("run", *before)
    with pytest.raises(UserError, match="the checkpoint has another configuration"):
        run(composed(*QUICK, *before, *after, f"resume={folder}"), folder)


def test_another_optimizer_on_resume_is_refused(finished, command):
    folder = finished("run")
    changed = ["optim=lion", "runtime.allow_config_change=true"]
    status, _, err = command(*QUICK, *changed, f"resume={folder}")
    assert status == 2
    assert "optim.name: adafactor8bit -> lion cannot change" in err


def test_another_storage_on_resume_is_refused_before_a_step(finished, command):
    folder = finished("run", "optim=adamw")
    changed = ["optim=adamw", "optim.storage=8bit", "runtime.allow_config_change=true"]
    status, _, err = command(*QUICK, *changed, f"resume={folder}")
    assert status == 2
    assert "the optimizer's state does not fit" in err
    assert "'exp_avg' is" in err


def test_other_pictures_on_resume_are_refused_and_the_runs_own_files_stay_as_they_are(
    composed, pictures, tmp_path
):
    options = [*QUICK, "data=folder", f"data.path={pictures}", "data.resolution=64"]
    run(composed(*options), tmp_path / "run")
    (pictures / "red.txt").write_text("another caption")
    run_files = [path for path in (tmp_path / "run").glob("*.*") if path.name != "train.log"]
    before = {path.name: path.read_bytes() for path in run_files}
    assert {"config.yaml", "environment.json", "summary.json", "metrics.jsonl"} <= before.keys()
    changed = ["log.every=3", f"resume={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="pictures or captions are not what the run started with"):
        run(composed(*options, *changed), tmp_path / "run")
    assert before == {path.name: path.read_bytes() for path in run_files}


def test_moved_pictures_and_a_moved_model_go_on_and_another_model_at_the_same_path_is_refused(
    composed, pictures, tmp_path, caplog
):
    def options(place):
        sources = f"data.sources=[{{path: {place}/pictures, repeats: 2}}]"
        data = ["data=folder", sources, "data.resolution=64", f"model.path={place}/model"]
        return [*QUICK, *data, "method=lora", "schedule.steps=2"]

    shutil.copytree(ASSETS / "tiny_sdxl", tmp_path / "model")
    shutil.copytree(ASSETS / "tiny_sdxl/vae", tmp_path / "vae")
    folder = tmp_path / "run"
    run(composed(*options(tmp_path), f"model.vae={tmp_path}/vae"), folder)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("pictures", "model", "vae"):
        (tmp_path / name).rename(moved / name)
    there = [*options(moved), f"model.vae={moved}/vae", f"resume={folder}"]
    run(composed(*there), folder)
    assert "resumed after step 2" in (folder / "train.log").read_text()

    weights = moved / "model/unet/diffusion_pytorch_model.safetensors"
    other = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(other, weights)
    with pytest.raises(ValueError, match="the model is not what the run started with"):
        run(composed(*there), folder)
    run(composed(*there, "runtime.allow_config_change=true"), folder)
    assert "resuming, although the model is not what the run started with" in caplog.text


def test_a_run_goes_on_in_its_folder_from_its_newest_checkpoint_and_forks_from_an_older(
    finished, in_tmp
):
    folder = finished("run", "runtime.save_every=2")
    newest, older = (folder / f"checkpoints/step-00000{n}" for n in (4, 2))
    assert resuming.run_folder_of(str(folder)) == folder
    assert resuming.run_folder_of(str(newest)) == folder
    assert resuming.run_folder_of(str(older)) is None
    copy = in_tmp / "copy"
    older.rename(copy)
    assert resuming.run_folder_of(str(copy)) is None


def test_a_run_that_forks_has_the_pictures_of_before(quick, tmp_path):
    drawn = ("log.sample_count=1", "log.sample_steps=1", "runtime.save_every=2")
    folder = quick("run", *drawn)
    fork = quick("fork", *drawn, f"resume={folder / 'checkpoints/step-000002'}")
    one, two = (f / "samples/step-000004.png" for f in (folder, fork))
    assert one.read_bytes() == two.read_bytes()


def test_a_checkpoint_at_the_root_of_a_file_system_has_no_pictures_of_before(tmp_path):
    run_folder.carry_before(Path("/checkpoint"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_resume_latest_takes_the_newest_run(command, in_tmp):
    for name in ("first", "second"):
        status, _, err = command(*QUICK, "schedule.steps=1", f"name={name}")
        assert status == 0, err
    status, out, _ = command(*QUICK, "schedule.steps=1", "name=second", "resume=latest")
    assert status == 0
    assert "second/checkpoints/step-000001" in out
    (folder,) = in_tmp.glob("runs/*/*-second")
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [1]


def test_resume_latest_does_not_pass_over_a_newer_run_without_a_checkpoint(in_tmp):
    first, second = in_tmp / "runs/first", in_tmp / "runs/second"
    written = (first / "claim.json", first / RECORD, second / "claim.json")
    for when, path in enumerate(written):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (when, when))
    with pytest.raises(UserError, match=r"runs/second, has no checkpoint; .* resume=runs/first"):
        resuming.latest_run()
    (second / RECORD).parent.mkdir(parents=True)
    (second / RECORD).write_text("{}")
    assert resuming.latest_run() == second


RECORD = "checkpoints/step-000004/checkpoint.json"


def test_resume_latest_is_one_run_for_its_options_and_its_weights(in_tmp):
    """Another run that saves while the command line is read does not change the choice."""

    def save(name, seconds):
        record = in_tmp / f"runs/{name}/checkpoints/step-000004/checkpoint.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"overrides": [f"name={name}"]}))
        os.utime(record, (seconds, seconds))

    save("it's mine, 1", 1)
    resumed = arguments.with_resumed(["resume=latest", "seed=3"])
    save("another", 2)
    assert resumed[::2] == ["name=it's mine, 1", "seed=3"]
    (given,) = OverridesParser.create().parse_overrides(resumed[1:2])
    assert given.key_or_group == "resume"
    flags = ["--cfg", "job"]  # overrides stay together: Hydra refuses them on both sides of a flag
    assert arguments.with_resumed([*flags, "resume=latest"])[:2] == flags
    (found,) = resuming.find(given.value())
    assert found == in_tmp / "runs/it's mine, 1/checkpoints/step-000004"


def test_a_run_is_resumed_with_its_own_options(command, in_tmp):
    status, _, err = command(*QUICK, "optim=lion", "optim.lr=1e-4", "runtime.save_every=2")
    assert status == 0, err
    (folder,) = in_tmp.glob("runs/*/*")
    (folder / "checkpoints/step-000004").rename(in_tmp / "later")
    status, out, err = command("resume=latest")
    assert status == 0, err
    assert "resumed after step 2" in out
    assert (folder / "checkpoints/step-000004").exists()
    status, _, err = command("resume=latest", "optim.lr=1e-3")
    assert status == 2
    assert "optim.lr: 0.0001 -> 0.001" in err


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        (["log=jsonl"], {"log.wandb.project=mine"}),
        (["ema=fp32"], set()),
        (["ema=none"], {"method.ema.decay=0.9"}),
        (["log=wandb"], set()),
        (["log=nothing"], set()),  # Hydra reports this one
    ],
)
def test_options_of_a_group_that_is_chosen_anew_are_inherited_where_it_has_them(
    monkeypatch, given, left_out
):
    theirs = ["log=wandb", "log.wandb.project=mine", "log.every=3", "ema=bf16"]
    theirs += ["method.ema.decay=0.9", "optim.lr=0.1"]
    compose.register()
    monkeypatch.setattr(arguments, "overrides_of", lambda resume: theirs)
    (group, _, _) = given[0].partition("=")
    kept = [a for a in theirs if not a.startswith(f"{group}=") and a not in left_out]
    assert arguments.with_resumed(["resume=there", *given]) == [*kept, "resume=there", *given]


def test_a_change_of_configuration_is_allowed_for_the_run_that_says_so_and_not_for_those_after_it(
    command, in_tmp
):
    status, _, err = command(*QUICK, "schedule.steps=1", "hydra.run.dir=run")
    assert status == 0, err
    allowed = ["schedule.steps=2", "runtime.allow_config_change=true"]
    status, _, err = command("resume=run", *allowed)
    assert status == 0, err
    told = json.loads((in_tmp / "run/summary.json").read_text())["overrides"]
    assert "schedule.steps=2" in told
    assert not any(o.startswith(("resume=", "runtime.allow_config_change=")) for o in told)
    status, _, err = command("resume=run", "optim.lr=0.5")
    assert status == 2
    assert "schedule.steps" not in err  # the changed number of steps is the run's own now
    assert "optim.lr: 0.001 -> 0.5" in err


def test_a_run_is_not_resumed_from_an_older_checkpoint_into_its_own_folder(finished, composed):
    folder = finished("run", "runtime.save_every=2")
    older = folder / "checkpoints/step-000002"
    with pytest.raises(ValueError, match="would overwrite"):
        run(composed(*QUICK, "runtime.save_every=2", f"resume={older}"), folder)


def test_the_checkpoint_of_a_resumed_run_is_gone_when_training_begins(
    finished, composed, monkeypatch
):
    import gc
    import weakref

    import trainer.run

    folder, loaded, seen = finished("run", "schedule.steps=2"), [], []
    load, train = checkpoint.load, trainer.run.train

    def load_and_note(path):
        found = load(path)
        loaded.extend(weakref.ref(x) for x in found.weights.values())
        return found

    def note_and_train(*args):
        gc.collect()
        seen.append(sum(ref() is not None for ref in loaded))
        train(*args)

    monkeypatch.setattr(checkpoint, "load", load_and_note)
    monkeypatch.setattr(trainer.run, "train", note_and_train)
    more = ["schedule.steps=3", f"resume={folder}", "runtime.allow_config_change=true"]
    run(composed(*QUICK, *more), folder)
    assert loaded
    assert seen == [0]


def test_a_fresh_run_in_a_used_folder_is_refused(finished, composed):
    folder = finished("run")
    with pytest.raises(ValueError, match=f"{folder} already holds a run"):
        run(composed(*QUICK), folder)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    names = [path.name for path in checkpoint.completed(tmp_path)]
    assert names == ["step-000020", "step-999999", "step-1000000"]


def test_resume_with_another_configuration_is_refused_with_the_difference(finished, command):
    folder = finished("run")
    status, _, err = command(*QUICK, "optim.lr=0.5", f"resume={folder}")
    assert status == 2
    assert "optim.lr: 0.001 -> 0.5" in err
    assert "runtime.allow_config_change=true" in err


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_where_it_stopped(tmp_path):
    overrides = [*QUICK, "schedule.steps=2000", "hydra.run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *overrides],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    output = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signal.SIGINT
    assert "resume=" in output
    saved = resuming.load_newest(resuming.find(str(tmp_path / "run")))
    assert saved.step >= 3


def test_a_signal_that_ends_a_process_saves_too(command, in_tmp, monkeypatch):
    take = stepping.take

    def signalled(state, **options):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(state, **options)

    monkeypatch.setattr(stepping, "take", signalled)
    status, output, _ = command(*QUICK, "hydra.run.dir=run")
    assert status == 128 + signal.SIGTERM
    assert "resume=" in output
    assert resuming.load_newest(resuming.find(str(in_tmp / "run"))).step == 3
