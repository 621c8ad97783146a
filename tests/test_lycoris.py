"""LoKr and LoHa: what is trained, written, and read by others as LyCORIS defines it."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from helpers import QUICK, assert_same_weights, run_export, weights
from models import TINY
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora_files import BLOCK, OPTIONS, folders, fresh, trained
from test_method import attached

from trainer.errors import UserError
from trainer.formats import adapters, lora, origin
from trainer.storage import result
from trainer.training import method

__all__ = ["folders"]  # a fixture
LOKR = ("method=lokr", "method.rank=2", "method.alpha=1", "method.factor=4")
# Of every kind: w1 or w2 whole or not, convolutions, ranks of their own.
KINDS = {
    "lokr": (*LOKR, "method.decompose_both=true", "method.targets=[to_q,to_out.0,conv1,conv2]",
             "method.ranks=[{pattern: conv1, rank: 1, alpha: 3}, {pattern: to_out, rank: 99}]"),
    "loha": ("method=loha", "method.rank=2", "method.alpha=1", "method.targets=[to_q,conv1]"),
}  # fmt: skip


def read(names, tensors, prefix):
    """A module's change as ComfyUI's comfy/weight_adapter computes it from a file's tensors."""
    own = {name: tensors.get(f"{prefix}.{name}") for name in names}
    alpha, rank = tensors[f"{prefix}.alpha"], None
    if "hada_w1_a" in own:
        rank = own["hada_w1_b"].shape[0]
        product = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        return product * alpha / rank
    w1, w2 = own["lokr_w1"], own["lokr_w2"]
    if w1 is None:
        rank, w1 = own["lokr_w1_b"].shape[0], own["lokr_w1_a"] @ own["lokr_w1_b"]
    if w2 is None:
        rank, w2 = own["lokr_w2_b"].shape[0], own["lokr_w2_a"] @ own["lokr_w2_b"]
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2) * (1 if rank is None else alpha / rank)


@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
@pytest.mark.parametrize("base", ["sdxl", "sd15"])
def test_what_peft_computes_is_read_back(folders, tmp_path, base, config):
    """Of convolutions and all text encoders, too."""
    models = trained(folders[base], config=config, unet={"alpha_pattern": {"to_k": 5}})
    path = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, base)
    found = lora.read(path, fresh(folders[base]))
    assert sum(len(by_path) for by_path in found.values()) > 100
    for part, model in models.items():
        for name, adapter in found[part].items():
            wanted = model.get_submodule(name).get_delta_weight("default").detach()
            torch.testing.assert_close(adapter.delta().reshape(wanted.shape), wanted, msg=name)
            assert wanted.abs().max() > 0, name


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_an_adapter_changes_nothing_before_training_and_is_drawn_from_the_seed(composed, options):
    one, two, other = (attached(composed(*options), seed) for seed in (0, 0, 1))
    tensors = [method.saved_tensors(model) for model in (one, two, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())
    assert not all(torch.equal(x, tensors[2][name]) for name, x in tensors[0].items())
    for name, adapter in adapters.of_models(one.trained_parts)["unet"].items():
        assert not adapter.delta().any(), name
        assert any(tensor.any() for tensor in adapter.tensors().values()), name
    assert all(x.dtype == torch.float32 and x.requires_grad is False for x in tensors[0].values())


@pytest.fixture
def run_of(finished, composed):
    """A short run of a kind: its folder, its file's tensors, and what PEFT computes with its last
    checkpoint, by module."""

    def make(kind):
        folder = finished("run", *KINDS[kind], "optim=adamw", "optim.lr=0.02")
        model = attached(composed(*KINDS[kind]))
        method.restore(model, weights(folder, 4))
        layers = {n: x for n, x in model.unet.named_modules() if isinstance(x, BaseTunerLayer)}
        changes = {n: x.get_delta_weight("default").detach() for n, x in layers.items()}
        assert all(change.any() for change in changes.values())
        (file,) = (folder / "lora").iterdir()
        return folder, load_file(file), changes

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_readers_get_what_was_trained(run_of, kind):
    """Two whole factors are not scaled."""
    folder, tensors, changes = run_of(kind)
    names = {name.rpartition(".")[2] for name in tensors} - {"alpha"}
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    prefixes = {f"{attention}.to_q": BLOCK}
    if kind == "lokr":
        whole = f"{BLOCK.removesuffix('to_q')}to_out_0"
        assert tensors[f"{whole}.alpha"] == 99  # the rank, as LyCORIS writes it
        prefixes[f"{attention}.to_out.0"] = whole
    for name, prefix in prefixes.items():
        torch.testing.assert_close(read(names, tensors, prefix), changes[name])
    (file,) = (folder / "lora").iterdir()
    found = lora.read(file, fresh(TINY, ["unet"]))["unet"]
    assert len(found) == sum(name.endswith(".alpha") for name in tensors)
    assert found.keys() == changes.keys()
    for name, change in changes.items():
        torch.testing.assert_close(found[name].delta().reshape(change.shape), change, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_exported_as_the_run_is_and_merged(run_of, kind, tmp_path, capsys):
    folder, tensors, changes = run_of(kind)
    again, merged = tmp_path / "again.safetensors", tmp_path / "merged"
    assert run_export(capsys, folder / "checkpoints/step-000004", again)[0] == 0
    assert_same_weights(load_file(again), tensors)
    assert run_export(capsys, folder, merged, "--merge", "--dtype=float32")[0] == 0
    before, after = fresh(TINY, ["unet"])["unet"], fresh(merged, ["unet"])["unet"]
    for name, change in changes.items():
        added = after.get_submodule(name).weight - before.get_submodule(name).weight
        torch.testing.assert_close(added, change, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_and_another_one_starts_from_its_file(quick, composed, tmp_path, kind):
    options = (*KINDS[kind], "runtime.save_every=2")
    whole = quick("run", *options)
    (file,) = (whole / "lora").iterdir()
    fork = quick("fork", *options, f"resume={whole / 'checkpoints/step-000002'}")
    assert_same_weights(weights(fork, 4), weights(whole, 4))
    started = attached(composed(*KINDS[kind], f"method.start_from={file}"), seed=5)
    assert_same_weights(method.saved_tensors(started), weights(whole, 4))
    for other in ("method=lora", "method=lokr method.factor=2", "method=loha method.rank=3"):
        hint = "fits a run with .*" if kind in other else f"continues in a run with method={kind}"
        said = rf"Lo(Kr|Ha) does not fit the run: unet\..* in the file and .*in the run; it {hint}$"
        with pytest.raises(UserError, match=said) as refused:
            attached(composed(*other.split(), f"method.start_from={file}"))
        if kind in other:
            fitting = shlex.split(str(refused.value).partition("it fits a run with ")[2])
            options = (f"method={kind}", *fitting, f"method.start_from={file}")
            started = attached(composed(*options), seed=5)
            assert_same_weights(method.saved_tensors(started), weights(whole, 4))


def test_files_of_other_programs_are_drawn_and_merged_whatever_their_factors(tmp_path):
    """Tucker's cores, factors of any shape, no alpha, half precision."""

    def random(*shape):
        return torch.randn(shape, dtype=torch.float16)

    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    line = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_k"
    tensors = {
        f"{BLOCK}.lokr_w1": random(2, 16),
        f"{BLOCK}.lokr_w2": random(32, 4),
        f"{line}.lokr_w1_a": random(4, 1),
        f"{line}.lokr_w1_b": random(1, 8),
        f"{line}.lokr_w2": random(16, 8),
        f"{conv}.lokr_w1": random(8, 4),
        f"{conv}.lokr_t2": random(2, 2, 3, 3),
        f"{conv}.lokr_w2_a": random(2, 4),
        f"{conv}.lokr_w2_b": random(2, 8),
        f"{conv}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "lokr.safetensors")
    model = fresh(TINY, ["unet"])["unet"]
    found = lora.read(tmp_path / "lokr.safetensors", {"unet": model})["unet"]
    f = {name: tensor.float() for name, tensor in tensors.items()}
    core = torch.einsum(
        "ijkl,ip,jr->prkl", *(f[f"{conv}.lokr_{end}"] for end in ("t2", "w2_a", "w2_b"))
    )
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    wanted = {
        f"{attention}.to_q": torch.kron(f[f"{BLOCK}.lokr_w1"], f[f"{BLOCK}.lokr_w2"]),
        f"{attention}.to_k": torch.kron(
            f[f"{line}.lokr_w1_a"] @ f[f"{line}.lokr_w1_b"], f[f"{line}.lokr_w2"]
        ),
        "down_blocks.0.resnets.0.conv1": torch.kron(
            f[f"{conv}.lokr_w1"][:, :, None, None], core.contiguous()
        )
        / 2,
    }
    assert found.keys() == wanted.keys()
    with adapters.attached(model, found, 0.5):
        for name, delta in wanted.items():
            torch.testing.assert_close(found[name].delta(), delta)
            layer = model.get_submodule(name)
            torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    assert not any("lokr" in name for name, _ in model.named_parameters())


def test_the_file_says_which_program_and_arguments_it_is_for(finished):
    folder = finished("run", *KINDS["lokr"], "optim=adamw", "optim.lr=0.02")
    with safe_open(next((folder / "lora").iterdir()), "pt") as file:
        found = file.metadata()
    assert found["ss_network_module"] == "lycoris.kohya"
    wanted = {"algo": "lokr", "decompose_both": "True", "factor": "4"}
    assert json.loads(found["ss_network_args"]) == wanted
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize("config", OPTIONS)
def test_only_a_lora_is_resized_or_written_for_diffusers(config, tmp_path, capsys):
    file = lora.save_lora(
        tmp_path / "a.safetensors", "kohya", trained(TINY, ["unet"], config=config), "sdxl"
    )
    for more, says in (
        (("--rank=1",), "--rank=1 is for LoRAs, and "),
        (("--format=diffusers",), "diffusers' format is for LoRAs"),
    ):
        target = tmp_path / "b.safetensors"
        status, _, error = run_export(capsys, file, target, "--base", TINY, *more)
        if config is LoraConfig:
            assert status == 0, error
            target.unlink()
        else:
            assert status == 2
            assert says in error
            assert len(error.splitlines()) == 1
            assert not target.exists()
    assert run_export(capsys, file, target, "--base", TINY, "--dtype=float16")[0] == 0


@pytest.mark.parametrize("config", [LoKrConfig, LoHaConfig])
def test_messages_about_a_file_name_its_kind(config, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    models = trained(TINY, ["unet"], config=config)
    file = lora.save_lora(tmp_path / "a.safetensors", "kohya", models, "sdxl")
    kind, target = config.__name__.removesuffix("Config"), tmp_path / "b.safetensors"
    assert run_export(capsys, file, target, "--base", TINY)[0] == 0
    assert f"{file} -> {target} (a {kind} in kohya format)" in caplog.messages
    assert f"{target} holds the {kind} alone" in caplog.messages[-1]
    for more, says in (
        (("--extract",), f"{file} is a {kind}; leave out --extract"),
        (("--base", TINY, "--format=single_file"), f"is for models, and {file} is a {kind}: use"),
    ):
        status, _, error = run_export(capsys, file, tmp_path / "c.safetensors", *more)
        assert (status, says in error) == (2, True), error
    with pytest.raises(UserError, match=f"is a {kind}, not a model"):
        origin.at(str(file))


def test_a_model_whose_files_have_no_names_for_it_is_refused_before_training(composed):
    other = SimpleNamespace(origin=SimpleNamespace(kind="other"))
    with pytest.raises(UserError, match=r"set method=lora method\.export=\[diffusers\]$"):
        result.check(composed("method=lokr").method, other)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (("method.rank=99", "method.alpha=2", "method.decompose_both=true"), True),
        (("method.rank=2", "method.alpha=2", "method.decompose_both=true"), False),
    ],
)
def test_options_that_whole_factors_do_not_heed_are_named(quick, caplog, options, idle):
    config = ("method=lokr", "method.factor=8", *options, "schedule.steps=1", "log.eval_points=1")
    quick("run", *config, "schedule.warmup_steps=0")
    for option in ("method.alpha=2.0", "method.decompose_both=True"):
        assert (f"{option} has no effect here" in caplog.text) == idle


def test_evaluations_leave_its_modules_without_pefts_dropout(composed):
    """Which draws and reads a number even if it is 0."""
    model = attached(composed(*KINDS["lokr"]))
    layers = [x for x in model.unet.modules() if isinstance(x, BaseTunerLayer)]
    with model.evaluating():
        assert not any(module.training for module in model.unet.modules())
    assert model.unet.training
    assert layers
    assert not any(layer.training for layer in layers)
    assert all(layer.get_base_layer().training for layer in layers)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("method=lokr method.dora=true", "method.dora"),
        ("method=loha method.factor=4", "method.factor"),
        ("method=lokr method.dropout=0.1", "method.dropout"),
        ("method=lokr method.factor=0", "method.factor=0 is out of range"),
        ("method=lokr method.export=[diffusers]", "method.export=['diffusers']"),
    ],
)
def test_options_that_it_does_not_have_are_refused_by_name(command, options, says):
    status, _, err = command(*QUICK, *options.split())
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1
