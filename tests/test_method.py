"""What is trained: the chosen parts and layers, and nothing else."""

import re
import shlex
import shutil

import pytest
import torch
from helpers import QUICK, assert_same_weights, rows, weights
from models import make_sd15
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.export import __main__ as export
from trainer.formats import adapters, lora
from trainer.formats.adapter import Lora
from trainer.models.model import Model
from trainer.objective import encoding
from trainer.run import run
from trainer.training import method

CPU = torch.device("cpu")


def attached(config, seed=0):
    model = Model(config.model, CPU)
    model.keep_text_encoders(config.method.train)
    model.load_unet()
    method.attach(config.method, model, seed, getattr(config.method, "start_from", None))
    return model


def test_targets_are_patterns_at_the_end_of_layers_names(composed):
    targets = r"['down_blocks.*attn1.to_[qk]', 'conv[12]']"
    model = attached(composed("method=lora", f"method.targets={targets}"))
    names = method.saved_tensors(model)
    assert any("conv1.lora_A" in name for name in names)
    for name in names:
        assert ("attn1.to_" in name and "down_blocks" in name) or "conv" in name, name
        assert "to_v" not in name


LOCON = [
    *("method=lora", "method.rank=8", "method.alpha=4", "method.targets=[to_q,to_k,conv1,conv2]"),
    "method.ranks=[{pattern: conv1, rank: 4, alpha: 1}, {pattern: 'conv|mid', rank: 2}]",
]


def test_some_modules_have_another_rank(composed):
    found = adapters.of_models(attached(composed(*LOCON)).trained_parts)["unet"]
    for name, adapter in found.items():
        first, second = "conv1" in name, "conv2" in name or "mid" in name
        assert (adapter.rank, adapter.alpha) == (
            (4, 1.0) if first else (2, 4.0) if second else (8, 4.0)
        )
    assert {adapter.rank for adapter in found.values()} == {2, 4, 8}


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_adapters_of_several_ranks_are_exported_and_started_from(quick, composed, kind):
    folder = quick("run", *LOCON, f"method.export=[{kind}]")
    (file,) = (folder / "lora").glob("*.safetensors")
    model = attached(composed(*LOCON, f"method.start_from={file}"))
    trained = weights(folder, 4)
    for key, tensor in method.saved_tensors(model).items():
        assert torch.equal(tensor, trained[key]), key


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ("[{pattern: to_v, rank: 2}]", r"method.ranks\[0\]: to_v matches no adapted module"),
        (
            "[{pattern: to, rank: 2}, {pattern: to_q, rank: 4}]",
            r"method.ranks\[1\]: to_q matches no adapted module that earlier patterns leave",
        ),
        ("[{pattern: '(', rank: 2}]", r"method.ranks: \( is not a regular expression"),
        ("[{pattern: to_q, rank: 0}]", r"method.ranks.0.rank=0 is out of range"),
        ("[{pattern: to_q, rank: 2, alpha: 0}]", r"method.ranks.0.alpha=0.* is out of range"),
        ("[{pattern: to_q}]", r"method.ranks\[0\].rank has no value"),
        ("[{pattern: to_q, ranks: 3}]", r"ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused_by_name(command, ranks, says):
    status, _, err = command(
        *QUICK, *LOCON[:-2], "method.targets=[to_q,to_k]", f"method.ranks={ranks}"
    )
    assert status == 2
    assert re.search(says, err), err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("only", ["down_blocks.1", "mid_block"])
def test_no_options_are_named_for_a_lora_of_some_blocks(composed, tmp_path, only):
    options = ["method=lora", "method.rank=4", f"method.targets=[{only}.*to_q]"]
    model, file = attached(composed(*options)), tmp_path / "some.safetensors"
    lora.save_lora(file, "diffusers", model.trained_parts, "sdxl")
    with pytest.raises(
        UserError, match=r"is (absent|rank 4, alpha 16) in the file and [^;]+ in the run$"
    ):
        attached(composed("method=lora", "method.rank=4", f"method.start_from={file}"))


def test_a_lora_of_layers_that_nothing_is_read_from_alone_is_refused(composed, tmp_path):
    options = ["method=lora", "method.rank=4", "method.train=[text_encoder]"]
    model = attached(composed(*options))
    own = adapters.of_models(model.trained_parts)["text_encoder"]
    path, adapter = next((p, a) for p, a in own.items() if p.endswith("q_proj"))
    file, spare = tmp_path / "some.safetensors", {path.replace("layers.0", "layers.1"): adapter}
    found = {"text_encoder": spare}
    lora.save_lora(file, "kohya", model.trained_parts, "sdxl", adapters=found)
    with pytest.raises(
        UserError, match=r"some\.safetensors has no adapter of a layer whose output is used"
    ):
        attached(composed(*options, f"method.start_from={file}"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_doras_magnitudes_are_the_exact_norms_of_the_weights(composed, dtype):
    """In bf16 they would rescale each output by up to 0.4 % before any training."""
    targets = "method.targets=[to_q,conv1]"
    model = attached(composed("method=lora", "method.dora=true", targets, f"model.dtype={dtype}"))
    found = 0
    for layer in model.unet.modules():
        if isinstance(layer, LoraLayer):
            weight, magnitude = layer.get_base_layer().weight, layer.lora_magnitude_vector
            norms = weight.double().flatten(1).norm(dim=1).float()
            (own,) = magnitude.parameters()
            assert own.dtype == torch.float32
            assert torch.allclose(own.flatten(), norms, rtol=1e-6, atol=0)
            found += 1
    assert found > 10


def test_dora_trains_magnitudes_too_and_starts_as_the_base_model(composed):
    plain, dora = (attached(composed("method=lora", f"method.dora={on}")) for on in (False, True))
    more = method.saved_tensors(dora).keys() - method.saved_tensors(plain).keys()
    assert more
    assert all("lora_magnitude_vector" in name for name in more)


def test_rslora_scales_by_the_root_of_the_rank(composed):
    model = attached(composed("method=lora", "method.rank=4", "method.rslora=true"))
    layer = next(m for m in model.unet.modules() if hasattr(m, "scaling"))
    assert layer.scaling["default"] == 16 / 2


def test_dropout_thins_an_adapters_inputs_in_training_steps_alone(composed):
    """Half of them are 0 and the others double; the model that is evaluated and drawn is whole."""
    model = attached(composed("method=lora", "method.dropout=0.5"))
    layer = next(m for m in model.unet.modules() if isinstance(m, LoraLayer))
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    (dropout,) = layer.lora_dropout.values()
    ones = torch.ones(1, 10_000)
    assert {*dropout(ones).flatten().tolist()} == {0, 2}
    x = torch.randn(4, layer.get_base_layer().in_features)
    with model.evaluating():
        whole = layer(x)
        assert torch.equal(layer(x), whole)
        assert torch.equal(dropout(ones), ones)
    assert not torch.equal(layer(x), whole)
    assert model.unet.training


def test_adapters_start_from_the_seed(composed):
    config = composed("method=lora", "method.train=[unet,text_encoder]")
    first, again, other = (method.saved_tensors(attached(config, s)) for s in (0, 0, 1))
    differing = [n for n in first if not torch.equal(first[n], other[n])]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert {n.split(".")[0] for n in differing} == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    "chosen", ["method=full", "method=lora method.text_targets=[q_proj,fc1]"], ids=["full", "lora"]
)
def test_a_text_encoder_is_trained_where_it_is_asked_for(quick, chosen):
    options = [*chosen.split(), "method.train=[unet,text_encoder]", "schedule=constant"]
    folder = quick("run", *options, "runtime.save_every=2", "runtime.keep_checkpoints=9")
    before, after = weights(folder, 2), weights(folder, 4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    # layers whose output the UNet does not read cannot move and are not saved
    assert not [name for name in before if "final_layer_norm" in name or "layers.1." in name]


def test_a_layer_that_nothing_reads_gets_no_adapter(composed, tmp_path):
    """A file from kohya's scripts may have adapters for such layers; they are ignored."""
    options = ["method=lora", "method.rank=4", "method.train=[unet,text_encoder]"]
    model = attached(composed(*options))
    own = adapters.of_models(model.trained_parts)
    assert {path.split(".layers.")[1][0] for path in own["text_encoder"]} == {"0"}
    down = [name for name in method.saved_tensors(model) if ".lora_A." in name]
    assert len(down) == sum(len(found) for found in own.values())
    path = next(path for path in own["text_encoder"] if path.endswith("q_proj"))
    size = own["text_encoder"][path].down.shape[1]
    small = Lora(down=torch.ones(4, size), up=torch.zeros(size, 4), alpha=16.0)
    more = own | {
        "text_encoder": own["text_encoder"] | {path.replace("layers.0", "layers.1"): small}
    }
    file = tmp_path / "kohya.safetensors"
    lora.save_lora(file, "kohya", model.trained_parts, "sdxl", adapters=more)
    again = attached(composed(*options, f"method.start_from={file}"), seed=1)
    for name, tensor in method.saved_tensors(again).items():
        assert torch.equal(tensor, method.saved_tensors(model)[name]), name
    with pytest.raises(ValueError, match=r"layers\.1\.\* matches no linear or convolution layer"):
        attached(composed(*options, r"method.text_targets=['layers.1.*']"))


def test_a_part_that_the_model_lacks_is_named(composed, tmp_path):
    path = make_sd15(tmp_path / "sd15")
    config = composed("model=sd15", f"model.path={path}", "method.train=[text_encoder_2]")
    with pytest.raises(
        ValueError, match=r"method.train=.*has no text_encoder_2; it has unet, text"
    ):
        attached(config)


def test_sd15_trains_samples_and_exports(quick, tmp_path):
    path = make_sd15(tmp_path / "sd15")
    drawn = ["log.sample_count=2", "log.sample_steps=2"]
    folder = quick("run", "model=sd15", f"model.path={path}", "model.dtype=float32", *drawn)
    assert rows(folder)[0]["eval/loss"] != rows(folder)[-1]["eval/loss"]
    assert (folder / "samples/step-000004.png").exists()
    assert (folder / "model/unet/config.json").exists()


def test_a_lora_starts_from_a_file_of_either_kind(quick, composed):
    """Values come from the file; the run's rank, alpha and targets must match it."""
    options = ["method=lora", "method.rank=4", "method.alpha=2"]
    folder = quick("first", *options)
    trained = weights(folder, 4)
    for name in ("adafactor8bit-lora", "pytorch_lora_weights"):
        file = folder / f"lora/{name}.safetensors"
        model = attached(composed(*options, f"method.start_from={file}"))
        for key, tensor in method.saved_tensors(model).items():
            assert torch.equal(tensor, trained[key]), key
        other = composed("method=lora", "method.rank=8", f"method.start_from={file}")
        with pytest.raises(ValueError, match=r"is rank 4, alpha 2 in the file and rank 8"):
            attached(other)


@pytest.mark.parametrize(
    "options",
    [
        ["method.rank=4", "method.alpha=2", "method.rslora=true"],
        ["method.rank=2", "method.dora=true", "method.targets=[to_q,to_out.0,ff.net.0.proj]"],
        ["method.rank=3", "method.train=[unet,text_encoder]", "method.targets=[conv1,proj_in]"],
        ["method.rank=3", "method.train=[text_encoder_2]", "method.text_targets=[fc1,q_proj]"],
        [
            *("method.rank=8", "method.targets=[to_q,to_k,to_out.0,conv1]"),
            "method.ranks=[{pattern: conv, rank: 4, alpha: 1}, {pattern: 'to_out[.]0', rank: 2}]",
        ],
    ],
)
def test_a_lora_that_does_not_fit_is_refused_early_with_the_options_that_do(
    composed, tmp_path, monkeypatch, options
):
    model, file = attached(composed("method=lora", *options)), tmp_path / "some.safetensors"
    with torch.no_grad():
        for name, tensor in method.saved_tensors(model).items():
            tensor.add_(0.01 if "lora_B" in name else 0)
    lora.save_lora(file, "diffusers", model.trained_parts, "sdxl")
    start = f"method.start_from={file}"
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("too late"))
    train = next((o for o in options if "train=" in o), "method.train=[unet]")
    with pytest.raises(UserError, match=r"^the LoRA does not fit the run: ") as refused:
        run(composed(*QUICK, "method=lora", "method.rank=16", train, start), tmp_path / "run")
    fitting = shlex.split(str(refused.value).partition("it fits a run with ")[2])
    again = attached(composed("method=lora", *fitting, start), seed=1)
    for name, tensor in method.saved_tensors(again).items():
        assert torch.equal(tensor, method.saved_tensors(model)[name]), name


def test_a_run_that_started_from_a_lora_is_resumed_without_its_file(quick, tmp_path):
    options = ["method=lora", "method.rank=4", "log.eval_points=1"]
    first = quick("first", *options, "schedule.steps=1", "schedule.warmup_steps=0")
    file = first / "lora/pytorch_lora_weights.safetensors"
    begun = [*options, f"method.start_from={file}", "runtime.save_every=2"]
    whole = weights(quick("run", *begun), 4)
    file.unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    for start in (file, "null"):  # the missing file, or no file
        resume = f"resume={tmp_path / 'run/checkpoints/step-000002'}"
        fork = quick(f"fork{start == file}", *begun, f"method.start_from={start}", resume)
        assert_same_weights(weights(fork, 4), whole)


def test_adapters_that_a_rule_freezes_are_in_checkpoints(quick, tmp_path):
    """They may be of the file that the run started from, which a resumed run does not read."""
    options = ["method=lora", "method.rank=4", "log.eval_points=1"]
    first = quick("first", *options, "schedule.steps=1", "schedule.warmup_steps=0")
    file = first / "lora/pytorch_lora_weights.safetensors"
    rule = "method.rules=[{pattern: attn1, trainable: false}]"
    begun = [*options, f"method.start_from={file}", "runtime.save_every=2", rule]
    whole = quick("run", *begun)
    half = tmp_path / "run/checkpoints/step-000002"
    fork = quick("fork", *begun, f"resume={half}")
    assert_same_weights(weights(fork, 4), weights(whole, 4))
    exported = tmp_path / "exported.safetensors"
    source = str(whole / "checkpoints/step-000004")
    assert export.main([source, str(exported), "--format=diffusers"]) == 0
    result = load_file(whole / "lora" / file.name)
    assert any("attn1" in name and tensor.any() for name, tensor in result.items())
    assert_same_weights(load_file(fork / "lora" / file.name), result)
    assert_same_weights(load_file(exported), result)


def test_a_run_called_like_diffusers_file_leaves_both_loras(quick):
    """Neither overwrites the other."""
    folder = quick("run", "method=lora", "name=PyTorch_lora_weights")
    found = {path.name: path for path in (folder / "lora").iterdir()}
    assert set(found) == {
        "PyTorch_lora_weights-kohya.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    kinds = {next(iter(load_file(path))).partition("_")[0] for path in found.values()}
    assert kinds == {"lora", "unet.down"}


def test_a_full_fine_tune_is_exported_as_a_single_file_that_trains_on(quick, composed):
    folder = quick("first", "method.export=[single_file]", "method.export_dtype=float16")
    file = folder / "adafactor8bit-full.safetensors"
    trained = weights(folder, 4)
    unet = attached(composed(f"model.path={file}")).unet
    for name, tensor in unet.named_parameters():
        assert torch.equal(tensor, trained[f"unet.{name}"].half().float()), name


def test_another_vae_encodes_and_is_exported(quick, finished, tmp_path, composed):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(f"{composed().model.path}/vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(0.9)
    vae.save_pretrained(tmp_path / "vae")
    plain, other = finished("plain"), quick("other", f"model.vae={tmp_path}/vae")
    assert rows(plain)[0]["eval/loss"] != rows(other)[0]["eval/loss"]
    written = AutoencoderKL.from_pretrained(other / "model/vae")
    assert torch.equal(written.encoder.conv_in.weight, vae.encoder.conv_in.weight)


METHODS = (
    "method=full",
    "method=full method.train=[text_encoder]",
    "method=lora",
    "method=lora method.dora=true method.targets=[to_q,conv1]",
    "method=lora method.train=[unet,text_encoder_2] method.text_targets=[q_proj]",
)


@pytest.mark.parametrize("chosen", METHODS)
def test_what_is_trained_has_the_same_names_without_any_values(composed, chosen):
    config = composed(*chosen.split())
    real = attached(config)
    there = method.trained_parameters(real)
    trained = method.trained_parameters(method.attached_on_meta(config.method, real))
    assert {k: (p.shape, p.dtype) for k, p in trained.items()} == {
        k: (p.shape, p.dtype) for k, p in there.items()
    }
    assert all(parameter.is_meta for parameter in trained.values())


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ("method=lora method.targets=[foo]", r"method\.targets=\['foo'\]"),
        (
            "method=lora method.train=[text_encoder] method.text_targets=[foo]",
            r"method\.text_targets=\['foo'\]",
        ),
        ("method.rules=[{pattern:foo,lr_scale:0.5}]", r"method\.rules\[0\]: foo matches no"),
        ("method=lora method.rules=[{pattern:bias,lr_scale:0.5}]", r"rules\[0\]: bias matches no"),
        ("method.rules=[{pattern:.,trainable:false}]", "leave nothing to train"),
        ("noise.timestep_high=2000", r"noise\.timestep_high=2000: the model has timesteps in"),
    ],
)
def test_what_the_model_lacks_is_refused_before_anything_is_encoded(
    quick, monkeypatch, chosen, says
):
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("it is encoded"))
    with pytest.raises(UserError, match=says):
        quick("run", *chosen.split())
