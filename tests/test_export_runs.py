"""Converting a run's folder and its checkpoints to models and LoRAs."""

import copy
import json
import re
import shutil
from functools import reduce

import pytest
import torch
from helpers import run_export
from models import TINY, assert_same_model
from safetensors import safe_open

from trainer.config import flatten
from trainer.formats import architectures, lora, origin, writing
from trainer.storage import checkpoint

TRAINED = ("unet", "text_encoder")
NEEDS_BASE = "--merge needs the model to merge SOURCE into: --base=MODEL"
ONE_STEP = ("schedule.steps=1", "schedule.warmup_steps=0", "log.eval_points=1", "optim.lr=0.01")


def exported(capsys, folder, *more):
    """Export a run's checkpoint and its folder to files."""
    paths = [folder.parent / "checkpoint.safetensors", folder.parent / "folder.safetensors"]
    for source, path in zip((folder / "checkpoints/step-000001", folder), paths, strict=True):
        status, _, error = run_export(capsys, source, path, *more)
        assert status == 0, error
    return paths


def test_a_runs_checkpoint_and_folder_are_exported_as_its_model(quick, tmp_path, capsys):
    """For a run from a single file, with the run's noise schedule instead of the file's."""
    began = writing.save_single_file(tmp_path / "began.safetensors", origin.at(str(TINY)), {})
    changes = ("noise.prediction=epsilon", "noise.zero_terminal_snr=false")
    folder = quick("run", f"model.path={began}", *ONE_STEP, *changes)
    one, two = (origin.at(str(path)) for path in exported(capsys, folder))
    assert_same_model(one, two)
    assert_same_model(one, origin.at(str(folder / "model")))
    assert one.config("scheduler")["prediction_type"] == "epsilon"
    assert two.config("scheduler")["prediction_type"] == "epsilon"
    assert one.fingerprint("unet") != origin.at(str(TINY)).fingerprint("unet")
    assert one.fingerprint("vae") == origin.at(str(TINY)).fingerprint("vae")


def test_weights_that_were_not_trained_have_the_runs_dtype_in_a_checkpoints_export_too(
    quick, capsys
):
    """The shipped model's files are in fp16, and the run is in fp32."""
    parts = "method.train=[unet,text_encoder_2]"  # of which the last layers' output is unused
    folder = quick("run", parts, "method.rules=[{pattern: conv, trainable: false}]", *ONE_STEP)
    one, two = (origin.at(str(path)) for path in exported(capsys, folder))
    assert_same_model(one, two)


def test_a_result_that_is_a_single_file_is_found_in_its_run(finished, tmp_path, capsys):
    folder = finished("run", "method.export=[single_file]", "name=cats", *ONE_STEP)
    shutil.rmtree(folder / "checkpoints")
    status, _, error = run_export(capsys, folder, tmp_path / "model")
    assert status == 0, error
    own = origin.at(str(folder / "cats.safetensors"))
    assert_same_model(origin.at(str(tmp_path / "model")), own)


def test_a_checkpoint_is_exported_as_its_averages(quick, capsys):
    folder = quick("run", "ema=bf16", "method.ema.decay=0.5", *ONE_STEP)
    one, two = (origin.at(str(path)) for path in exported(capsys, folder))
    assert_same_model(one, two)


def test_a_lora_runs_checkpoint_and_folder_are_merged_to_the_same_model(quick, tmp_path, capsys):
    folder = quick("run", "method=lora", *ONE_STEP)
    one, two = (origin.at(str(p)) for p in exported(capsys, folder, "--base", TINY, "--merge"))
    assert_same_model(one, two)
    assert one.fingerprint("unet") != origin.at(str(TINY)).fingerprint("unet")
    assert one.fingerprint("text_encoder") == origin.at(str(TINY)).fingerprint("text_encoder")


def test_a_runs_lora_is_merged_into_the_model_that_the_run_started_from(quick, tmp_path, capsys):
    """From a checkpoint, the run's folder, and its files; unless --base names another model."""
    began = shutil.copytree(TINY, tmp_path / "began")
    folder = quick("run", "method=lora", f"model.path={began}", *ONE_STEP)
    file = "lora/adafactor8bit-lora.safetensors"
    status, _, error = run_export(
        capsys, folder / file, tmp_path / "named", "--base", began, "--merge"
    )
    assert status == 0, error
    sources = ("", "lora", file, "checkpoints/step-000001")
    for number, source in enumerate(sources):
        target = tmp_path / str(number)
        status, _, error = run_export(capsys, folder / source, target, "--merge")
        assert status == 0, (source, error)
        assert_same_model(*(origin.at(str(path)) for path in (tmp_path / "named", target)))

    copied = shutil.copy(folder / file, tmp_path)  # in no run
    refused = tmp_path / "refused"
    status, _, error = run_export(capsys, copied, refused, "--merge")
    assert (status, error) == (2, f"error: {NEEDS_BASE}\n")

    vae = began / "vae/config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 2.0}))
    for source in sources:
        status, _, error = run_export(capsys, folder / source, refused, "--merge")
        assert status == 2
        assert re.search(f"the model at {began} is not the one .* --base=MODEL\n", error), error
        target = tmp_path / "changed" / (source or "run")
        more = ("--base", began, "--merge")
        assert run_export(capsys, folder / source, target, *more)[0] == 0, source

    shutil.rmtree(began)
    for source in sources:
        status, _, error = run_export(capsys, folder / source, refused, "--merge")
        assert status == 2
        assert re.search(f"is no longer at {began}; give .* --base=MODEL\n", error), error

    shutil.rmtree(folder / "checkpoints")  # they tell which model it was
    status, _, error = run_export(capsys, folder, refused, "--merge")
    assert (status, error, refused.exists()) == (2, f"error: {NEEDS_BASE}\n", False)


def test_a_full_fine_tune_is_not_merged(quick, tmp_path, capsys):
    folder = quick("run", *ONE_STEP)
    for source in (folder, folder / "checkpoints/step-000001"):
        target = tmp_path / "a.safetensors"
        status, _, error = run_export(capsys, source, target, "--base", TINY, "--merge")
        assert status == 2
        assert "--merge is for LoRAs, and " in error
        assert not target.exists()


def test_an_adapter_of_which_a_half_is_kept_is_exported_whole(quick, capsys):
    rules = "method.rules=[{pattern: lora_A, trainable: false}]"
    folder = quick("run", "method=lora", rules, *ONE_STEP)
    paths = exported(capsys, folder, "--format", "kohya", "--base", TINY)
    tiny = origin.at(str(TINY))
    models = {"unet": architectures.empty("unet", tiny.config("unet"))}
    one, two = (lora.read(path, models)["unet"] for path in paths)
    for name, adapter in one.items():
        assert torch.equal(adapter.down, two[name].down)
        torch.testing.assert_close(adapter.delta(), two[name].delta())


def test_a_runs_lora_is_exported_with_the_model_that_its_configuration_names(
    quick, tmp_path, capsys
):
    folder = quick("run", "method=lora", *ONE_STEP, "schedule.steps=2", "method.export_every=1")
    weights = "lora/pytorch_lora_weights.safetensors"
    for number, source in enumerate(("", weights, f"results/step-000001/{weights}")):
        status, _, error = run_export(capsys, folder / source, tmp_path / f"{number}.safetensors")
        assert status == 0, error
    gone = (folder / "config.yaml").read_text().replace("assets/tiny_sdxl", "nowhere/tiny_sdxl")
    (folder / "config.yaml").write_text(gone)
    status, _, error = run_export(capsys, folder, tmp_path / "c.safetensors")
    assert status == 2
    assert re.search(r"--base=\S+nowhere/tiny_sdxl does not exist", error), error
    assert run_export(capsys, folder, tmp_path / "c.safetensors", "--base", TINY)[0] == 0


def test_a_result_that_is_older_than_the_runs_checkpoints_is_exported_with_a_warning(
    finished, tmp_path, capsys, caplog
):
    folder = finished("run", *ONE_STEP)
    assert run_export(capsys, folder, tmp_path / "a")[0] == 0
    assert "has continued" not in caplog.text
    assert run_export(capsys, folder / "checkpoints", tmp_path / "c")[0] == 0  # the last one
    newer = shutil.copytree(folder / "checkpoints/step-000001", folder / "checkpoints/step-000003")
    assert run_export(capsys, folder, tmp_path / "b")[0] == 0
    assert f"model is from step 1, and the run has continued since; use {newer}" in caplog.text


def test_a_runs_lora_says_its_resolution_and_nothing_private(quick, tmp_path, capsys):
    private = ["log.prompts=[a secret]", f"data.cache={tmp_path}/cache"]
    private += ["data.caption_prefix='secret, '", "data.caption_suffix=', secret'"]
    model = shutil.copytree(TINY, tmp_path / "my-model")
    sizes = ("data.resolution=32", "data.resolutions=[32,64]")
    folder = quick("run", "method=lora", f"model.path={model}", *private, *sizes, *ONE_STEP)
    assert (
        run_export(capsys, folder / "checkpoints/step-000001", tmp_path / "c.safetensors")[0] == 0
    )
    every = [*sorted((folder / "lora").glob("*.safetensors")), tmp_path / "c.safetensors"]
    assert len(every) == 3
    for path in every:
        with safe_open(path, "pt") as file:
            found = file.metadata()
        assert found["modelspec.resolution"] == "64x64"
        text = json.dumps(found)
        assert not [word for word in ("secret", "/", "emoji24") if word in found.get("trainer", "")]
        assert str(tmp_path) not in text
    with safe_open(every[0], "pt") as file:
        config = json.loads(file.metadata()["trainer"])["config"]
    assert config["model"]["path"] == "my-model"
    assert config["optim"]["lr"] == 0.01


def test_a_checkpoints_lora_is_said_to_be_for_other_noise_than_the_models(
    quick, tmp_path, capsys, caplog
):
    epsilon = ("noise.prediction=epsilon", "noise.zero_terminal_snr=false")
    flow = ("noise=flow_matching",)
    for name, options, times in (("own", (), 0), ("other", epsilon, 1), ("flow", flow, 2)):
        folder = quick(name, "method=lora", *options, *ONE_STEP)
        target = tmp_path / f"{name}.safetensors"
        assert run_export(capsys, folder / "checkpoints/step-000001", target)[0] == 0
        assert caplog.text.count("needs another noise schedule than the model's") == times
        for path in (target, folder / "lora/adafactor8bit-lora.safetensors"):
            told = safe_open(path, "pt").metadata()
            kind = {(): "v", epsilon: "epsilon", flow: "sd3"}[options]
            is_v = str(options == ())
            assert told["modelspec.prediction_type"] == kind
            assert told.get("ss_discrete_flow_shift") == ("3.0" if options == flow else None)
            assert (told["ss_v_parameterization"], told["ss_zero_terminal_snr"]) == (is_v, is_v)


def test_a_runs_checkpoint_and_folder_are_exported_as_its_lora(quick, capsys):
    """With DoRA, rank stabilisation, a text encoder, and other ranks for some modules."""
    options = ["rank=4", "alpha=2", "dora=true", "rslora=true", "train=[unet,text_encoder]"]
    options += ["targets=[to_q,to_k]", "ranks=[{pattern: to_k, rank: 3, alpha: 1}]"]
    folder = quick("run", "method=lora", *ONE_STEP, *(f"method.{option}" for option in options))
    paths = exported(capsys, folder, "--format", "kohya", "--base", TINY)
    tiny = origin.at(str(TINY))
    models = {part: architectures.empty(part, tiny.config(part)) for part in TRAINED}
    one, two = (lora.read(path, models) for path in paths)
    assert one.keys() == two.keys() == set(TRAINED)
    for part in TRAINED:
        assert one[part].keys() == two[part].keys()
        assert any(adapter.delta().abs().max() > 0 for adapter in one[part].values())
        for name, adapter in one[part].items():
            expected = 3**0.5 if name.endswith("to_k") else 2.0 * 4**0.5
            assert adapter.alpha == two[part][name].alpha == pytest.approx(expected)
            torch.testing.assert_close(adapter.delta(), two[part][name].delta())
            torch.testing.assert_close(adapter.magnitude, two[part][name].magnitude)


@pytest.mark.parametrize("name", ["cats", "zebras"])  # sorted before and after pytorch_lora_weights
@pytest.mark.parametrize("export", ["[diffusers]", "[kohya,diffusers]"])
def test_a_run_of_any_name_is_exported_as_a_kohya_lora(quick, capsys, name, export):
    folder = quick("run", "method=lora", f"method.export={export}", f"name={name}", *ONE_STEP)
    one, two = exported(capsys, folder, "--base", TINY)
    for path in (one, two):
        with safe_open(path, framework="pt") as file:
            assert all(key.startswith("lora_") for key in file.keys())  # noqa: SIM118


def test_a_damaged_checkpoint_is_not_exported(finished, tmp_path, capsys):
    folder = finished("run", *ONE_STEP) / "checkpoints/step-000001"
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 0x40  # in a weight, not in the header
    (folder / "weights.safetensors").write_bytes(content)
    status, _, error = run_export(capsys, folder, tmp_path / "a.safetensors")
    assert status == 2
    assert "weights.safetensors does not match its checksum" in error
    assert not (tmp_path / "a.safetensors").exists()


def test_a_checkpoint_is_exported_over_the_model_that_it_began_with_and_no_other(
    quick, tmp_path, capsys
):
    """Untrained weights come from that model, even if it has moved."""
    began = shutil.copytree(TINY, tmp_path / "began")
    folder = quick("run", f"model.path={began}", *ONE_STEP) / "checkpoints/step-000001"
    assert run_export(capsys, folder, tmp_path / "a")[0] == 0

    vae = began / "vae/config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 2.0}))
    status, _, error = run_export(capsys, folder, tmp_path / "b")
    assert (status, (tmp_path / "b").exists()) == (2, False)
    assert f"the model at {began} is not the one" in error

    shutil.rmtree(began)
    status, _, error = run_export(capsys, folder, tmp_path / "b")
    assert (status, (tmp_path / "b").exists()) == (2, False)
    assert "--base=MODEL" in error

    assert run_export(capsys, folder, tmp_path / "b", "--base", TINY)[0] == 0
    assert_same_model(origin.at(str(tmp_path / "a")), origin.at(str(tmp_path / "b")))


def test_a_checkpoint_is_exported_with_the_variant_of_its_run_or_the_one_that_is_named(
    quick, tmp_path, capsys
):
    began = shutil.copytree(TINY, tmp_path / "began")
    weights = began / "unet/diffusion_pytorch_model.safetensors"
    weights = weights.rename(weights.with_suffix(".fp16.safetensors"))
    options = (f"model.path={began}", "model.variant=fp16", *ONE_STEP)
    folder = quick("run", *options) / "checkpoints/step-000001"
    moved = began.rename(tmp_path / "moved")
    status, _, error = run_export(capsys, folder, tmp_path / "a", "--base", moved)
    assert status == 0, error

    weights = moved / weights.relative_to(began)
    weights.rename(weights.with_name("diffusion_pytorch_model.ema.safetensors"))
    status, _, error = run_export(capsys, folder, tmp_path / "b", "--base", moved)
    assert (status, error.rstrip().rpartition("; ")[2]) == (2, "set --variant=ema")
    arguments = (folder, tmp_path / "b", "--base", moved, "--variant", "ema")
    assert run_export(capsys, *arguments)[0] == 0
    assert_same_model(origin.at(str(tmp_path / "a")), origin.at(str(tmp_path / "b")))


def test_a_checkpoints_lora_says_what_the_runs_says(quick, tmp_path, capsys):
    options = ("method=lora", "data.resolutions=[32,64]", "data.resolution=32", *ONE_STEP)
    folder = quick("run", *options, "method.tag_frequency=true")
    saved = folder / "checkpoints/step-000001"
    paths = folder / "lora/adafactor8bit-lora.safetensors", tmp_path / "c.safetensors"
    assert run_export(capsys, saved, paths[1])[0] == 0
    one, two = (safe_open(path, "pt").metadata() for path in paths)
    assert two["ss_resolution"] == "64x64"
    counts = {"ss_tag_frequency", "ss_epoch", *(key for key in one if key.startswith("ss_num_"))}
    assert len(counts) == 6
    own = {"ss_output_name", "modelspec.title", "modelspec.date"}
    for key in one.keys() - own:
        assert one[key] == two[key], key

    record = json.loads((saved / "checkpoint.json").read_text())
    del record["counted"], record["sha256"]["checkpoint.json"]  # as older versions wrote it
    record["sha256"]["checkpoint.json"] = checkpoint._sha256(checkpoint._canonical(record))
    (saved / "checkpoint.json").write_text(json.dumps(record))
    assert run_export(capsys, saved, tmp_path / "older.safetensors")[0] == 0
    older = safe_open(tmp_path / "older.safetensors", "pt").metadata()
    assert older.keys() == two.keys() - counts
    assert checkpoint.load(saved).step == 1


NEEDED = ("seed", "resume", "model.path", "method.name", "optim.name", "schedule.name")


def test_a_checkpoint_is_exported_whichever_option_it_does_not_have_yet(
    finished, tmp_path, capsys, monkeypatch
):
    """Those that every checkpoint has, and export cannot do without, are named."""
    folder = finished("run", "method=lora", *ONE_STEP) / "checkpoints/step-000001"
    record = checkpoint.verified(folder)
    monkeypatch.setattr("trainer.export.loras.write", lambda *_: None)
    for key in flatten(record["config"]):
        older = copy.deepcopy(record)
        *groups, name = key.split(".")
        del reduce(dict.__getitem__, groups, older["config"])[name]
        monkeypatch.setattr(checkpoint, "verified", lambda *_, older=older, **__: older)
        status, _, error = run_export(capsys, folder, tmp_path / "lora.safetensors")
        if key in NEEDED:
            assert status == 2
            assert re.search(rf"is from another version: '({key}|{name})'\n", error), error
        else:
            assert (status, error) == (0, ""), key


def test_an_option_of_a_checkpoint_that_there_is_no_longer_is_left_out_and_named(
    finished, tmp_path, capsys, caplog, monkeypatch
):
    folder = finished("run", "method=lora", *ONE_STEP) / "checkpoints/step-000001"
    record = checkpoint.verified(folder)
    record["config"]["noise"] |= {"gone": 0.5, "unset": None}
    monkeypatch.setattr(checkpoint, "verified", lambda *_, **__: record)
    status, _, error = run_export(capsys, folder, tmp_path / "lora.safetensors")
    assert status == 0, error
    assert caplog.text.count("noise.gone=0.5, of another version, is left out") == 1
    assert "unset" not in caplog.text
