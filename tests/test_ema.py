"""The average of the weights: its definition, its accuracy in bf16, saving and resuming."""

import json
import shutil

import pytest
import torch
from helpers import QUICK, assert_same_weights, deterministic, rows
from safetensors.torch import load_file
from torch.nn import Parameter

from trainer.config import EmaConfig
from trainer.run import run
from trainer.training.ema import Ema, decay_at


def config(**options):
    return EmaConfig(
        **{
            **{"decay": 0.9, "warmup": False, "every": 1, "dtype": "float32", "device": "same"},
            **{"sample": "average", "export": "average"},
            **options,
        }
    )


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 30), "b": (7,), "c": (8, 4, 3, 3)}
    return {
        name: Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def move(parameters, step):
    with torch.no_grad():
        for name, p in parameters.items():
            p.add_(weights(100 + step)[name] * 0.1)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_recursion_of_its_definition(warmup, every):
    chosen, parameters = config(warmup=warmup, every=every), weights()
    ema = Ema(chosen, parameters, seed=0)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(1, 8):
        move(parameters, step)
        ema.update(step)
        if step % every == 0:
            decay = (min(0.9, (1 + step) / (10 + step)) if warmup else 0.9) ** every
            for name, p in parameters.items():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, average in ema.state().items():
        assert torch.allclose(average, expected[name], rtol=1e-5, atol=1e-6)


def test_averages_of_another_dtype_take_the_place_of_the_weights_without_a_second_model():
    parameters = weights(dtype=torch.bfloat16)
    ema = Ema(config(), parameters, seed=0)
    own = {name: (p.data_ptr(), p.detach().clone()) for name, p in parameters.items()}
    move(parameters, 1)
    moved = {name: p.detach().clone() for name, p in parameters.items()}
    ema.update(1)
    with ema.in_place():
        for name, p in parameters.items():
            assert p.data_ptr() == own[name][0]
            assert torch.equal(p.detach(), ema.averages[name].detach().bfloat16())
    for name, p in parameters.items():
        assert p.data_ptr() == own[name][0]
        assert torch.equal(p.detach(), moved[name])


def test_the_decay_of_a_warm_up_grows_to_what_was_asked_for():
    decays = [decay_at(config(warmup=True, decay=0.99), step) for step in (1, 10, 100, 10_000)]
    assert decays == pytest.approx([2 / 11, 11 / 20, 101 / 110, 0.99])


def test_a_bf16_average_follows_slow_weights_where_rounding_to_the_nearest_stands_still():
    """Decay 0.999 moves 1.0 towards 1.02 by 2e-5 per step, 1/390 of bf16's spacing there."""
    parameters = {"a": Parameter(torch.ones(64, 64))}
    ema = Ema(config(decay=0.999, dtype="bfloat16"), parameters, seed=0)
    with torch.no_grad():
        parameters["a"].fill_(1.02)
    nearest = torch.ones(64, 64).bfloat16()
    for step in range(1, 501):
        ema.update(step)
        nearest = (0.999 * nearest.float() + 0.001 * 1.02).bfloat16()
    expected = 1.02 - 0.02 * 0.999**500
    assert ema.state()["a"].dtype == torch.bfloat16
    assert ema.state()["a"].float().mean().item() == pytest.approx(expected, abs=5e-4)
    assert nearest.float().mean().item() == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_average_is_bitwise_the_uninterrupted_one(dtype):
    chosen = config(dtype=dtype, every=2)
    whole, parts, others = weights(), weights(), weights()
    another = Ema(chosen, others, seed=6)
    first = Ema(chosen, whole, seed=5)
    second = Ema(chosen, parts, seed=5)
    for step in range(1, 9):
        if step == 5:  # a new process
            saved = {name: average.clone() for name, average in second.state().items()}
            second = Ema(chosen, parts, seed=5, saved=saved, step=4)
        for parameters, ema in ((whole, first), (parts, second), (others, another)):
            move(parameters, step)
            ema.update(step)
    assert_same_weights(first.state(), second.state())
    rounded_alike = all(torch.equal(x, another.state()[name]) for name, x in first.state().items())
    assert rounded_alike == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", ["same", "cpu"])
def test_the_model_has_the_averages_inside_and_its_own_weights_after(dtype, device):
    parameters = weights()
    ema = Ema(config(dtype=dtype, device=device), parameters, seed=0)
    move(parameters, 1)
    ema.update(1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    averages = {name: average.clone() for name, average in ema.state().items()}
    with ema.in_place():
        for name, p in parameters.items():
            assert torch.equal(p.detach(), averages[name].float())
    assert_same_weights({name: p.detach() for name, p in parameters.items()}, before)
    assert_same_weights(ema.state(), averages)


def test_memory_that_runs_out_among_the_averages_leaves_the_models_own_weights(monkeypatch):
    parameters = weights()
    ema = Ema(config(), parameters, seed=0)
    move(parameters, 1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    put, calls = Ema._put, []

    def failing(self, name):
        calls.append(name)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return put(self, name)

    monkeypatch.setattr(Ema, "_put", failing)
    with pytest.raises(torch.OutOfMemoryError), ema.in_place():
        pass
    assert_same_weights({name: p.detach() for name, p in parameters.items()}, before)


@pytest.mark.slow
def test_a_run_with_everything_that_lasts_resumes_bitwise(quick, composed):
    """An average in bf16, a lagged clip, accumulation, rules, and the fused backward."""
    options = [
        *("ema=bf16", "method.ema.every=2", "model.dtype=bfloat16", "data.batch_size=2"),
        *("method.clip=lagged", "method.max_grad_norm=0.1", "runtime.accumulation=2"),
        *("runtime.fused_backward=true", "log.eval_points=4"),
        "method.rules=[{pattern: attn2, lr_scale: 0.5}, {pattern: conv_in, trainable: false}]",
    ]
    saving = [*options, "runtime.save_every=3", "runtime.keep_checkpoints=9"]
    whole, parts = quick("whole", *options), quick("parts", *saving)
    shutil.rmtree(parts / "checkpoints/step-000004")
    run(composed(*QUICK, *saving, f"resume={parts}"), parts)
    for name in ("weights", "average"):
        a, b = (
            load_file(folder / f"checkpoints/step-000004/{name}.safetensors")
            for folder in (whole, parts)
        )
        assert_same_weights(a, b)
    assert "unet.conv_in.weight" not in a
    assert a.keys() == load_file(whole / "checkpoints/step-000004/weights.safetensors").keys()
    assert deterministic(whole) == deterministic(parts)
    last = rows(whole)[-1]
    assert last["eval/ema_loss"] != last["eval/loss"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["ema_loss_after"] == summary["eval_loss_result"] == last["eval/ema_loss"]


def test_a_lora_exports_its_average_or_its_last_weights(quick):
    options = ["method=lora", "ema=fp32", "optim=adamw", "schedule.steps=2", "log.eval_points=2"]
    folder = quick("run", *options, "method.export=[diffusers]")
    last = quick("last", *options, "method.export=[diffusers]", "method.ema.export=last")
    found = []
    for path, name in ((folder, "average"), (last, "weights")):
        (exported,) = (path / "lora").rglob("*.safetensors")
        kept = load_file(path / f"checkpoints/step-000002/{name}.safetensors")
        found.append(
            (
                sorted(round(x.double().norm().item(), 6) for x in load_file(exported).values()),
                sorted(round(x.double().norm().item(), 6) for x in kept.values()),
            )
        )
    for exported, kept in found:
        assert exported == kept
    assert found[0][0] != found[1][0]
