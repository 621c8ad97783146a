"""Frozen weights in 8 or 4 bits: what a layer computes, what it keeps, and a run with them."""

import copy
import shutil

import pytest
import torch
from helpers import QUICK, assert_same_weights, deterministic, rows, weights
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.checks import remarks
from trainer.errors import UserError
from trainer.models import quantization
from trainer.models.model import Model
from trainer.models.quantization import quantize
from trainer.planner.rehearsal import rehearse
from trainer.run import run
from trainer.training import method

CPU = torch.device("cpu")
KINDS = ("int8", "nf4")
LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), (3, 5, 64)),
    "without bias": (lambda: nn.Linear(64, 48, bias=False), (2, 64)),
    "convolution": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), (2, 16, 9, 7)),
    "in groups": (lambda: nn.Conv2d(32, 64, 3, padding=2, dilation=2, groups=4), (2, 32, 8, 8)),
}


def rehearsed(config):
    return rehearse(config, Model(config.model, CPU, with_weights=False), "cpu")


def layer_of(name, kind, dtype=torch.float32):
    """A layer, the same quantized, and the same with the decoded weights; an input of it."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to(dtype).requires_grad_(False)
    quantized, decoded = copy.deepcopy(layer), copy.deepcopy(layer)
    quantize(quantized, kind)
    decoded.weight.copy_(quantized.weight)
    return layer, quantized, decoded, torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_layer_computes_what_its_decoded_weights_do(name, kind, dtype):
    _, quantized, decoded, x = layer_of(name, kind, dtype)
    outputs, gradients = [], []
    for layer in (quantized, decoded):
        outputs.append(layer(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), x)[0])
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_a_gradient_has_the_layout_of_its_output():
    layout = torch.channels_last
    _, quantized, _, x = layer_of("convolution", "int8")
    y = quantized(x.to(memory_format=layout))
    grad = quantized.gradient(x.shape, torch.ones_like(y, memory_format=layout))
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("kind", "widest"), [("int8", 0.5 / 127), ("nf4", 0.1520)])
def test_a_weight_moves_by_half_the_gap_between_codes_at_most(kind, widest):
    layer, quantized, _, _ = layer_of("convolution", kind)
    blocks = layer.weight.view(-1, 64)
    moved = (blocks - quantized.weight.view(-1, 64)).abs() / blocks.abs().amax(dim=1, keepdim=True)
    assert moved.max() <= widest * (1 + 1e-5)
    assert moved.max() > widest / 2  # the bound is not loose


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA: 8 positive and 7 negative ones and 0, evenly spaced in probability, the last at 1."""
    offset = 0.9677083

    def half(count):
        return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1])

    levels = torch.cat([-half(7), torch.zeros(1, dtype=torch.float64), half(8)]).sort().values
    torch.testing.assert_close(torch.tensor(quantization._NF4).double(), levels / levels.max())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_what_is_decoded_has_the_same_codes(kind):
    layer, quantized, decoded, _ = layer_of("linear", kind)
    again = copy.deepcopy(decoded)
    quantize(again, kind)
    assert torch.equal(again.codes, quantized.codes)
    with torch.no_grad():
        layer.weight.zero_()
    quantize(layer, kind)
    assert torch.equal(layer.weight, torch.zeros(48, 64))


@pytest.mark.parametrize("name", LAYERS)
def test_no_decoded_weight_is_kept_for_the_backward_pass(name):
    _, quantized, decoded, x = layer_of(name, "int8")
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        decoded(x)
        assert decoded.weight.numel() in kept
        kept.clear()
        quantized(x)
    assert not kept


def test_adapters_of_quantized_convolutions_are_plain_and_a_copy_is_quantized(composed):
    config = composed("method=lora", "method.targets=[conv1,to_q]", "model.quantization=int8")
    model = Model(config.model, CPU)
    model.load_unet()
    method.attach(config.method, model, 0)
    layers = [layer for layer in model.unet.modules() if isinstance(layer, LoraLayer)]
    assert {type(layer.get_base_layer()) for layer in layers} == {
        quantization.QuantizedConv2d,
        quantization.QuantizedLinear,
    }
    for layer in layers:
        assert type(layer.lora_A["default"]) in (nn.Conv2d, nn.Linear)
        assert layer.lora_A["default"].weight.requires_grad
        base = layer.get_base_layer()
        twin = copy.deepcopy(base)
        assert type(twin) is type(base)
        assert torch.equal(twin.weight, base.weight)


def test_layers_of_an_odd_size_and_other_modules_stay_as_they_are():
    ring = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    same = nn.Conv2d(16, 16, 3, padding="same")
    for module in (nn.Linear(5, 3), nn.GroupNorm(4, 64), nn.Embedding(64, 64), ring, same):
        before = type(module)
        quantize(module, "int8")
        assert type(module) is before
        assert isinstance(module.weight, nn.Parameter)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_the_planner_counts_the_bits_and_all_weights(composed, kind, bits):
    options = ("method=lora", "model.dtype=bfloat16")
    plain, small = (
        rehearsed(composed(*options, f"model.quantization={choice}")) for choice in ("none", kind)
    )
    assert small.num_parameters == plain.num_parameters
    assert small.num_trained == plain.num_trained
    saved = plain.training.weights - small.training.weights
    frozen = 2 * (plain.num_parameters - plain.num_trained)
    # Norms, biases and NF4's tables (1 kB a layer) weigh more in a small model.
    assert saved == pytest.approx((16 - bits) / 16 * frozen, rel=0.06)


ADAPTERS = ("method.targets=[to_q,conv1]", "method.train=[unet,text_encoder]", "ema=bf16")
METHODS = {
    "dora": ("method=lora", "method.dora=true"),
    "lokr": ("method=lokr", "method.rank=4"),
    "loha": ("method=loha", "method.rank=4"),
}


@pytest.mark.parametrize("chosen", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_its_adapters_only_and_resumes_bitwise(
    composed, quick, tmp_path, kind, chosen
):
    options = (
        *chosen,
        *ADAPTERS,
        f"model.quantization={kind}",
        "runtime.gradient_checkpointing=true",
    )
    saving = ("runtime.save_every=2", "runtime.keep_checkpoints=9")
    whole, parts = quick("whole", *options), quick("parts", *options, *saving)
    shutil.rmtree(parts / "checkpoints/step-000004")
    run(composed(*QUICK, *options, *saving, f"resume={parts}"), parts)
    assert_same_weights(weights(whole, 4), weights(parts, 4))
    assert deterministic(whole) == deterministic(parts)
    trained = weights(whole, 4)
    assert not any("base_layer" in name for name in trained)
    assert all(tensor.any() for tensor in trained.values())  # some begin with zeros
    assert rows(whole)[-1]["eval/loss"] < rows(whole)[0]["eval/loss"]


def test_a_lora_of_a_quantized_model_continues_on_the_full_one(composed, quick, tmp_path):
    """Files are read back and compared with the adapters; their names are the plain model's."""
    trained = quick("trained", "method=lora", "model.quantization=nf4")
    start = next((trained / "lora").glob("*-lora.safetensors"))
    config = composed("method=lora", f"method.start_from={start}")
    model = Model(config.model, CPU)
    model.load_unet()
    method.attach(config.method, model, 0, config.method.start_from)
    tensors = weights(trained, 4)
    assert tensors
    for name, parameter in method.trained_parameters(model).items():
        torch.testing.assert_close(parameter.detach(), tensors[name])


def test_what_changes_the_unet_itself_is_refused(composed):
    with pytest.raises(UserError, match=r"quantization=int8 is of frozen weights.*method=lora"):
        composed("model.quantization=int8")


def test_a_compiled_block_that_keeps_its_decoded_weights_is_remarked(composed):
    options = ("method=lora", "model.quantization=nf4", "runtime.compile=regional")
    (said,) = remarks.of_config(composed(*options))
    assert "add runtime.gradient_checkpointing=true" in said
    assert not remarks.of_config(composed(*options, "runtime.gradient_checkpointing=true"))
