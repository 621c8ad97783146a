"""Merging a LoRA into its base model: the result computes what model and LoRA compute together."""

import json
import shutil

import diffusers
import pytest
import torch
from helpers import assert_export_refused, run_export
from models import TINY, assert_same_model, make_sd15
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from test_lora_files import any_peft, fresh, trained  # noqa: F401 - a fixture

from trainer.formats import kohya, lora, origin, stream, writing
from trainer.formats.adapters import of_models
from trainer.formats.weights import of_tensors

PARTS = ("unet", "text_encoder", "text_encoder_2")
# Of outputs of size about 1.  fp32: PEFT adds up in another order; the others: weights are rounded
# after the sum, which PEFT does not do.
TOLERANCES = {
    torch.float32: {"rtol": 2e-4, "atol": 2e-4},
    torch.float16: {"rtol": 2e-2, "atol": 2e-2},
    torch.bfloat16: {"rtol": 1e-1, "atol": 1e-1},
}
KINDS = {  # how the LoRA was trained; all have alpha != rank
    "alpha": {},
    "ranks": {"unet": {"rank_pattern": {"to_q": 2, "conv1": 3}, "alpha_pattern": {"to_k": 3}}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory):
    return make_sd15(tmp_path_factory.mktemp("merge") / "sd15")


@torch.no_grad()
def outputs(models):
    """What each part computes, in fp32, for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for part, model in models.items():
        model.float().eval()
        if part != "unet":
            ids = torch.randint(0, 1000, (2, 12), generator=generator)
            found[part] = model(ids, output_hidden_states=True).hidden_states[-1]
            continue
        config = model.config
        latent = torch.randn(2, config.in_channels, 8, 8, generator=generator)
        text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
        more = {}
        if config.addition_embed_type:
            ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
            width = (
                config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            )
            pooled = torch.randn(2, width, generator=generator)
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        found[part] = model(latent, torch.tensor([10, 700]), text, **more).sample
    return found


def assert_computes(path, wanted, dtype=torch.float32, base=TINY):
    found = outputs(fresh(path, wanted))
    before = outputs(fresh(base, wanted))
    for part, output in wanted.items():
        size = output.abs().mean()
        torch.testing.assert_close(
            found[part] / size,
            output / size,
            **TOLERANCES[dtype],
            msg=lambda m, p=part: f"{p}: {m}",
        )
        apart = (before[part] / size - output / size).abs().mean()
        assert apart > 3 * TOLERANCES[dtype]["atol"], (part, apart)  # else this proves nothing


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_peft_does(kind, form, tmp_path, capsys):
    """UNet and text encoders; to a folder and a single file, which are the same model."""
    models = trained(TINY, **KINDS[kind])
    path = lora.save_lora(tmp_path / "a.safetensors", form, models, "sdxl")
    targets = (tmp_path / "model.safetensors", tmp_path / "model")
    for target in targets:
        more = ("--base", TINY, "--merge", "--dtype", "float32")
        status, _, error = run_export(capsys, path, target, *more)
        assert (status, error) == (0, ""), error
    one, two = (origin.at(str(target)) for target in targets)
    assert_same_model(one, two)
    assert one.fingerprint("vae") == origin.at(str(TINY)).fingerprint("vae")
    assert_computes(targets[1], outputs(models))


def test_a_merged_stable_diffusion_1_computes_what_peft_does(sd15_folder, tmp_path, capsys):
    """Its 1x1 convolutions in attention and its one text encoder."""
    models = trained(sd15_folder)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sd15")
    target = tmp_path / "merged.safetensors"
    status, _, error = run_export(capsys, path, target, "--base", sd15_folder, "--merge")
    assert status == 0, error
    assert_computes(target, outputs(models), base=sd15_folder)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_merged_is_added_in_fp32_and_rounded_once(dtype, tmp_path, capsys):
    models = trained(TINY, ["unet"])
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    more = ("--base", TINY, "--merge", "--dtype", str(dtype).removeprefix("torch."))
    assert run_export(capsys, path, tmp_path / "merged", *more)[0] == 0
    found, before = (origin.at(str(p)).weights("unet") for p in (tmp_path / "merged", TINY))
    layers = {n: m for n, m in models["unet"].named_modules() if isinstance(m, LoraLayer)}
    for name, lazy in found.items():
        assert lazy.dtype == dtype, name
        wanted = before[name].read().float()
        if layer := layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None:
            wanted = wanted + layer.get_delta_weight("default").detach()
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(lazy.read().float(), wanted, rtol=unit, atol=1e-6, msg=name)
        else:
            assert torch.equal(lazy.read(), wanted.to(dtype)), name
    assert_computes(tmp_path / "merged", outputs(models), dtype)


def test_by_default_a_merged_model_has_the_bases_dtype(tmp_path, capsys):
    source, found = tmp_path / "mixed", origin.at(str(TINY))
    parts = {"unet": found.load("unet", torch.float16), "vae": found.load("vae", torch.float32)}
    writing.save_folder(source, found, parts)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY), "sdxl")
    target = tmp_path / "merged.safetensors"
    assert run_export(capsys, path, target, "--base", source, "--merge")[0] == 0
    for part in (*PARTS, "vae"):
        own, merged = (origin.at(str(p)).weights(part) for p in (source, target))
        assert {n: x.dtype for n, x in own.items()} == {n: x.dtype for n, x in merged.items()}


@pytest.mark.parametrize("kind", [{}, {"config": LoKrConfig}, {"config": LoHaConfig}])
@pytest.mark.parametrize("scale", [0.5, -1.5])
def test_scale_multiplies_what_is_added(scale, kind, tmp_path, capsys):
    models = trained(TINY, **kind)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    more = ("--base", TINY, "--merge", f"--scale={scale}", "--dtype=float32")
    assert run_export(capsys, path, tmp_path / "merged", *more)[0] == 0
    for model in models.values():
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.scale_layer(scale)
    assert_computes(tmp_path / "merged", outputs(models))


def test_the_scale_of_a_dora_leads_in_a_straight_line_from_the_base_to_it(tmp_path, capsys):
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY, use_dora=True), "sdxl")
    for scale in (0.25, 1):
        target = tmp_path / f"merged-{scale}"
        more = ("--base", TINY, "--merge", f"--scale={scale}", "--dtype=float32")
        assert run_export(capsys, path, target, *more)[0] == 0
    base, quarter, whole = (
        origin.at(str(p)).weights("unet")
        for p in (TINY, tmp_path / "merged-0.25", tmp_path / "merged-1")
    )
    for name, lazy in base.items():
        start = lazy.read().float()
        wanted = torch.lerp(start, whole[name].read(), 0.25)
        torch.testing.assert_close(quarter[name].read(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_a_merged_file_says_what_it_was_merged_from(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    path = lora.save_lora(tmp_path / "cats.safetensors", "kohya", trained(TINY, ["unet"]), "sdxl")
    target = tmp_path / "merged.safetensors"
    assert run_export(capsys, path, target, "--base", TINY, "--merge", "--scale=0.5")[0] == 0
    assert "adapters of " in caplog.messages[-1]
    assert "merged, scale 0.5 (rounding changes " in caplog.messages[-1]
    with safe_open(target, "pt") as file:
        described = file.metadata()
    assert described["modelspec.merged_from"] == "tiny_sdxl, cats"
    assert described["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


FLOW = {"modelspec.prediction_type": "sd3", "ss_v_parameterization": "False"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        ({"ss_v_parameterization": "False"}, {"prediction_type": "epsilon"}),
        (
            {"ss_v_parameterization": "True"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
        ),
        (
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        (FLOW, {"use_flow_sigmas": True, "flow_shift": 1.0}),
        (
            FLOW | {"ss_discrete_flow_shift": "2.5"},
            {"prediction_type": "flow_prediction", "flow_shift": 2.5},
        ),
        (FLOW | {"ss_discrete_flow_shift": "None"}, {"flow_shift": 1.0}),
        (FLOW | {"ss_discrete_flow_shift": "0"}, {"flow_shift": 1.0}),
    ],
    ids=["unsaid", "epsilon", "v", "zero", "flow", "shifted", "none", "no shift"],
)
def test_a_merged_model_has_the_noise_schedule_that_its_lora_was_trained_with(
    told, expected, sd15_folder, tmp_path, capsys
):
    models = trained(sd15_folder, ["unet"])
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sd15", more_metadata=told)
    assert run_export(capsys, path, tmp_path / "m", "--base", sd15_folder, "--merge")[0] == 0
    found = origin.at(str(tmp_path / "m")).config("scheduler")
    assert {key: found[key] for key in expected} == expected


UNIPC = {  # of flow matching, as pipelines can use it
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 2.0,
}


@pytest.mark.parametrize(
    ("is_v", "own", "says"),
    [
        ("False", {}, "predict noise, and its model predicts v;"),
        ("False", UNIPC, "noise, and its model predicts a flow;"),
        ("True", UNIPC, "v, and its model predicts a flow;"),
    ],
)
def test_a_models_scheduler_stays_with_a_warning_where_a_loras_is_unknown(
    is_v, own, says, tmp_path, capsys, caplog
):
    base = shutil.copytree(TINY, tmp_path / "base")
    file = base / "scheduler/scheduler_config.json"
    scheduler = json.loads(file.read_text()) | own
    file.write_text(json.dumps(scheduler))
    told = {"ss_v_parameterization": is_v}
    models = trained(TINY, ["unet"])
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl", more_metadata=told)
    assert run_export(capsys, path, tmp_path / "m", "--base", base, "--merge")[0] == 0
    assert says in caplog.text
    assert origin.at(str(tmp_path / "m")).config("scheduler") == scheduler


@pytest.mark.parametrize("told", [{}, FLOW])
def test_a_flows_scheduler_becomes_the_one_that_pipelines_can_use(told, tmp_path, capsys, tiny):
    """As a run writes it."""
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (tiny / "scheduler/scheduler_config.json").write_text(json.dumps(own))
    models = trained(TINY, ["unet"])
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl", more_metadata=told)
    assert run_export(capsys, path, tmp_path / "m", "--base", tiny, "--merge")[0] == 0
    merged = origin.at(str(tmp_path / "m")).config("scheduler")
    assert merged["flow_shift"] == 3.0
    assert hasattr(getattr(diffusers, merged["_class_name"]), "scale_model_input")


def test_a_converted_lora_says_that_it_is_not_merged(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY, ["unet"]), "sdxl")
    assert run_export(capsys, path, tmp_path / "b.safetensors", "--base", TINY)[0] == 0
    assert caplog.messages[-1].endswith(
        f"b.safetensors holds the LoRA alone; --merge writes it merged into {TINY}"
    )


def test_mistakes_in_merging_are_one_line_and_write_nothing(sd15_folder, tmp_path, capsys):
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY, ["unet"]), "sdxl")
    strange = tmp_path / "oft.safetensors"
    stream.write(strange, of_tensors({"lora_unet_x.oft_blocks": torch.ones(1)}), {})
    before = sorted(tmp_path.iterdir())
    merge, base, out = "--merge", ("--base", TINY), tmp_path / "out"
    cases = (
        ([path, out, merge], "--merge needs the model to merge SOURCE into: --base=MODEL"),
        ([path, out, *base, "--scale=0.5"], "--scale=0.5 has no effect without --merge"),
        ([path, out, *base, merge, "--scale=0"], "must be a finite number other than 0"),
        ([path, out, *base, merge, "--scale=nan"], "must be a finite number other than 0"),
        ([path, out, "--base", sd15_folder, merge], "the LoRA is for another model"),
        ([path, out, "--base", "sdxl", merge], "another model"),
        ([TINY, out, *base, merge], "--merge is for LoRAs, and "),
        ([strange, out, *base, merge], "OFT; only LoRA, DoRA, LoKr and LoHa can be read"),
        ([path, out, *base, merge, "--format=kohya"], "use diffusers or single_file"),
        ([path, out, *base, merge, "--format=single_file"], "must end in .safetensors"),
    )
    assert_export_refused(capsys, cases)
    assert sorted(tmp_path.iterdir()) == before


def test_an_architecture_without_weights_is_nothing_to_merge_into(tmp_path, capsys):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 2048),
        f"{name}.lora_up.weight": torch.ones(640, 2),
    }
    path = tmp_path / "a.safetensors"
    stream.write(path, of_tensors(tensors), {})
    status, _, error = run_export(capsys, path, tmp_path / "b", "--base", "sdxl", "--merge")
    assert status == 2
    assert "--base=sdxl is an architecture without weights" in error


@pytest.mark.parametrize(
    ("size", "dtype", "is_coarse"),
    [
        (1.0, "bfloat16", False),
        (1e-3, "bfloat16", True),
        (1e-3, "float32", False),
    ],
)
def test_a_change_that_is_lost_in_rounding_is_warned_of(
    size, dtype, is_coarse, tmp_path, capsys, caplog
):
    models = trained(TINY, ["unet"])
    for name, p in models["unet"].named_parameters():
        if "lora_B" in name:
            p.data *= size
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    more = ("--base", TINY, "--merge", "--dtype", dtype)
    assert run_export(capsys, path, tmp_path / "b", *more)[0] == 0
    assert ("of what the LoRA adds; --dtype=float32" in caplog.text) == is_coarse


def test_a_lora_that_is_not_finite_is_not_merged(tmp_path, capsys):
    models = trained(TINY, ["unet"])
    models["unet"].down_blocks[0].resnets[0].conv1.lora_A["default"].weight.data[0] = torch.inf
    path = tmp_path / "a.safetensors"
    stream.write(
        path, of_tensors(kohya.encode(of_models(models), "sdxl", models["unet"].config)), {}
    )
    status, _, error = run_export(capsys, path, tmp_path / "b", "--base", TINY, "--merge")
    assert status == 2
    assert "unet.down_blocks.0.resnets.0.conv1.weight is not finite" in error
    assert not (tmp_path / "b").exists()


def test_a_merged_weight_that_a_dtype_cannot_hold_is_refused(tmp_path, capsys):
    models = trained(TINY, ["unet"])
    models["unet"].down_blocks[0].resnets[0].conv1.lora_A["default"].weight.data[0] = 1e7
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    more = ("--base", TINY, "--merge", "--dtype", "float16")
    status, _, error = run_export(capsys, path, tmp_path / "b", *more)
    assert status == 2
    assert "unet.down_blocks.0.resnets.0.conv1.weight has values up to" in error
    assert not (tmp_path / "b").exists()
