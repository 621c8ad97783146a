"""How the UNet is executed: each option has its effect without changing results; messages when
memory runs out."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from helpers import QUICK, assert_same_weights
from torch import nn

from trainer.checks import remarks
from trainer.config import ASSETS, DTYPES
from trainer.errors import UserError
from trainer.models import execution
from trainer.models.model import Model
from trainer.objective import losses
from trainer.objective.batches import noised
from trainer.objective.noise_schedule import training_schedule
from trainer.objective.trained_scheduler import scheduler_config
from trainer.run import run
from trainer.system import memory
from trainer.training import gradients, method, optimizers

sys.path.insert(0, str(REPOSITORY / "scripts"))
import measure_sdxl

TINY = ASSETS / "tiny_sdxl" / "unet" / "config.json"
COMMON = ("method.clip=none", "optim=adamw", "optim.lr=1e-3")
CPU = torch.device("cpu")


def small(composed, *options, look=lambda unet: None):
    """Train a small UNet as configured for two steps -> (weights, losses)."""
    config = composed(*COMMON, *options)
    unet = measure_sdxl.build_unet(TINY, DTYPES[config.model.dtype], CPU)
    model = SimpleNamespace(trained_parts={"unet": unet}, text_encoder=None)
    method.attach(config.method, model, config.seed)
    optimizer = optimizers.build(config.optim, nn.ModuleDict(model.trained_parts), config.seed)
    execution.prepare(config, model.trained_parts, CPU)
    look(unet)
    names = list(unet.state_dict())
    backward = gradients.make(config, [p for p in unet.parameters() if p.requires_grad], optimizer)
    inputs = measure_sdxl.random_inputs(unet, 2, (8, 8))
    scheduler = measure_sdxl.json.loads(measure_sdxl.SCHEDULER.read_text())
    noise_schedule = training_schedule(scheduler_config(config.noise, scheduler), config.noise)
    seen = []
    for step in range(2):
        batch = noised(inputs, noise_schedule, config.noise, config.seed, step)
        forward = partial(measure_sdxl.loss_of, config, unet, noise_schedule, batch)
        seen.append(backward.run([gradients.Pass(forward)]).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert list(unet.state_dict()) == names
    return {name: p.detach() for name, p in unet.named_parameters()}, seen


CHECKPOINTING = "runtime.gradient_checkpointing=true"
OPTIONS = {  # options: whether results are bitwise those without them
    CHECKPOINTING: True,
    "runtime.channels_last=true": False,
    "runtime.compile=regional": False,
    "model.compute=bfloat16": False,
    f"{CHECKPOINTING} model.dtype=bfloat16 runtime.channels_last=true": False,
}


@pytest.fixture
def compiler(monkeypatch):
    """Run torch.compile without the C++ compiler, which takes a minute."""
    monkeypatch.setattr(execution, "COMPILER", "aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_the_fused_backward_has_the_same_bits_with_every_option(composed, compiler, options):
    off, losses_off = small(composed, *options.split())
    on, losses_on = small(composed, *options.split(), "runtime.fused_backward=true")
    assert_same_weights(off, on)
    assert losses_off == losses_on
    plain, losses_plain = small(composed)
    if OPTIONS[options]:
        assert_same_weights(plain, on)
    assert losses_on == pytest.approx(losses_plain, rel=3e-2 if "bfloat16" in options else 1e-4)


def saved_bytes(composed, *options):
    """The bytes of activations that a forward pass keeps."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def look(unet):
        inputs = measure_sdxl.random_inputs(unet, 2, (8, 8))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _predict(unet, inputs)

    small(composed, *options, look=look)
    return sum(kept.values())


def _predict(unet, inputs):
    conditions = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
    return unet(
        inputs.latents,
        torch.tensor([10, 500]),
        encoder_hidden_states=inputs.prompt,
        added_cond_kwargs=conditions,
    ).sample


def test_gradient_checkpointing_keeps_fewer_activations(composed):
    assert saved_bytes(composed, CHECKPOINTING) < 0.7 * saved_bytes(composed)


def test_a_trained_text_encoder_is_checkpointed_without_a_warning(composed, recwarn):
    config = composed(CHECKPOINTING, "method.train=[unet,text_encoder]")
    model = Model(config.model, CPU)
    model.keep_text_encoders(config.method.train)
    model.load_unet()
    method.attach(config.method, model, config.seed)
    execution.prepare(config, model.trained_parts, CPU)
    layers = model.trained_parts["text_encoder"].modules()
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    assert [str(w.message) for w in recwarn if "checkpointing" in str(w.message)] == []


def test_gradient_checkpointing_is_of_a_frozen_unet_too(composed):
    """When only text encoders are trained, nearly all activations are the UNet's."""
    config = composed(CHECKPOINTING)
    unet = measure_sdxl.build_unet(TINY, DTYPES[config.model.dtype], CPU).requires_grad_(False)
    execution.prepare(config, {"unet": unet}, CPU)
    assert unet.is_gradient_checkpointing


def test_channels_last_is_the_layout_of_convolutions_outputs_and_of_no_weight(composed):
    seen = {}

    def look(unet):
        after_attention = unet.mid_block.resnets[1].conv1
        after_attention.register_forward_hook(lambda *call: seen.update(out=call[2]))
        for p in unet.parameters():
            assert p.is_contiguous()

    small(composed, "runtime.channels_last=true", look=look)
    assert seen["out"].is_contiguous(memory_format=torch.channels_last)
    assert not seen["out"].is_contiguous()


def test_autocast_multiplies_in_bf16_and_gives_fp32_back(composed):
    seen = {}

    def look(unet):
        unet.mid_block.attentions[0].proj_in.register_forward_hook(
            lambda *call: seen.update(
                inner=call[2].dtype, keeps_copies=torch.is_autocast_cache_enabled()
            )
        )
        with torch.no_grad():
            seen["outer"] = _predict(unet, measure_sdxl.random_inputs(unet, 2, (8, 8))).dtype
        assert unet.dtype == torch.float32

    small(composed, "model.compute=bfloat16", look=look)
    assert seen == {"inner": torch.bfloat16, "outer": torch.float32, "keeps_copies": False}


def test_regional_compilation_compiles_the_transformer_blocks_and_nothing_else(composed):
    unet = measure_sdxl.build_unet(TINY, torch.float32, CPU)
    execution.prepare(composed("runtime.compile=regional"), {"unet": unet}, CPU)
    compiled = {type(m).__name__ for m in unet.modules() if m._compiled_call_impl is not None}
    assert compiled == {"BasicTransformerBlock"}


def test_products_in_the_weights_own_dtype_are_no_choice_but_of_adapters(composed):
    chosen = ("model.dtype=bfloat16", "model.compute=bfloat16")
    assert "model.compute=bfloat16 has no effect" in remarks.of_config(composed(*chosen))[0]
    assert not remarks.of_config(composed(*chosen, "method=lora"))


ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_running_out_of_memory_is_one_line_with_what_helps(composed, kind):
    config = composed("optim=adamw", "ema=fp32")
    with pytest.raises(UserError) as raised, memory.explained(config, 3):
        raise ERRORS[kind]
    text = str(raised.value)
    assert text.startswith("out of memory in step 3, which was not saved. Try ")
    for remedy in (
        *("runtime.fused_backward=true", "model.dtype=bfloat16", "gradient_checkpointing=true"),
        *(
            "data.batch_size=8 runtime.accumulation=2",
            "method.ema.device=cpu",
            "optim=adafactor8bit",
        ),
        "method=lora",
    ):
        assert remedy in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "is_lack"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (Exception("CUDA_ERROR_OUT_OF_MEMORY: no memory for a module"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("no space: can't allocate memory"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_text_where_it_has_no_type(error, is_lack):
    assert memory.ran_out(error) is is_lack


def test_where_no_option_saves_memory_the_line_says_so(composed):
    options = ("optim=lomo", "method=lora", "method.clip=none", "model.dtype=bfloat16")
    more = (
        *("runtime.gradient_checkpointing=true", "data.batch_size=1"),
        "model.quantization=nf4",
    )
    config = composed(*options, *more)
    says = r"was not saved\. No option saves more; it takes a device with more memory \(CUDA"
    with pytest.raises(UserError, match=says), memory.explained(config, 3):
        raise ERRORS["cuda"]


def test_other_errors_pass(composed):
    with pytest.raises(RuntimeError, match="shapes differ"), memory.explained(composed(), 1):
        raise RuntimeError("shapes differ")


def test_a_step_without_memory_ends_the_run_and_saves_nothing_half_done(
    composed, tmp_path, monkeypatch
):
    calls, original = [], losses.loss

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(losses, "loss", full)
    options = ["runtime.save_every=1", "runtime.keep_checkpoints=9", "log.eval_points=2"]
    with pytest.raises(UserError, match="out of memory in step 3"):
        run(composed(*QUICK, *options), tmp_path / "run")
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["step-000001", "step-000002"]
