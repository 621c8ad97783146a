"""Resizing a LoRA: every adapter becomes the closest one of a smaller rank."""

import pytest
import torch
from helpers import run_export
from models import TINY
from safetensors import safe_open

from trainer.export import loras
from trainer.formats import lora, origin
from trainer.formats.adapter import Lora

CONV = "down_blocks.0.resnets.0.conv1"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def adapters_of(rank, is_dora, seed=0):
    """Adapters of a linear layer and a convolution of the tiny model, the latter of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    models = loras.empty(origin.at(str(TINY)))
    held = {}
    for path, own in ((LINEAR, rank), (CONV, 2)):
        shape = models["unet"].get_submodule(path).weight.shape
        held[path] = Lora(
            down=torch.randn(own, *shape[1:], generator=generator),
            up=torch.randn(shape[0], own, *[1] * (len(shape) - 2), generator=generator),
            alpha=5.0,
            magnitude=torch.rand(shape[0], generator=generator) if is_dora else None,
        )
    return models, {"unet": held}


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_resized_lora_is_the_closest_of_its_rank_and_keeps_its_format(
    form, is_dora, tmp_path, capsys, caplog
):
    """Adapters of no larger rank, and DoRA's magnitudes, stay as they are, bit for bit."""
    caplog.set_level("INFO")
    models, held = adapters_of(8, is_dora)
    told = {"ss_network_dim": "8", "ss_network_alpha": "5", "ss_steps": "7"}
    path = tmp_path / "a.safetensors"
    lora.save_lora(path, form, models, "sdxl", None, told, adapters=held)
    target = tmp_path / "b.safetensors"
    status, _, error = run_export(capsys, path, target, "--rank=3", "--base", TINY)
    assert (status, error) == (0, ""), error
    found, before = lora.read(target, models)["unet"], held["unet"]
    for name in ("down", "up"):
        assert torch.equal(getattr(found[CONV], name), getattr(before[CONV], name))
    assert found[CONV].alpha == 5
    assert found[LINEAR].rank == found[LINEAR].alpha == 3
    delta = before[LINEAR].delta()
    s = torch.linalg.svdvals(delta)
    lost, wanted = (found[LINEAR].delta() - delta).square().sum(), s[3:].square().sum()
    torch.testing.assert_close(lost, wanted, rtol=1e-4, atol=0)
    for name in before:
        one, two = found[name].magnitude, before[name].magnitude
        assert torch.equal(one, two) if is_dora else one is two is None
    total = delta.square().sum() + before[CONV].delta().square().sum()
    share = 100 * float(1 - wanted / total)
    said = f"with 1 of 2 adapters resized to rank 3, it keeps {share:.1f}% of the LoRA's change"
    assert said in caplog.messages[-1]
    assert ("DoRA's magnitudes are unchanged" in caplog.text) == is_dora
    with safe_open(target, "pt") as file:
        described = file.metadata()
        assert ("lora_adapter_metadata" in described) == (form == "diffusers")
    assert described["ss_network_dim"] in ("2", "3")
    assert described["ss_steps"] == "7"


def test_a_resized_lora_has_its_dtype_and_may_change_its_format(tmp_path, capsys):
    models, held = adapters_of(8, False)
    path = tmp_path / "a.safetensors"
    lora.save_lora(path, "kohya", models, "sdxl", torch.float16, adapters=held)
    more = ("--rank=3", "--base", TINY, "--format=diffusers")
    assert run_export(capsys, path, tmp_path / "b.safetensors", *more)[0] == 0
    found = lora.read(tmp_path / "b.safetensors", models)["unet"]
    assert {adapter.up.dtype for adapter in found.values()} == {torch.float16}
