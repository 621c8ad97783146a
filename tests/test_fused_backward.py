"""The trainer's fused backward: the same run with one bucket of gradients alive, and the options
that it excludes."""

import gc
import json
import weakref

import pytest
from helpers import QUICK, assert_same_weights, deterministic, rows, weights

from trainer.objective import losses
from trainer.phases import stepping
from trainer.phases.assembly import assemble
from trainer.run import run
from trainer.training import optimizers
from trainer.training.gradients import Pass

UNCLIPPED = "method.clip=none"
FUSED = "runtime.fused_backward=true"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["optim=adafactor8bit"],
        ["optim=adamw", "model.dtype=bfloat16"],
        ["optim=adopt_factored", "method=lora"],
        ["optim=lomo"],
        ["optim=adalomo"],
        ["optim=sophia", "optim.hessian_every=2"],
    ],
    ids=" ".join,
)
def test_a_run_with_the_fused_backward_is_the_run_without_it(quick, options):
    """The same weights, and every loss, gradient norm and update ratio on the way."""
    off = quick("off", *options, UNCLIPPED, "runtime.fused_backward=false")
    on = quick("on", *options, UNCLIPPED, FUSED)
    assert_same_weights(weights(off, 4), weights(on, 4))
    assert deterministic(off) == deterministic(on)


@pytest.mark.slow
@pytest.mark.parametrize("resumed_with", ["true", "false"])
def test_a_run_with_the_fused_backward_resumes_bitwise(finished, composed, tmp_path, resumed_with):
    whole = finished("whole", UNCLIPPED, FUSED, "runtime.save_every=2")
    checkpoint = f"resume={whole}/checkpoints/step-000002"
    options = [UNCLIPPED, f"runtime.fused_backward={resumed_with}", checkpoint]
    run(composed(*QUICK, *options), tmp_path / "resumed")
    assert_same_weights(weights(whole, 4), weights(tmp_path / "resumed", 4))


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_lomo_and_adalomo_step_inside_the_backward_pass_without_further_options(
    composed, quick, name
):
    config = composed(f"optim={name}")
    assert config.runtime.fused_backward
    assert config.method.clip == "none"
    folder = quick("run", f"optim={name}", "schedule.steps=2", "log.eval_points=2")
    assert rows(folder)[-1]["eval/loss"] != rows(folder)[0]["eval/loss"]


def peak_gradient_bytes(config, folder):
    """-> (peak bytes of gradients alive during a backward pass, bytes of all gradients)."""
    state = assemble(config, folder, None)
    parameters = list(state.model.unet.parameters())
    seen = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
        )
    state.backward.run([Pass(lambda: sum(p.square().sum() for p in parameters))])
    return max(seen), sum(p.nbytes for p in parameters)


def test_a_sixteenth_of_the_gradients_and_one_tensors_is_all_that_is_alive(composed, tmp_path):
    gathered, total = peak_gradient_bytes(composed(*QUICK, UNCLIPPED), tmp_path)
    consumed, _ = peak_gradient_bytes(composed(*QUICK, UNCLIPPED, FUSED), tmp_path)
    assert gathered == total
    assert consumed <= total / 8


def test_a_loss_that_is_not_finite_changes_nothing(quick, monkeypatch):
    calls, original = [], losses.loss

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(losses, "loss", poisoned)
    keep = ["runtime.save_every=1", "runtime.keep_checkpoints=9"]
    folder = quick("run", UNCLIPPED, FUSED, *keep, "schedule.steps=2")  # the last is always saved
    assert_same_weights(weights(folder, 1), weights(folder, 2))
    written = [row for row in rows(folder) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in written] == [0, 1]


def test_a_gradient_that_is_not_finite_leaves_its_elements_alone_and_is_counted(
    composed, tmp_path, monkeypatch
):
    """The loss is finite: the other elements are stepped, which is logged."""
    config = composed(*QUICK, "optim=lomo", "schedule.steps=1")
    build, models = optimizers.build, []

    def remember(chosen, model, *more):
        weight = model["unet"].conv_in.weight
        models.append((weight, weight.detach().clone()))
        return build(chosen, model, *more)

    def spoiled(*arguments):
        """One element contributes 0 to the loss but has an infinite derivative."""
        first = models[0][0].flatten()[0]
        return original(*arguments) + (first - first.detach()).sqrt()

    original = losses.loss
    monkeypatch.setattr(optimizers, "build", remember)
    monkeypatch.setattr(losses, "loss", spoiled)
    run(config, tmp_path / "run")
    after, before = (x.flatten() for x in models[0])
    assert after[0] == before[0]
    assert (after[1:] != before[1:]).float().mean() > 0.9
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_steps"] == 1
    assert "was applied only partly" in (tmp_path / "run/train.log").read_text()


def test_the_hooks_do_not_keep_a_finished_runs_model_alive(composed, tmp_path):
    config = composed(*QUICK, UNCLIPPED, FUSED)
    state = assemble(config, tmp_path, None)
    stepping.take(state)
    gone = [weakref.ref(state.model.unet), *map(weakref.ref, state.model.unet.parameters())]
    del state
    gc.collect()
    assert not [one for one in gone if one() is not None]


REFUSED = [
    ([], ["method.clip=global ", "method.clip=exact", "lagged", "rms"]),
    ([UNCLIPPED, "optim.max_grad_norm=2"], ["optim.max_grad_norm=2 ", "all gradients"]),
    ([UNCLIPPED, "optim.on_nonfinite=raise"], ["optim.on_nonfinite=raise", "skip"]),
    ([UNCLIPPED, "optim=peer/hf_adafactor"], ["optim=peer/hf_adafactor cannot", "family"]),
    (
        [UNCLIPPED, "optim=external", "optim.class_path=torch.optim.RAdam"],
        ["optim=external cannot", "family"],
    ),
    (["optim=lomo", "method.clip=global"], ["method.clip=global "]),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=lambda x: " ".join(x))
def test_what_needs_all_gradients_first_is_refused_with_the_remedy(composed, arguments, says):
    with pytest.raises(optimizers.UserError) as refused:
        composed(FUSED, *arguments)
    for part in [FUSED, *says, "runtime.fused_backward=false"]:
        assert part in str(refused.value)
