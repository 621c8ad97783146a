"""Where models are loaded from (folders, variants, single files, the hub), and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from models import TINY, assert_equal_modules, parts_of
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.formats import architectures, hub, names, origin, stream, weights, writing
from trainer.formats.weights import of_tensors

FP32 = torch.float32


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_folder_and_a_single_file_give_the_modules_that_diffusers_gives(kind, sd15, files):
    """diffusers' own readers are the reference for both forms."""
    path, cls = {
        "sdxl": (TINY, StableDiffusionXLPipeline),
        "sd15": (sd15, StableDiffusionPipeline),
    }[kind]
    extra = {} if kind == "sdxl" else {"safety_checker": None}
    readers = {
        path: cls.from_pretrained(path, torch_dtype=FP32, local_files_only=True, **extra),
        files[kind]: cls.from_single_file(
            files[kind], config=str(path), torch_dtype=FP32, local_files_only=True, **extra
        ),
    }
    for source, pipeline in readers.items():
        found = origin.at(str(source))
        assert found.kind == kind
        assert len(parts_of(found)) == (4 if kind == "sdxl" else 3)
        for part in parts_of(found):
            assert_equal_modules(found.load(part, FP32), getattr(pipeline, part))
        assert found.zeros_for_empty == (kind == "sdxl")
        assert found.config("scheduler")["prediction_type"] == (
            "v_prediction" if kind == "sdxl" else "epsilon"
        )


def test_a_loaded_text_encoder_computes_what_transformers_computes():
    """Its position ids are not weights: they are recreated, not left without memory."""
    ids = torch.tensor([[49406, 320, 1125, 539, 49407] + [49407] * 72])
    pipeline = StableDiffusionXLPipeline.from_pretrained(TINY, torch_dtype=FP32)
    for part in ("text_encoder", "text_encoder_2"):
        ours = origin.at(str(TINY)).load(part, FP32)(ids, output_hidden_states=True)
        theirs = getattr(pipeline, part)(ids, output_hidden_states=True)
        assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])
        assert torch.equal(ours[0], theirs[0])


def test_a_part_is_loaded_in_the_type_that_is_wanted_and_owns_its_memory(files):
    found = origin.at(str(files["sdxl"]))
    unet = found.load("unet", torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    before = files["sdxl"].read_bytes()
    with torch.no_grad():
        for p in found.load("vae", next(iter(found.weights("vae").values())).dtype).parameters():
            p.zero_()
    assert files["sdxl"].read_bytes() == before
    assert any(lazy.read().any() for lazy in found.weights("vae").values())


def test_both_tokenizers_pad_as_the_published_ones(files):
    for source in (TINY, files["sdxl"]):
        found = origin.at(str(source))
        padded = [
            found.tokenizer(part)("a cat", padding="max_length", max_length=77).input_ids
            for part in ("tokenizer", "tokenizer_2")
        ]
        assert padded[0][:4] == [49406, 320, 2368, 49407]
        assert (padded[0][-1], padded[1][-1]) == (49407, 0)


def test_fp16_variants_are_read_and_named_where_they_are_the_only_ones(tiny, caplog):
    for part in ("unet", "vae"):
        weights = tiny / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found = origin.at(str(tiny), "fp16")
    assert_equal_modules(found.load("unet", FP32), origin.at(str(TINY)).load("unet", FP32))
    found.load("text_encoder", FP32)  # has no variant
    with pytest.raises(UserError, match=r"set model\.variant=fp16"):
        origin.at(str(tiny)).load("unet", FP32)


def test_sharded_and_pickled_weights_are_read(tiny):
    whole = tiny / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    middle = len(tensors) // 2
    shards = [dict(list(tensors.items())[s]) for s in (slice(middle), slice(middle, None))]
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(shard, tiny / "unet" / name)
        where |= dict.fromkeys(shard, name)
    whole.unlink()
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"weight_map": where}))
    vae = tiny / "vae/diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    found = origin.at(str(tiny))
    for part in ("unet", "vae"):
        assert_equal_modules(found.load(part, FP32), origin.at(str(TINY)).load(part, FP32))
    (tiny / "unet" / name).unlink()
    with pytest.raises(UserError, match=f"lists {name}, which is missing"):
        found.load("unet", FP32)


def test_a_vae_with_the_attention_names_of_2022_is_read(sd15, tmp_path):
    model = shutil.copytree(sd15, tmp_path / "old")
    path = model / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for today, then in old.items():
            name = name.replace(f".{today}.", f".{then}.")
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, path)
    assert_equal_modules(
        origin.at(str(model)).load("vae", FP32), AutoencoderKL.from_pretrained(sd15 / "vae")
    )


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ((), {}, ("epsilon", False, "leading")),
        (("v_pred",), {}, ("v_prediction", False, "leading")),
        (("v_pred", "ztsnr"), {}, ("v_prediction", True, "trailing")),
        ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False, "leading")),
        ((), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False, "leading")),
        ((), {"modelspec.prediction_type": "sd3"}, ("flow_prediction", False, False)),
    ],
)
def test_marks_of_the_prediction_type_and_zero_terminal_snr_are_honoured(
    files, tmp_path, marks, metadata, expected
):
    unmarked = origin.at(str(files["sdxl"])).file.all
    weights = {name: x for name, x in unmarked.items() if name not in ("v_pred", "ztsnr")}
    weights |= of_tensors({mark: torch.zeros(0) for mark in marks})
    stream.write(tmp_path / "marked.safetensors", weights, metadata)
    scheduler = origin.at(str(tmp_path / "marked.safetensors")).config("scheduler")
    found = tuple(
        scheduler.get(key, False)
        for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    )
    assert found == expected


def test_a_file_of_another_size_than_the_published_one_is_named(files, tmp_path):
    path = tmp_path / "small.safetensors"
    save_file(load_file(files["sd15"]), path)  # without its metadata
    with pytest.raises(UserError, match=r"small\.safetensors lacks model\..*another architecture"):
        origin.at(str(path)).load("unet", FP32)


def test_the_fingerprint_is_of_one_part_whatever_holds_it_and_is_remembered(tiny, files, tmp_path):
    first = origin.at(str(tiny))
    before = {part: first.fingerprint(part, tmp_path / "cache") for part in parts_of(first)}
    assert len(set(before.values())) == 4
    single = origin.at(str(files["sdxl"]))
    assert before == {part: single.fingerprint(part) for part in parts_of(single)}
    assert first.fingerprint("tokenizer") == single.fingerprint("tokenizer")
    assert first.fingerprint("tokenizer") != first.fingerprint("tokenizer_2")

    memo = tmp_path / "cache/fingerprints.json"
    remembered = json.loads(memo.read_text())
    memo.write_text(json.dumps(dict.fromkeys(remembered, "from the memo")))
    assert first.fingerprint("vae", tmp_path / "cache") == "from the memo"
    path = tiny / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][0] += 1
    save_file(tensors, path)
    changed = origin.at(str(tiny))
    assert changed.fingerprint("vae", tmp_path / "cache") not in ("from the memo", before["vae"])
    assert changed.fingerprint("unet") == before["unet"]


def damaged(tmp_path, files, change, kind="sdxl"):
    """A single file with tensors modified by `change`."""
    tensors = load_file(files[kind])
    found = origin.at(str(files[kind]))
    change(tensors)
    path = tmp_path / "damaged.safetensors"
    stream.write(path, of_tensors(tensors), found.file.metadata)
    return path


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {  # how an intact file is changed, and parts of the message
    "no tensor": (
        lambda t: t.pop("model.diffusion_model.out.2.bias"),
        ["damaged.safetensors", "lacks model.diffusion_model.out.2.bias"],
    ),
    "another shape": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}),
        ["conv_out.bias", "(5,)", "(4,)"],
    ),
    "another block": (
        lambda t: t.update({"model.diffusion_model.input_blocks.1.1.norm.bias": torch.zeros(5)}),
        ["damaged.safetensors", "input_blocks.1.1.norm.bias", "belongs to another model"],
    ),
    "inpainting": (
        lambda t: t.update({CONV_IN: torch.zeros(32, 9, 3, 3)}),
        ["9 channels", "inpainting"],
    ),
    "no text encoder": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("conditioner.")],
        ["no text encoder"],
    ),
    "no vae": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")],
        ["no vae", "first_stage_model."],
    ),
    "refiner": (
        lambda t: t.update({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}),
        ["refiner"],
    ),
    "sd2": (
        lambda t: t.update({"cond_stage_model.model.ln_final.bias": torch.zeros(1)}),
        ["Stable Diffusion 2"],
    ),
    "edm": (
        lambda t: t.update({"edm_vpred.sigma_max": torch.zeros(1)}),
        ["EDM"],
    ),
    "bare unet": (
        lambda t: [
            t.update({k.removeprefix("model.diffusion_model."): t.pop(k)})
            if k.startswith("model.")
            else t.pop(k)
            for k in list(t)
        ],
        ["only a UNet", "diffusers"],
    ),
    "lora": (
        lambda t: (t.clear(), t.update({"lora_unet_x.lora_down.weight": torch.zeros(1)})),
        ["is a LoRA", "model.path"],
    ),
    "nothing known": (
        lambda t: (t.clear(), t.update({"head.weight": torch.zeros(1)})),
        ["not a Stable Diffusion checkpoint", "head.weight"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_loaded_is_named_with_the_first_key(what, files, tmp_path):
    change, said = REFUSED[what]
    path = damaged(tmp_path, files, change)
    with pytest.raises(UserError) as raised:
        origin.at(str(path)).load("unet", FP32)
    for words in said:
        assert words in str(raised.value)


def test_truncated_files_are_named(files, tmp_path):
    content = files["sd15"].read_bytes()
    for size in (len(content) - 100, 4, 0):
        path = tmp_path / f"short{size}.safetensors"
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"short{size}\.safetensors .*damaged or incomplete"):
            origin.at(str(path))
    (tmp_path / "short.ckpt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"short\.ckpt .*damaged or incomplete"):
        origin.at(str(tmp_path / "short.ckpt"))


def test_a_folder_with_missing_or_foreign_weights_is_named(tiny):
    path = tiny / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    cases = {
        "the unet lacks conv_out.bias": lambda t: t.pop("conv_out.bias"),
        "conv_out.bias of the unet is": lambda t: t.update({"conv_out.bias": torch.zeros(7)}),
        "the unet has conv_more.bias": lambda t: t.update({"conv_more.bias": torch.zeros(7)}),
    }
    for said, change in cases.items():
        changed = dict(tensors)
        change(changed)
        save_file(changed, path)
        with pytest.raises(UserError, match=said):
            origin.at(str(tiny)).load("unet", FP32)


def test_folders_that_cannot_be_trained_are_refused_when_they_are_found(tiny):
    index = json.loads((tiny / "model_index.json").read_text())
    cases = {
        "without a UNet": {"unet": [None, None]},
        "refiner": {"text_encoder": [None, None]},
        "its text_encoder_2 is a T5EncoderModel": {
            "text_encoder_2": ["transformers", "T5EncoderModel"]
        },
    }
    for said, change in cases.items():
        (tiny / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=said):
            origin.at(str(tiny))
    (tiny / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json cannot be read"):
        origin.at(str(tiny))


def test_a_hub_name_comes_from_the_cache_or_is_a_clear_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.path=owner/name .*cannot be loaded from the hub"):
        origin.at("owner/name")
    repository = tmp_path / "models--owner--name"
    commit = 40 * "a"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(TINY, repository / "snapshots" / commit)
    assert origin.at("owner/name").kind == "sdxl"


class Hub:
    """A repository with these files, and what is downloaded from it."""

    def __init__(self, folder, files):
        self.folder, self.files = folder, files

    def __call__(self, name, **which):
        from huggingface_hub.utils import filter_repo_objects

        for file in filter_repo_objects(self.files, **which):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).touch()
        return self.folder

    @property
    def weights(self):
        found = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*.safetensors*"))
        return sorted(found)


def test_of_a_variant_on_the_hub_each_part_is_downloaded_once(monkeypatch, tmp_path):
    """Plain files where a part has no variant; shards may be named either way."""
    variant = [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model-00001-of-00001.fp16.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    both = [name.replace(".fp16", "") for name in variant]
    alone = ["vae/diffusion_pytorch_model.safetensors"]
    configs = ["model_index.json", *(f"{part}/config.json" for part in architectures.WEIGHT_PARTS)]
    for asked, given in (("fp16", variant + alone), (None, both + alone)):
        hub_of = Hub(tmp_path / str(asked), configs + variant + both + alone)
        monkeypatch.setattr("huggingface_hub.snapshot_download", hub_of)
        hub.pipeline("owner/name", asked, "model.path")
        assert hub_of.weights == sorted(given)


def test_of_a_repository_without_safetensors_the_bin_files_are_downloaded(monkeypatch, tmp_path):
    stems = ("unet/diffusion_", "vae/diffusion_", "text_encoder/")
    parts = [f"{stem}pytorch_model" for stem in stems]
    files = [f"{part}{ending}" for part in parts for ending in (".bin", ".fp16.bin")]
    files += ["unet/diffusion_flax_model.msgpack", "model_index.json"]
    files += [f"{part}/config.json" for part in architectures.WEIGHT_PARTS]
    hub_of = Hub(tmp_path, files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_of)
    folder = hub.pipeline("owner/name", None, "model.path")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.bin")) == sorted(
        f"{part}.bin" for part in parts
    )


@pytest.mark.parametrize(("kind", "count"), [("sdxl", 2513), ("sd15", 1130)])
def test_a_published_model_has_the_published_names(kind, count):
    """sd_xl_base_1.0.safetensors has 2515 tensors: these, plus CLIP's position_ids and OpenCLIP's
    logit_scale, which do not affect text encodings."""
    single = []
    for part, prefix in names.PREFIXES[kind].items():
        settings = architectures.config(kind, part)
        shapes = architectures.shapes(part, settings)
        single += [prefix + entry.single for entry in names.table(part, shapes, settings)]
    assert len(single) == len(set(single)) == count
    unet = [name for name in single if name.startswith("model.diffusion_model.")]
    assert len(unet) == {"sdxl": 1680, "sd15": 686}[kind]
    expected = {
        "sdxl": [
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_out.0.bias",
            "model.diffusion_model.input_blocks.6.0.op.weight",
            "model.diffusion_model.output_blocks.2.2.conv.weight",
            "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
            "model.diffusion_model.label_emb.0.2.bias",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
            "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.bias",
            "conditioner.embedders.1.model.text_projection",
            "conditioner.embedders.1.model.positional_embedding",
        ],
        "sd15": [
            "model.diffusion_model.output_blocks.2.1.conv.weight",
            "model.diffusion_model.output_blocks.5.2.conv.weight",
            "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
        ],
    }[kind] + [
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.quant_conv.weight",
        "first_stage_model.encoder.norm_out.weight",
    ]
    assert set(expected) <= set(single)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_diffusers_converts_a_published_models_names_as_we_do(kind):
    """Every tensor of the real UNet and VAE, on the meta device, compared by object identity."""
    converters = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint,
        "vae": single_file_utils.convert_ldm_vae_checkpoint,
    }
    for part, convert in converters.items():
        settings = architectures.config(kind, part)
        shapes = architectures.shapes(part, settings)
        own = of_tensors({n: torch.empty(s, device="meta") for n, s in shapes.items()})
        entries = names.table(part, own, settings)
        single = names.to_single(own, entries, names.PREFIXES[kind][part])
        given = {name: torch.empty(lazy.shape, device="meta") for name, lazy in single.items()}
        full = dict(architectures.empty(part, settings).config)
        converted = convert(dict(given), full)
        assert converted.keys() == shapes.keys()
        for entry in entries:
            theirs = converted[entry.own[0]]
            if entry.form == "same":
                assert theirs is given[names.PREFIXES[kind][part] + entry.single], entry
            assert theirs.shape == shapes[entry.own[0]], entry


def test_what_a_file_has_beside_its_weights_is_carried_over(files, tmp_path):
    tensors = load_file(files["sdxl"]) | {
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.ones(1, 77),
    }
    path = tmp_path / "more.safetensors"
    stream.write(path, of_tensors(tensors), origin.at(str(files["sdxl"])).file.metadata)
    written = writing.save_single_file(tmp_path / "again.safetensors", origin.at(str(path)), {})
    again = load_file(written)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path, monkeypatch):
    """A checkpoint's pages count as the process's memory while it is mapped."""

    def mapped_bytes():
        found = re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    file = tmp_path / "large.safetensors"
    save_file({f"{n}": torch.full((1 << 20,), float(n)) for n in range(32)}, file)  # 4 MB each
    monkeypatch.setattr(weights, "_WINDOW_BYTES", 8 << 20)
    lazies, _ = weights.of_file(file)
    before = mapped_bytes()
    for name, lazy in lazies.items():
        assert lazy.read().sum().item() == float(name) * (1 << 20)
    assert mapped_bytes() - before < 32 << 20  # of 128 MiB


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(3)}, file)
    lazies, _ = weights.of_file(file)
    save_file({"y": torch.ones(3)}, file)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was in use"):
        lazies["x"].read()
