"""Extracting a LoRA from a fine-tuned model: the closest one of its rank."""

import json
import shutil

import pytest
import torch
from helpers import assert_export_refused, run_export
from models import TINY
from safetensors import safe_open
from test_export_resize import adapters_of
from test_export_runs import ONE_STEP
from test_lora_files import any_peft, assert_same_adapters, read_by_diffusers  # noqa: F401

from trainer.export import loras
from trainer.export.kept import Kept
from trainer.formats import architectures, lora, low_rank, origin, writing
from trainer.formats.names import canonical
from trainer.formats.weights import of_tensors

CONV = "down_blocks.0.resnets.0.conv1"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.mlp.fc1"
LAYERS = (  # part, layer, rank of its change
    ("unet", CONV, 3),
    ("unet", LINEAR, 2),
    ("unet", "down_blocks.0.downsamplers.0.conv", 4),
    ("text_encoder", TEXT, 2),
    ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj", 1),
    ("text_encoder_2", "text_model.encoder.layers.1.self_attn.out_proj", 3),
)


def weights_of(path):
    """Every tensor of a model, in fp32: {part: {name: tensor}}."""
    found = origin.at(str(path))
    return {
        part: {name: lazy.read().float() for name, lazy in found.weights(part).items()}
        for part in architectures.WEIGHT_PARTS
        if found.has(part)
    }


def write_model(target, changes, scheduler=None, base=TINY):
    """The base in fp32 with other values: changes = {(part, name): tensor}."""
    parts = weights_of(base)
    for (part, name), value in changes.items():
        parts[part][name] = value
    given = {part: of_tensors(tensors) for part, tensors in parts.items()}
    return writing.save_folder(target, origin.at(str(base)), given, scheduler)


def low(shape, rank, size=0.1, seed=0):
    """A random change of this rank, in the matrix view."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.Size(shape[1:]).numel()
    up = torch.randn(shape[0], rank, generator=generator)
    return size * (up @ torch.randn(rank, width, generator=generator)).reshape(shape) / width**0.5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The shipped model in fp32."""
    return write_model(tmp_path_factory.mktemp("base") / "base", {})


@pytest.fixture(scope="module")
def deltas(base):
    weights = weights_of(base)
    return {
        (part, f"{layer}.weight"): low(weights[part][f"{layer}.weight"].shape, rank, seed=seed)
        for seed, (part, layer, rank) in enumerate(LAYERS)
    }


@pytest.fixture(scope="module")
def tuned(base, deltas, tmp_path_factory):
    weights = weights_of(base)
    changes = {(part, name): weights[part][name] + delta for (part, name), delta in deltas.items()}
    return write_model(tmp_path_factory.mktemp("tuned") / "tuned", changes, base=base)


def extracted(capsys, source, target, *more):
    status, _, error = run_export(capsys, source, target, "--extract", *more)
    assert (status, error) == (0, ""), error
    return lora.read(target, loras.empty(origin.at(str(TINY))))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_change_of_low_rank_is_extracted_exactly_and_nothing_else(
    form, base, tuned, deltas, tmp_path, capsys, caplog
):
    """From linear layers, convolutions and text encoders; equal weights are left out."""
    caplog.set_level("INFO")
    target = tmp_path / "a.safetensors"
    held = extracted(capsys, tuned, target, "--base", base, "--rank=4", "--format", form)
    found = {
        (part, canonical(part, f"{path}.weight")): adapter
        for part, by_path in held.items()
        for path, adapter in by_path.items()
    }
    assert found.keys() == deltas.keys()
    for name, adapter in found.items():
        assert adapter.alpha == adapter.rank == min(4, *adapter.up.shape[:1]), name
        torch.testing.assert_close(adapter.delta(), deltas[name], rtol=0, atol=2e-7, msg=str(name))
    assert "with rank 4 in 6 layers, it keeps 100.0% of the change" in caplog.messages[-1]
    assert_same_adapters(read_by_diffusers(TINY, target), held)


def test_an_extracted_lora_merged_into_the_base_gives_the_fine_tuned_model(
    base, tuned, tmp_path, capsys
):
    extracted(capsys, tuned, tmp_path / "a.safetensors", "--base", base)
    more = ("--base", base, "--merge")
    assert run_export(capsys, tmp_path / "a.safetensors", tmp_path / "merged", *more)[0] == 0
    found, wanted = weights_of(tmp_path / "merged"), weights_of(tuned)
    for part, tensors in wanted.items():
        for name, value in tensors.items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=3e-7, msg=name)


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (40, 8, 3, 3), (16, 32, 1, 1), (4, 200)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_closest_adapter_is_as_close_as_the_exact_svd(shape, rank):
    torch.manual_seed(0)
    change = torch.randn(shape) * 1e-4
    adapter, squares = low_rank.closest(change, rank)
    assert adapter.rank == adapter.alpha == min(rank, shape[0])
    s = torch.linalg.svdvals(change.double().flatten(1))
    torch.testing.assert_close(squares, s.square(), rtol=1e-4, atol=1e-12)
    wanted, lost = s[rank:].square().sum(), (adapter.delta() - change).double().square().sum()
    assert lost <= wanted * 1.001 + 1e-6 * s.square().sum()
    assert adapter.down.abs().max() < 100 * adapter.up.abs().max() < 1e4 * adapter.down.abs().max()


def test_small_singular_values_beside_a_large_one_are_found():
    """Squaring loses them in fp32 if they are below 3e-4 of the largest; the last step does not."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (64, 80))
    change = (u * torch.tensor([1.0, 1e-2, 1e-3, 2e-4])) @ v.t()
    adapter, _ = low_rank.closest(change.float(), 4)
    torch.testing.assert_close(adapter.delta(), change.float(), rtol=0, atol=1e-6)


def test_a_runs_model_is_extracted_from_the_one_that_it_started_from(
    finished, tmp_path, capsys, caplog
):
    """From the run's folder, its model and a checkpoint, without --base; --rank=999 is exact."""
    caplog.set_level("INFO")
    folder = finished("run", "method.train=[unet,text_encoder]", "ema=fp32", *ONE_STEP)
    before, after = weights_of(TINY), weights_of(folder / "model")
    sources = (folder, folder / "model", folder / "checkpoints/step-000001")
    for number, source in enumerate(sources):
        held = extracted(capsys, source, tmp_path / f"{number}.safetensors", "--rank=999")
        assert held.keys() == {"unet", "text_encoder"}
        assert len(held["unet"]) > 100
        for part, by_path in held.items():
            for path, adapter in by_path.items():
                name = canonical(part, f"{path}.weight")
                change = after[part][name] - before[part][name]
                torch.testing.assert_close(adapter.delta(), change, rtol=0, atol=1e-6, msg=name)
        assert "0.0% are lost to the rank" in caplog.messages[-1]
        is_checkpoint = source == sources[-1]
        assert ("exporting the averaged weights" in caplog.text) == is_checkpoint
        caplog.clear()
    with safe_open(tmp_path / "2.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "1"


def test_a_run_without_checkpoints_needs_the_name_of_its_model(finished, tmp_path, capsys):
    folder = finished("run", *ONE_STEP)
    shutil.rmtree(folder / "checkpoints")
    status, _, error = run_export(capsys, folder, tmp_path / "a.safetensors", "--extract")
    assert status == 2
    assert error == (
        "error: --extract needs the model that SOURCE was fine-tuned from: --base=MODEL\n"
    )
    extracted(capsys, folder, tmp_path / "a.safetensors", "--base", TINY)


def test_what_a_lora_cannot_hold_is_measured(base, tmp_path, capsys, caplog):
    """A bias that changes as much as the weight does, of which the rank keeps nine tenths."""
    caplog.set_level("INFO")
    weights = weights_of(base)["unet"]
    name = f"{LINEAR}.weight"
    u, v = (torch.eye(*weights[name].shape)[:, :2] for _ in range(2))
    delta = (u * torch.tensor([0.3, 0.1])) @ v.t()
    bias = weights["conv_out.bias"].clone()
    bias[0] += 0.1**0.5
    changes = {("unet", name): weights[name] + delta, ("unet", "conv_out.bias"): bias}
    path = write_model(tmp_path / "tuned", changes, base=base)
    extracted(capsys, path, tmp_path / "a.safetensors", "--base", base, "--rank=1")
    assert "kept by a LoRA of rank 1: 45.0%, 2: 50.0%, 4: 50.0%" in caplog.messages
    assert "the LoRA keeps less than half of the change; --rank=2 would keep 50%" in caplog.text
    assert caplog.messages[-1].endswith(
        "with rank 1 in 1 layer, it keeps 45.0% of the change (of the sum of squares); 5.0% are "
        "lost to the rank, and 50.0% are in what no LoRA changes: biases, norms, embeddings, the "
        "first and last layers"
    )


@pytest.mark.parametrize(
    ("squares", "beside", "remedy"),
    [
        ([3.0, 1, 1, 1, 1, 1, 1, 1], 0, "; --rank=8 would keep 100%"),
        ([3.0, 3, 3, 0.5, 0.5], 0, "; --rank=4 would keep 95%"),
        ([3.0, 2, 0, 0, 0, 0], 5, "; --rank=2 would keep 50%"),
        ([3.0, 0], 5, "; the rest is in parameters that no LoRA changes: share the whole model"),
        ([3.0, 0], 2, None),
    ],
)
def test_a_lora_that_keeps_little_names_a_better_rank(squares, beside, remedy, caplog):
    squares = torch.tensor(squares, dtype=torch.float64)
    kept = Kept(beside=beside)
    kept.note(float(squares.sum()), float(squares[1:].sum()), squares)
    kept.report(1)
    assert (remedy in caplog.text) if remedy else not caplog.text


def test_weights_that_were_only_rounded_to_another_dtype_are_left_out(base, tmp_path, capsys):
    weights = weights_of(base)["unet"]
    name = f"{CONV}.weight"
    changes = {("unet", name): weights[name] + low(weights[name].shape, 2)}
    write_model(tmp_path / "tuned", changes, base=base)
    run_export(capsys, tmp_path / "tuned", tmp_path / "half", "--dtype=bfloat16")
    for one, other in ((tmp_path / "half", base), (tmp_path / "tuned", tmp_path / "half")):
        target = tmp_path / f"{one.name}.safetensors"
        if other == base:
            held = extracted(capsys, one, target, "--base", other)
            assert {part: list(by_path) for part, by_path in held.items()} == {"unet": [CONV]}
        else:  # the same model
            more = ("--extract", "--base", other)
            assert "nothing to extract" in run_export(capsys, one, target, *more)[2]


@pytest.mark.parametrize(("size", "is_said"), [(1e-2, True), (1.0, False)])
def test_a_change_that_may_be_rounding_is_said(size, is_said, base, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    weights = weights_of(base)["unet"][f"{CONV}.weight"]
    changes = {("unet", f"{CONV}.weight"): weights + low(weights.shape, 2, size)}
    write_model(tmp_path / "tuned", changes, base=base)
    run_export(capsys, tmp_path / "tuned", tmp_path / "half", "--dtype=bfloat16")
    extracted(capsys, tmp_path / "half", tmp_path / "a.safetensors", "--base", base)
    assert ("rounding the base to the fine-tuned model's dtype" in caplog.text) == is_said


def test_the_factors_have_the_fine_tuned_dtype_or_the_one_asked_for(base, tuned, tmp_path, capsys):
    run_export(capsys, tuned, tmp_path / "half", "--dtype=float16")
    for source, more, dtype in (
        (tuned, (), torch.float32),
        (tmp_path / "half", (), torch.float16),
        (tuned, ("--dtype=bfloat16",), torch.bfloat16),
    ):
        target = tmp_path / f"{dtype}.safetensors".removeprefix("torch.")
        held = extracted(capsys, source, target, "--base", base, *more)
        assert {a.up.dtype for by_path in held.values() for a in by_path.values()} == {dtype}


def test_a_change_too_large_for_the_dtype_is_named_with_its_layer(base, tmp_path, capsys):
    weights = weights_of(base)["unet"]
    changes = {("unet", f"{CONV}.weight"): weights[f"{CONV}.weight"] * 1e12}
    path = write_model(tmp_path / "tuned", changes, base=base)
    more = ("--extract", "--base", base)
    out = tmp_path / "a.safetensors"
    status, _, error = run_export(capsys, path, out, *more, "--dtype=float16")
    assert (status, out.exists()) == (2, False)
    assert error.startswith(f"error: the LoRA's down matrix of unet.{CONV}.weight has values up to")
    assert error.endswith("which float16 cannot represent; choose another dtype\n")
    extracted(capsys, path, out, "--base", base)


def test_the_noise_schedule_of_a_fine_tune_for_v_prediction_comes_back_when_merged(
    base, tmp_path, capsys, caplog
):
    own = origin.at(str(base)).config("scheduler")
    plain = own | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    began = write_model(tmp_path / "began", {}, plain, base)
    weights = weights_of(base)["unet"][f"{CONV}.weight"]
    changes = {("unet", f"{CONV}.weight"): weights + low(weights.shape, 2)}
    path = write_model(tmp_path / "tuned", changes, own, base)
    target = tmp_path / "a.safetensors"
    extracted(capsys, path, target, "--base", began)
    assert "needs another noise schedule than" in caplog.text
    with safe_open(target, "pt") as file:
        described = file.metadata()
    assert described["modelspec.prediction_type"] == "v"
    assert described["ss_zero_terminal_snr"] == "True"
    assert run_export(capsys, target, tmp_path / "merged", "--base", began, "--merge")[0] == 0
    found = origin.at(str(tmp_path / "merged")).config("scheduler")
    assert found["prediction_type"] == "v_prediction"
    assert found["rescale_betas_zero_snr"]


def test_another_vae_is_mentioned(base, tuned, tmp_path, capsys, caplog):
    extracted(capsys, tuned, tmp_path / "a.safetensors", "--base", base)
    assert "VAE" not in caplog.text
    name = "decoder.conv_out.bias"
    vae = weights_of(base)["vae"][name]
    weight = weights_of(tuned)["unet"][f"{CONV}.weight"]
    changes = {("vae", name): vae + 1, ("unet", f"{CONV}.weight"): weight}
    path = write_model(tmp_path / "other", changes, base=base)
    extracted(capsys, path, tmp_path / "b.safetensors", "--base", base)
    assert "the models have different VAEs, which no LoRA can hold" in caplog.text


def test_mistakes_in_extracting_and_resizing_are_one_line_and_write_nothing(
    base, tuned, sd15, tmp_path, capsys
):
    models, held = adapters_of(8, False)
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl", adapters=held)
    nan = weights_of(base)["unet"]["conv_in.weight"].clone()
    nan[0] = torch.nan
    broken = write_model(tmp_path / "broken", {("unet", "conv_in.weight"): nan}, base=base)
    one = weights_of(base)
    names = ("unet", "conv_in.weight"), ("unet", "time_embedding.linear_1.bias")
    changes = {(part, name): one[part][name] + 1 for part, name in names}
    changes["text_encoder_2", "text_projection.weight"] = torch.eye(
        *one["text_encoder_2"]["text_projection.weight"].shape
    )
    edges = write_model(tmp_path / "edges", changes, base=base)
    before = sorted(tmp_path.iterdir())
    out, own, extract = tmp_path / "out.safetensors", ("--base", base), "--extract"
    cases = (
        (
            [tuned, out, extract],
            "--extract needs the model that SOURCE was fine-tuned from: ",
        ),
        ([tuned, out, extract, "--base", sd15], "of the unet is (32, 4, 3, 3) in the first and "),
        ([tuned, out, extract, "--base", "sdxl"], "--base=sdxl is an architecture without weights"),
        ([base, out, extract, *own], "have the same weights; name the model that the first was"),
        ([edges, out, extract, *own], "differ only in 3 tensors that no LoRA changes (biases, "),
        ([broken, out, extract, *own], f"{broken}: unet.conv_in.weight has values that are not"),
        ([tuned, out, extract, "--base", broken], f"{broken}: unet.conv_in.weight has values"),
        ([tuned, out, extract, *own, "--merge"], "leave one out"),
        ([tuned, out, extract, *own, "--rank=0"], "--rank=0 must be at least 1"),
        ([tuned, out, extract, *own, "--scale=2"], "--scale=2 has no effect without --merge"),
        ([tuned, out, extract, *own, "--format=single_file"], "use kohya or diffusers"),
        ([tuned, tmp_path / "out", extract, *own], "must end in .safetensors"),
        ([path, out, extract, *own], "--extract is for models, and "),
        ([tuned, out, "--rank=8"], "is a model; add --extract to make a LoRA of it"),
        ([path, out, "--rank=4", "--merge", *own], "--rank=4 has no effect with --merge"),
        ([path, out, "--rank=8", *own], "has a rank above 8; leave out --rank"),
    )
    assert_export_refused(capsys, cases)
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_checkpoint_cannot_become_is_refused(finished, tmp_path, capsys):
    full, adapted = finished("full", *ONE_STEP), finished("lora", "method=lora", *ONE_STEP)
    out = tmp_path / "a.safetensors"
    for folder, option, said in (
        (full, "--rank=4", "is a checkpoint of a full fine-tune; add --extract"),
        (adapted, "--extract", "--extract is for models, and "),
    ):
        source = folder / "checkpoints/step-000001"
        status, _, error = run_export(capsys, source, out, option, "--base", TINY)
        assert status == 2
        assert said in error
    status, _, error = run_export(capsys, adapted, out, "--extract")
    assert (status, "is a LoRA; leave out --extract" in error) == (2, True)


def test_a_model_of_another_architecture_is_written_in_diffusers_format_only(
    base, tuned, tmp_path, capsys
):
    """One text encoder of Stable Diffusion 2's kind: kohya's format has no names for it."""
    paths = []
    for path in (base, tuned):
        copy = shutil.copytree(path, tmp_path / path.name)
        index = json.loads((copy / "model_index.json").read_text())
        index |= {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
        (copy / "model_index.json").write_text(json.dumps(index))
        config = json.loads((copy / "text_encoder/config.json").read_text())
        (copy / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
        paths.append(copy)
    out = tmp_path / "a.safetensors"
    more = ("--extract", "--base", paths[0])
    status, _, error = run_export(capsys, paths[1], out, *more)
    assert (status, "use diffusers'" in error) == (2, True)
    assert run_export(capsys, paths[1], out, *more, "--format=diffusers")[0] == 0
    more = ("--extract", "--base", paths[0], "--format=diffusers")
    status, _, error = run_export(capsys, tuned, tmp_path / "b.safetensors", *more)
    assert (status, "the second has no text_encoder_2; name the" in error) == (2, True)
