"""`model.vae`: where a separate VAE is loaded from, and what is refused."""

import json
import shutil

import pytest
import torch
from models import TINY, assert_equal_modules
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.formats import origin

FP32 = torch.float32


VAES = {  # forms of a VAE-only file, made from a pipeline's single file and its folder
    "of sgm": lambda single, own: {n.removeprefix("first_stage_model."): t for n, t in single},
    "with a prefix": lambda single, own: dict(single),
    "with a discriminator": lambda single, own: dict(single) | {"loss.logvar": torch.zeros(())},
    "of diffusers": lambda single, own: own,
}


@pytest.mark.parametrize("names_of", VAES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_vaes_own_file_is_read_by_either_names(names_of, suffix, files, tmp_path):
    """The file has no configuration, so the model's is used."""
    model = origin.at(str(TINY))
    single = [x for x in load_file(files["sdxl"]).items() if x[0].startswith("first_stage_model.")]
    tensors = VAES[names_of](single, load_file(TINY / "vae/diffusion_pytorch_model.safetensors"))
    path = tmp_path / f"sdxl_vae{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    found = origin.vae(str(path), model)
    assert_equal_modules(found.load("vae", FP32), model.load("vae", FP32))
    assert found.fingerprint("vae") == model.fingerprint("vae")


def test_a_vaes_file_under_diffusers_name_has_the_configuration_beside_it(tiny):
    settings = json.loads((tiny / "vae/config.json").read_text())
    (tiny / "vae/config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    path = tiny / "vae/diffusion_pytorch_model.safetensors"
    model = origin.at(str(TINY))
    assert origin.vae(str(path), model).config("vae")["scaling_factor"] == 0.5
    path = path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match=f"name the file: model.vae={path}"):
        origin.vae(str(tiny / "vae"), model).load("vae", FP32)
    other = path.rename(path.with_name("mine.safetensors"))
    assert origin.vae(str(other), model).config("vae") == model.config("vae")


def test_a_models_vae_is_found_in_its_file_and_its_folder(tiny, files):
    model = origin.at(str(TINY))
    shutil.rmtree(tiny / "unet")
    for path in (files["sdxl"], tiny):
        found = origin.vae(str(path), model)
        assert_equal_modules(found.load("vae", FP32), model.load("vae", FP32))
        assert found.option == "model.vae"  # named in errors


def test_what_is_wrong_with_another_vae_names_model_vae(tiny, tmp_path):
    model = origin.at(str(TINY))
    tensors = load_file(tiny / "vae/diffusion_pytorch_model.safetensors")
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "decoder.conv_in.bias"},
              tmp_path / "part.safetensors")  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "taesd").mkdir()
    (tmp_path / "taesd/config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    cases = {
        "none.safetensors": "holds no VAE: it has head.weight",
        "part.safetensors": "lacks decoder.conv_in.bias",
        "empty": "neither it nor vae/ has a config.json",
        "taesd": "is a AutoencoderTiny; it must be an AutoencoderKL",
        "broken": "config.json cannot be read",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said) as raised:
            origin.vae(str(tmp_path / name), model)
        assert f"model.vae={tmp_path / name}" in str(raised.value)


def test_a_vae_on_the_hub_is_a_repository_of_its_own_or_a_pipelines_part(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = origin.at(str(TINY))
    with pytest.raises(UserError, match=r"model\.vae=owner/none .*cannot be loaded from the hub"):
        origin.vae("owner/none", model)
    for name, folder in (("alone", TINY / "vae"), ("pipeline", TINY)):
        repository = tmp_path / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(40 * "a")
        shutil.copytree(folder, repository / "snapshots" / (40 * "a"))
        found = origin.vae(f"owner/{name}", model)
        assert_equal_modules(found.load("vae", FP32), model.load("vae", FP32))


def test_only_the_files_of_a_vae_are_asked_of_the_hub(monkeypatch, tmp_path):
    """With the hub's own filter, for the files of sdxl-vae-fp16-fix and of SDXL."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **which: asked.update(which) or tmp_path
    )
    with pytest.raises(UserError, match="not a VAE folder"):
        origin.vae("owner/name", origin.at(str(TINY)))
    weights = "diffusion_pytorch_model.safetensors"
    alone = ["config.json", weights]
    part = ["vae/config.json", f"vae/{weights}"]
    others = [
        *("README.md", "sdxl_vae.safetensors", "diffusion_pytorch_model.bin"),
        *(f"unet/{weights}", "unet/config.json", "vae_1_0/config.json", "model_index.json"),
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert list(filter_repo_objects(alone + part + others, **asked)) == alone + part
