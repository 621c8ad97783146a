"""LoRA files in kohya's and diffusers' formats: what is written, that other programs read the same,
and that training can continue from them."""

import hashlib
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from models import TINY, make_sd15
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer import config as schema
from trainer.errors import UserError
from trainer.formats import (
    adapters,
    architectures,
    diffusers_lora,
    kohya,
    lora,
    origin,
    stream,
    weights,
)
from trainer.formats.adapter import Lora
from trainer.training import start

BLOCK = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in",
        "time_emb_proj", "conv"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {"sdxl": TINY, "sd15": make_sd15(tmp_path_factory.mktemp("models") / "sd15")}


@pytest.fixture(autouse=True)
def any_peft(monkeypatch):
    """transformers 5.24 requires an unreleased PEFT, but only calls what the current one has."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)


def fresh(folder, parts=("unet", "text_encoder", "text_encoder_2")):
    found = origin.at(str(folder))
    return {part: found.load(part, torch.float32) for part in parts if found.has(part)}


OPTIONS = {
    LoraConfig: {"r": 4, "lora_alpha": 10},
    # Factors of the least rank and, in part, w1 as well.
    LoKrConfig: {"r": 1, "alpha": 3, "decompose_factor": 4, "decompose_both": True},
    LoHaConfig: {"r": 4, "alpha": 10},
}


def trained(
    folder,
    parts=("unet", "text_encoder", "text_encoder_2"),
    unet=None,
    config=LoraConfig,
    **options,
):
    """Models with nonzero adapters on all targeted modules."""
    models = fresh(folder, parts)
    options = {**OPTIONS[config], **options}
    torch.manual_seed(0)
    for part, model in models.items():
        targets, more = (UNET, unet) if part == "unet" else (TEXT, None)
        made = config(target_modules=targets, **options | (more or {}))
        inject_adapter_in_model(made, model)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.2 * torch.randn_like(p)
            if "lokr_w1" in name or "hada_w2_b" in name:
                p.data = 0.5 * torch.randn_like(p)
            if "magnitude" in name:
                p.data *= 1 + 0.3 * torch.rand_like(p)
    return models


def assert_same_adapters(a, b):
    """Both have the same modules with the same deltas and magnitudes."""
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for path, adapter in a[part].items():
            torch.testing.assert_close(adapter.delta(), b[part][path].delta(), msg=path)
            one, two = (each.tensors().get("magnitude") for each in (adapter, b[part][path]))
            torch.testing.assert_close(one, two, msg=path)


def read_by_diffusers(folder, path):
    """The adapters of a diffusers pipeline that has loaded the file."""
    kind = StableDiffusionXLPipeline if folder == TINY else StableDiffusionPipeline
    extra = {} if folder == TINY else {"safety_checker": None}
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32, **extra)
    # diffusers 0.35 finds no name by itself where the hub is offline.
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    names = ("unet", "text_encoder", "text_encoder_2")[: 3 if folder == TINY else 2]
    return adapters.of_models({name: getattr(pipeline, name) for name in names}, "default_0")


def test_the_schemas_adapters_and_formats_are_those_that_files_have():
    assert {kind.method for kind in adapters.KINDS} == {
        node for node in schema.ALTERNATIVES["method"] if issubclass(node, schema.AdapterConfig)
    }
    assert tuple(lora.FORMATS) == schema.words_of(schema.LoraConfig, "export")


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
@pytest.mark.parametrize("base", ["sdxl", "sd15"])
def test_diffusers_and_we_read_back_what_was_trained(folders, tmp_path, base, kind):
    """Including alpha != rank, ranks of single modules, convolutions and all text encoders."""
    models = trained(folders[base], unet={"rank_pattern": {"to_q": 2, "conv1": 3}})
    path = lora.save_lora(tmp_path / "a.safetensors", kind, models, base)
    wanted = adapters.of_models(models)
    assert sum(len(found) for found in wanted.values()) > 100
    assert_same_adapters(read_by_diffusers(folders[base], path), wanted)
    assert_same_adapters(lora.read(path, fresh(folders[base])), wanted)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_rank_stabilised_scales_and_scales_of_single_modules_are_written(folders, tmp_path, kind):
    models = trained(TINY, unet={"alpha_pattern": {"to_k": 3}}, use_rslora=True)
    path = lora.save_lora(tmp_path / "a.safetensors", kind, models, "sdxl")
    found = lora.read(path, fresh(TINY))["unet"]
    assert {adapter.alpha for adapter in found.values()} == {10 * 4**0.5, 3 * 4**0.5}
    assert_same_adapters({"unet": found}, {"unet": adapters.of_models(models)["unet"]})
    if kind == "diffusers":
        assert_same_adapters(read_by_diffusers(TINY, path), adapters.of_models(models))


def test_dora_is_read_back_and_by_diffusers_from_its_own_format(folders, tmp_path):
    models = trained(TINY, use_dora=True)
    wanted = adapters.of_models(models)
    for kind in ("kohya", "diffusers"):
        path = lora.save_lora(tmp_path / f"{kind}.safetensors", kind, models, "sdxl")
        assert_same_adapters(lora.read(path, fresh(TINY)), wanted)
    assert_same_adapters(read_by_diffusers(TINY, path), wanted)


def test_a_dora_scale_in_kohyas_format_means_what_lycoris_means_by_it(tmp_path):
    """PEFT merges to scale * (W + dW) / |W + dW|, with norms over a row (wd_on_output)."""
    models = trained(TINY, ["unet"], use_dora=True)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    tensors, before = load_file(path), fresh(TINY, ["unet"])["unet"]
    layers = dict(models["unet"].named_modules())
    for name, own in (
        (BLOCK, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("lora_unet_input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
    ):
        down, up, alpha, scale = (
            tensors[f"{name}.{what}"]
            for what in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
        )
        weight = before.get_submodule(own).weight
        assert scale.shape == (weight.shape[0], *[1] * (weight.ndim - 1))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * alpha / down.shape[0]
        norms = (weight + delta).flatten(1).norm(dim=1).reshape(scale.shape)
        layers[own].merge()
        torch.testing.assert_close(
            layers[own].get_base_layer().weight, scale * (weight + delta) / norms
        )


def test_kohyas_names_are_the_published_ones_for_the_real_models():
    """722, 72 and 192 modules, which kohya's scripts train by default for SDXL."""
    small = Lora(down=torch.zeros(1, 1), up=torch.zeros(1, 1), alpha=1.0)
    models = {
        part: architectures.empty(part, architectures.config("sdxl", part))
        for part in ("unet", "text_encoder", "text_encoder_2")
    }
    wanted = {"unet": r".attentions.", "text_encoder": "layers.", "text_encoder_2": "layers."}
    every = {
        part: {path: small for path in adapters.module_names(model) if wanted[part] in path}
        for part, model in models.items()
    }
    names = kohya.encode(every, "sdxl", models["unet"].config)
    bases = {name.partition(".")[0] for name in names}
    count = {
        p: sum(b.startswith(p) for b in bases) for p in ("lora_unet_", "lora_te1_", "lora_te2_")
    }
    assert count == {"lora_unet_": 722, "lora_te1_": 72, "lora_te2_": 192}
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
    } <= bases
    every_path = {path: small for path in adapters.module_names(models["unet"])}
    found = kohya.encode({"unet": every_path}, "sdxl", models["unet"].config)
    assert len(every_path) == 794
    assert len(found) == 3 * len(every_path)  # all names are distinct
    sd15 = kohya.encode({"unet": {"down_blocks.0.attentions.0.proj_in": small}}, "sd15", None)
    assert "lora_unet_down_blocks_0_attentions_0_proj_in.alpha" in sd15


def test_both_dialects_and_files_without_alpha_are_read(tmp_path):
    models = trained(TINY)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    tensors = load_file(path)
    wanted = adapters.of_models(models)
    other = {}
    for part, found in wanted.items():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
        for name, adapter in found.items():
            short = prefix[part] + name.removeprefix("text_model.").replace(".", "_")
            other[f"{short}.lora_down.weight"] = adapter.down
            other[f"{short}.lora_up.weight"] = adapter.up * adapter.scale
    assert other.keys() != tensors.keys()
    save_file(
        {name: tensor.contiguous() for name, tensor in other.items()}, tmp_path / "b.safetensors"
    )
    assert_same_adapters(lora.read(tmp_path / "b.safetensors", fresh(TINY)), wanted)


def test_diffusers_names_of_2023_are_read(tmp_path):
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    names = {
        f"{block}.processor.to_q_lora.down.weight": down,
        f"{block}.processor.to_q_lora.up.weight": up,
        f"{block}.processor.to_out_lora.down.weight": down + 1,
        f"{block}.processor.to_out_lora.up.weight": up + 1,
    }
    save_file(names, tmp_path / "old.safetensors")
    found = lora.read(tmp_path / "old.safetensors", fresh(TINY, ["unet"]))["unet"]
    assert {path.removeprefix(f"{block[5:]}.") for path in found} == {"to_q", "to_out.0"}
    torch.testing.assert_close(found[f"{block[5:]}.to_q"].delta(), up @ down)


def test_a_file_that_diffusers_wrote_is_read_with_its_alpha(tmp_path):
    models = trained(TINY, ["unet"], unet={"alpha_pattern": {"to_k": 3}})
    described = models["unet"].peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(models["unet"]),
        unet_lora_adapter_metadata=described,
    )
    found = lora.read(tmp_path / "pytorch_lora_weights.safetensors", fresh(TINY, ["unet"]))
    assert_same_adapters(found, {"unet": adapters.of_models(models)["unet"]})


def test_of_the_patterns_that_name_a_module_the_first_says_its_alpha():
    said = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2, "attn1.to_q": 3}}
    alphas = diffusers_lora.Alphas({diffusers_lora.METADATA: json.dumps(said)}, "a file")
    assert alphas.of("unet", "mid_block.attn1.to_q", rank=4) == 2
    assert alphas.of("unet", "mid_block.attn1.to_k", rank=4) == 8
    assert alphas.of("text_encoder", "q_proj", rank=4) == 4


def test_the_file_says_what_it_is_of(tmp_path):
    models = trained(TINY, ["unet"])
    path = lora.save_lora(
        tmp_path / "cats.safetensors",
        "kohya",
        models,
        "sdxl",
        dtype=torch.float16,
        more_metadata={"ss_steps": "3"},
    )
    with safe_open(path, "pt") as file:
        found = file.metadata()
        dtypes = {name.partition(".")[2]: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"lora_down.weight": "F16", "lora_up.weight": "F16", "alpha": "F32"}
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "10",
        "ss_output_name": "cats",
        "ss_steps": "3",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "1024x1024",
    }
    assert expected.items() <= found.items()
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert json.loads(found["ss_network_args"]) == {}


REFUSED = {
    "no module": ({"lora_unet_input_blocks_9_1_to_q.alpha": torch.ones(())}, "no module of this"),
    "oft": ({f"{BLOCK}.oft_blocks": torch.ones(1)}, "OFT; only LoRA, DoRA, LoKr and LoHa can be"),
    "no hada_w1_b": ({f"{BLOCK}.hada_w1_a": torch.ones(64, 1)}, "to_q has no hada_w1_b"),
    "no lokr_w2_a": ({f"{BLOCK}.lokr_w1": torch.ones(8, 8)}, "to_q has no lokr_w2_a"),
    "lokr's ranks": (
        {
            f"{BLOCK}.lokr_w1": torch.ones(8, 8),
            f"{BLOCK}.lokr_w2_a": torch.ones(8, 2),
            f"{BLOCK}.lokr_w2_b": torch.ones(3, 8),
        },
        "do not fit together: lokr_w1 8x8, lokr_w2_a 8x2, lokr_w2_b 3x8",
    ),
    "lokr's shape": (
        {f"{BLOCK}.lokr_w1": torch.ones(8, 8), f"{BLOCK}.lokr_w2": torch.ones(4, 8)},
        r"is for a weight of \(32, 64\), and here it is \(64, 64\); the LoKr is for another model",
    ),
    "lokr's dora_scale": (
        {
            f"{BLOCK}.lokr_w1": torch.ones(8, 8),
            f"{BLOCK}.lokr_w2": torch.ones(8, 8),
            f"{BLOCK}.dora_scale": torch.ones(64, 1),
        },
        "to_q is a LoKr with DoRA's scales, which cannot be read",
    ),
    "unknown": ({f"{BLOCK}.lora_sideways.weight": torch.ones(1)}, "unknown kind"),
    "no up": ({f"{BLOCK}.lora_down.weight": torch.ones(2, 64)}, "has no up projection"),
    "ranks": (
        {
            f"{BLOCK}.lora_down.weight": torch.ones(2, 64),
            f"{BLOCK}.lora_up.weight": torch.ones(64, 3),
        },
        "rank 2 down and 3 up",
    ),
    "columns": (
        {
            f"{BLOCK}.lora_down.weight": torch.ones(2, 64),
            f"{BLOCK}.lora_up.weight": torch.ones(64, 2),
            f"{BLOCK}.dora_scale": torch.ones(1, 64),
        },
        "columns",
    ),
    "diffusers' no module": ({"unet.nowhere.lora_A.weight": torch.ones(1)}, "no module of this"),
    "no lora": ({"conv_in.weight": torch.ones(1)}, "is not a LoRA"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_named(what, tmp_path):
    tensors, said = REFUSED[what]
    save_file(tensors, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match=said) as raised:
        lora.read(tmp_path / "strange.safetensors", fresh(TINY, ["unet"]))
    assert "strange.safetensors" in str(raised.value)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_an_adapter_of_a_part_that_is_not_trained_is_named(tmp_path, kind):
    path = lora.save_lora(tmp_path / "a.safetensors", kind, trained(TINY), "sdxl")
    with pytest.raises(UserError, match="text_encoder, which this model lacks"):
        lora.read(path, {"unet": fresh(TINY)["unet"]})


def test_adapters_of_another_shape_do_not_fit_a_run(tmp_path):
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", trained(TINY, ["unet"]), "sdxl")
    models = trained(TINY, ["unet"], r=8)
    found = lora.read(path, models)
    with pytest.raises(
        UserError, match="rank 4, alpha 10 in the file and rank 8, alpha 10 in the run"
    ):
        start.refuse_others(models, found, {part: [*of_part] for part, of_part in found.items()})


def test_a_file_that_does_not_read_back_equal_is_an_error_and_not_kept(tmp_path, monkeypatch):
    models = trained(TINY, ["unet"])
    whole = kohya.encode

    def forgetful(*arguments):
        tensors = whole(*arguments)
        return tensors | {f"{BLOCK}.alpha": torch.tensor(4.0)}

    monkeypatch.setattr(kohya, "encode", forgetful)
    with pytest.raises(UserError, match=r"attn1\.to_q has another effect"):
        lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    monkeypatch.setattr(
        kohya, "encode", lambda *a: {n: t for n, t in whole(*a).items() if BLOCK not in n}
    )
    with pytest.raises(UserError, match=r"attn1\.to_q is missing in it"):
        lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path, dtype):
    models = trained(TINY, ["unet"])
    layer = models["unet"].down_blocks[0].resnets[0].conv1
    layer.lora_A["default"].weight.data[0] = 1e5
    models["unet"].to(dtype)
    with pytest.raises(UserError, match="float16 cannot represent"):
        lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl", torch.float16)
    lora.save_lora(tmp_path / "b.safetensors", "kohya", models, "sdxl", torch.bfloat16)


def test_streamed_files_are_those_of_the_safetensors_package(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "brain": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 3).t(),
        "whole": torch.arange(6).reshape(2, 3),
    }
    stream.write(tmp_path / "a.safetensors", weights.of_tensors(tensors), {"key": "value"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
