"""Writing whole models, and the conversion command: every format and back, verified, never
overwriting files."""

import itertools
import json
import runpy
import shutil
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers import run_export
from models import TINY, assert_same_model
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.export import loras
from trainer.formats import adapters, architectures, lora, names, origin, stream, weights, writing

TRAINED = ("unet", "text_encoder")


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_folder_to_file_to_folder_gives_the_same_model(kind, sd15, tmp_path, capsys):
    folder = {"sdxl": TINY, "sd15": sd15}[kind]
    first = run_export(capsys, folder, tmp_path / "model.safetensors")
    assert first[0] == 0, first
    second = run_export(capsys, tmp_path / "model.safetensors", tmp_path / "back")
    assert second[0] == 0, second
    for path in (tmp_path / "model.safetensors", tmp_path / "back"):
        assert_same_model(origin.at(str(folder)), origin.at(str(path)))
    for part in ("scheduler", "unet", "vae", "text_encoder"):
        assert origin._computing(origin.at(str(folder)).config(part)) == origin._computing(
            origin.at(str(tmp_path / "back")).config(part)
        )


def test_trained_parts_replace_the_origins_and_the_others_are_carried_over(tmp_path):
    found = origin.at(str(TINY))
    unet = found.load("unet", torch.bfloat16)
    text = found.load("text_encoder_2", torch.float32)
    with torch.no_grad():
        for p in (*unet.parameters(), *text.parameters()):
            p += 1
    parts = {"unet": unet, "text_encoder_2": text}
    writing.save_folder(tmp_path / "folder", found, parts)
    writing.save_single_file(tmp_path / "file.safetensors", found, parts)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "folder", torch_dtype=torch.bfloat16
    )
    assert torch.equal(pipeline.unet.conv_in.weight, unet.conv_in.weight)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer_2.pad_token == "!"
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        again = origin.at(str(path))
        assert torch.equal(again.load("unet", torch.bfloat16).conv_out.bias, unet.conv_out.bias)
        assert again.load("text_encoder_2", torch.float32).state_dict().keys() == (
            text.state_dict().keys()
        )
        for name, p in again.load("text_encoder_2", torch.float32).state_dict().items():
            assert torch.equal(p, text.state_dict()[name]), name
        assert again.fingerprint("vae") == found.fingerprint("vae")
        assert again.fingerprint("text_encoder") == found.fingerprint("text_encoder")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_written_in_the_wanted_type_but_a_vae_keeps_its_own(dtype, tmp_path, capsys):
    source = tmp_path / "source"
    found = origin.at(str(TINY))
    writing.save_folder(source, found, {"vae": found.load("vae", torch.float32)})
    for target in (tmp_path / "a.safetensors", tmp_path / "b"):
        assert run_export(capsys, source, target, "--dtype", dtype)[0] == 0
        again = origin.at(str(target))
        assert_same_model(origin.at(str(source)), again, getattr(torch, dtype))
        assert {lazy.dtype for lazy in again.weights("vae").values()} == {torch.float32}


def test_another_models_part_comes_with_its_configuration(tmp_path):
    found = origin.at(str(TINY))
    vae = found.load("vae", torch.float32)
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    other = origin.vae(str(tmp_path / "vae"), found)
    writing.save_folder(tmp_path / "folder", found, {"vae": other})
    writing.save_single_file(tmp_path / "file.safetensors", found, {"vae": other})
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        assert origin.at(str(path)).config("vae")["scaling_factor"] == 0.5
        assert origin.at(str(path)).fingerprint("vae") == other.fingerprint("vae")


def test_a_single_file_says_what_it_is(tmp_path):
    found = origin.at(str(TINY))
    path = writing.save_single_file(
        tmp_path / "emoji.safetensors", found, {}, more_metadata={"mine": "1"}
    )
    with safe_open(path, "pt") as file:
        described, keys = file.metadata(), set(file.keys())
    assert {"v_pred", "ztsnr"} <= keys
    assert described["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert described["modelspec.prediction_type"] == "v"
    assert described["modelspec.resolution"] == "64x64"
    assert described["modelspec.title"] == "emoji"
    assert described["mine"] == "1"
    plain = found.config("scheduler") | {
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
    }
    path = writing.save_single_file(tmp_path / "plain.safetensors", found, {}, scheduler=plain)
    with safe_open(path, "pt") as file:
        assert not {"v_pred", "ztsnr"} & set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    assert origin.at(str(path)).config("scheduler")["prediction_type"] == "epsilon"


def test_zero_terminal_snr_gets_a_scheduler_that_knows_it(sd15, tmp_path):
    """Stable Diffusion 1.5's own scheduler, PNDM, does not support it."""
    from trainer.formats.schedulers import marked

    published = architectures.config("sd15", "scheduler")
    assert published["_class_name"] == "PNDMScheduler"
    changed = marked(published, ["v_pred", "ztsnr"], {})
    writing.save_folder(tmp_path / "v", origin.at(str(sd15)), {}, scheduler=changed)
    index = json.loads((tmp_path / "v/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert origin.at(str(tmp_path / "v")).config("scheduler")["rescale_betas_zero_snr"] is True


def test_an_export_that_does_not_read_back_equal_is_an_error_and_not_kept(tmp_path, monkeypatch):
    found = origin.at(str(TINY))
    whole = stream.rounded

    def careless(name, tensor, dtype):
        rounded = whole(name, tensor, dtype)
        return rounded + 1 if "conv_out.bias" in name or name.endswith("out.2.bias") else rounded

    monkeypatch.setattr(stream, "rounded", careless)
    with pytest.raises(UserError, match=r"conv_out\.bias has other values; the file is discarded"):
        writing.save_folder(tmp_path / "a", found, {})
    with pytest.raises(UserError, match=r"conv_out\.bias has other values; the file is discarded"):
        writing.save_single_file(tmp_path / "a.safetensors", found, {})
    monkeypatch.setattr(stream, "rounded", whole)
    table = names.table

    def mistaken(part, every, config):  # swaps two resnets' biases
        entries = table(part, every, config)
        if part == "unet" and len(list(tmp_path.iterdir())) == 0:
            i, j = (
                [e.single for e in entries].index(f"middle_block.{k}.out_layers.3.bias")
                for k in (0, 2)
            )
            a, b = entries[i], entries[j]
            entries[i] = names.TensorNames(single=b.single, own=a.own)
            entries[j] = names.TensorNames(single=a.single, own=b.own)
        return entries

    monkeypatch.setattr(names, "table", mistaken)
    with pytest.raises(UserError, match=r"mid_block\.resnets\.\d\.conv2\.bias has other values"):
        writing.save_single_file(tmp_path / "a.safetensors", found, {})
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_adapters_in_it_is_not_written_as_a_whole_one(tmp_path):
    found = origin.at(str(TINY))
    unet = found.load("unet", torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="the unet has adapters in it"):
        writing.save_folder(tmp_path / "a", found, {"unet": unet})


def lora_file(tmp_path):
    unet = origin.at(str(TINY)).load("unet", torch.float32)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"]))
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    lora.save_lora(tmp_path / "a.safetensors", "kohya", {"unet": unet}, "sdxl")
    return tmp_path / "a.safetensors", adapters.of_models({"unet": unet})["unet"]


def test_a_lora_is_converted_either_way(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    path, wanted = lora_file(tmp_path)
    steps = [path, tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"]
    for source, target in itertools.pairwise(steps):
        status, _, error = run_export(capsys, source, target, "--base", TINY)
        assert (status, error) == (0, ""), error
        assert "adapters read back" in caplog.text
        models = {"unet": architectures.empty("unet", origin.at(str(TINY)).config("unet"))}
        found = lora.read(target, models)["unet"]
        assert found.keys() == wanted.keys()
        for name in found:
            torch.testing.assert_close(found[name].delta(), wanted[name].delta())
    keys = [set(safe_open(p, "pt").keys()) for p in steps]
    assert keys[0] == keys[2] != keys[1]
    torch.save(load_file(path), tmp_path / "old.bin")
    assert (
        run_export(capsys, tmp_path / "old.bin", tmp_path / "new.safetensors", "--base", TINY)[0]
        == 0
    )
    assert set(safe_open(tmp_path / "new.safetensors", "pt").keys()) == keys[1]


def test_a_converted_lora_keeps_what_its_metadata_says_of_its_training(tmp_path, capsys):
    """From any program, in both directions; hashes are the new file's."""
    path, _ = lora_file(tmp_path)
    told = {
        "ss_steps": "3000",
        "ss_seed": "7",
        "ss_sd_model_hash": "31e35c80",
        "ss_output_name": "cats",
        "ss_network_args": '{"conv_dim": "4"}',
        "modelspec.title": "Cats",
        "modelspec.date": "2024-01-01T00:00:00",
        "modelspec.resolution": "768x768",
        "trainer": '{"step": 3000}',
    }
    own = {"modelspec.hash_sha256": "0xabc", "sshs_model_hash": "abc", "sshs_legacy_hash": "a"}
    more = told | own | {"format": "pt"}
    save_file(load_file(path), tmp_path / "told.safetensors", more)
    source = tmp_path / "told.safetensors"
    for target in (tmp_path / "d.safetensors", tmp_path / "k.safetensors"):
        status, _, error = run_export(capsys, source, target, "--base", TINY)
        assert status == 0, error
        with safe_open(target, "pt") as file:
            found = file.metadata()
        assert told.items() <= found.items()
        assert not own.items() & found.items()
        assert len(found["sshs_model_hash"]) == 64
        source = target


def test_what_a_lora_is_of_is_found_or_asked_for(tmp_path, capsys):
    path, _ = lora_file(tmp_path)
    status, _, error = run_export(capsys, path, tmp_path / "b.safetensors")
    assert status == 2
    assert "--base=MODEL" in error
    of = {
        "sdxl": ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 640, 2048),
        "sd15": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 640, 768),
    }
    for kind, (base, rows, columns) in of.items():
        tensors = {
            f"{base}.lora_down.weight": torch.ones(2, columns),
            f"{base}.lora_up.weight": torch.ones(rows, 2),
            f"{base}.alpha": torch.tensor(1.0),
        }
        stream.write(tmp_path / f"{kind}.safetensors", weights.of_tensors(tensors), {})
        status, _, error = run_export(
            capsys, tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-d.safetensors"
        )
        assert status == 0, error
        written = list(safe_open(tmp_path / f"{kind}-d.safetensors", "pt").keys())
        assert written[0].startswith("unet.down_blocks."), written


def test_mistakes_are_one_line_and_status_2_and_write_nothing(tmp_path, capsys):
    (tmp_path / "there.safetensors").write_text("mine")
    path, _ = lora_file(tmp_path)
    before = sorted(tmp_path.iterdir())
    cases = (
        ([TINY, tmp_path / "there.safetensors"], "there.safetensors exists"),
        ([tmp_path / "none.safetensors", tmp_path / "b"], "none.safetensors"),
        ([TINY, tmp_path / "b", "--format", "single_file"], "must end in .safetensors"),
        *(
            ([TINY, tmp_path / f"b{ending}"], f"ends in {ending}: single files are written as")
            for ending in (".ckpt", ".pt", ".bin", ".SafeTensors")
        ),
        ([path, tmp_path / "b.ckpt", "--base", TINY], "name it b.safetensors"),
        ([TINY, tmp_path / "b", "--format", "kohya"], "use diffusers or single_file"),
        ([path, tmp_path / "b", "--format", "single_file", "--base", TINY], "use kohya"),
        ([TINY, tmp_path / "b", "--base", "sdxl"], "--base=sdxl has no effect"),
        ([tmp_path, tmp_path / "b"], "is not a model, LoRA or run"),
        ([tmp_path / "no.safetensors", tmp_path / "b", "--base", "sdxl"], "does not exist"),
    )
    for arguments, said in cases:
        status, _, error = run_export(capsys, *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert said in error
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert run_export(capsys, TINY, tmp_path / "b", "--dtype", "int4")[0] == 2


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer.export", "--help"])
    monkeypatch.delitem(sys.modules, "trainer.export.__main__")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("trainer.export", run_name="__main__")
    shown = capsys.readouterr().out
    for words in ("SOURCE", "TARGET", "--dtype", "--format", "--base", "Exit status", "kohya"):
        assert words in shown


def test_a_variant_is_called_by_the_commands_own_option(tmp_path, capsys, caplog):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_suffix(".fp16.safetensors"))
    status, _, error = run_export(capsys, folder, tmp_path / "a.safetensors")
    assert status == 2
    assert error.rstrip().endswith("is missing; set --variant=fp16")
    status, _, error = run_export(capsys, folder, tmp_path / "a.safetensors", "--variant", "fp16")
    assert status == 0, error
    with caplog.at_level("WARNING"):
        run_export(capsys, tmp_path / "a.safetensors", tmp_path / "b", "--variant", "fp16")
    assert caplog.messages[0].startswith("--variant=fp16 has no effect: ")


@pytest.mark.parametrize("merge", [False, True])
def test_weights_of_a_base_on_the_hub_are_downloaded_only_to_merge(monkeypatch, merge):
    asked = []

    def download(name, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(TINY)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert loras.base_model("owner/name", with_weights=merge).kind == "sdxl"
    assert any(pattern.endswith(".safetensors") for pattern in asked) is merge
