"""Whole runs of a few steps on the shipped model: what they write, and that they are repeatable."""

import importlib.metadata
import json
import shutil
import time

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers import QUICK, assert_same_weights, deterministic, rows, weights
from models import TINY
from PIL import Image

from trainer.objective import batches, losses
from trainer.reporting import metrics
from trainer.sampling import pictures
from trainer.storage import record
from trainer.training import optimizers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_writes_a_pipeline_that_diffusers_loads(quick, dtype):
    folder = quick("full", f"model.dtype={dtype}", "log.sample_count=2", "log.sample_steps=2")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "model")
    trained = weights(folder, 4)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor.float(), trained[f"unet.{name}"].float()), name
    grid = Image.open(folder / "samples/step-000004.png")
    assert grid.size == (64 + 2 * 96, 14 + 3 * 96 + 6)  # titles, two columns; original, before, now
    kept = [pictures.captions(folder / "samples" / name) for name in ("original", "step-000004")]
    assert len(kept[0]) == 2
    assert kept[0] == kept[1]
    for name in ("config.yaml", "environment.json", "summary.json", "train.log"):
        assert (folder / name).stat().st_size > 0


def test_prompts_are_drawn_in_place_of_captions(quick):
    prompts = "log.prompts=[a red frog, two hearts]"
    folder = quick("run", prompts, "log.sample_count=9", "log.sample_steps=2", "optim.lr=0.1")
    grid = Image.open(folder / "samples/step-000004.png")
    assert grid.size == (64 + 2 * 96, 14 + 2 * 96 + 6)  # two prompts; before and now, no original
    first, last = (Image.open(folder / f"samples/step-00000{n}/01.png") for n in (0, 4))
    assert first.size == (64, 64)
    assert first.tobytes() != last.tobytes()


def test_a_negative_prompt_changes_what_guidance_draws(quick):
    guided = ("log.prompts=[two hearts]", "log.guidance_scale=3", "log.sample_steps=2")
    plain = quick("plain", *guided)
    other = quick("other", *guided, "log.negative_prompt=a red frog")
    first, second = (Image.open(f / "samples/step-000000/00.png") for f in (plain, other))
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("optimizer", "package"),
    [
        ({"name": "external", "class_path": "yaml.Loader"}, "PyYAML"),  # as pip calls it
        ({"name": "peer/x", "class_path": "yaml.Loader", "package": "pillow-simd"}, "pillow-simd"),
        ({"name": "external", "class_path": "mine.Optimizer"}, None),  # a file beside the run
        ({"name": "lion"}, None),
    ],
)
def test_the_environment_has_the_version_of_the_optimizers_package(tmp_path, optimizer, package):
    record.write(tmp_path, {"optim": optimizer}, torch.device("cpu"))
    packages = json.loads((tmp_path / "environment.json").read_text())["packages"]
    more = [name for name in packages if name not in record._PACKAGES]
    assert more == ([package] if package else [])
    if package == "PyYAML":
        assert packages[package] == importlib.metadata.version("PyYAML")


def test_metrics_have_the_promised_keys_and_start_with_an_eval(finished):
    written = rows(finished("metrics", "optim=adamw"))
    quarters = {f"eval/loss_t{q}" for q in ("000_250", "250_500", "500_750", "750_1000")}
    assert written[0].keys() == {"step", "eval/loss", *quarters}
    assert written[0]["step"] == 0
    expected = {"loss", "lr", "grad_norm", "grad_norm_max", "update_ratio", "epoch"}
    expected |= {"skipped_steps", "loss_spikes", "rollbacks"}
    for row in written[1:5]:
        assert {key.removeprefix("train/") for key in row if key.startswith("train/")} == expected
        assert row["memory/optimizer_state_bytes"] == 8 * 2_743_620 + 330 * 16
        assert row["perf/images_per_second"] > 0
        assert 0 < row["train/update_ratio"] < 1
    assert written[-1].keys() == written[0].keys()


OTHERS = {  # prediction -> options, and what the scheduler is then
    "epsilon": (
        ["noise.prediction=epsilon", "noise.zero_terminal_snr=false"],
        {"rescale_betas_zero_snr": False, "timestep_spacing": "trailing"},  # the model's own
    ),
    "flow_prediction": (["noise=flow_matching"], {"use_flow_sigmas": True, "flow_shift": 3.0}),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("prediction", OTHERS)
def test_another_prediction_is_drawn_with_and_exported(composed, tmp_path, method, prediction):
    """The tiny model predicts v with zero terminal SNR; after training for something else its
    scheduler says so, in the run's own samples and in the export."""
    from trainer.phases.assembly import assemble
    from trainer.run import finish, train

    options, expected = OTHERS[prediction]
    more = ["loss.weighting=min_snr", "noise.offset=0.05", "noise.timesteps=logit_normal"]
    more += ["loss=huber", "schedule=wsd", f"method={method}"]
    state = assemble(composed(*QUICK, *options, *more), tmp_path, None)
    config = state.config
    assert state.noise_schedule.prediction == prediction
    assert state.model.sampling_schedule().config.prediction_type == prediction
    writer = metrics.Metrics(tmp_path, config, 0)
    train(state, writer)
    finish(state, writer)
    if method == "full":
        scheduler = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model").scheduler
    else:
        cls = type(state.model.sampling_schedule())
        scheduler = cls.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    found = dict(scheduler.config)
    assert found["prediction_type"] == prediction
    assert {key: found[key] for key in expected} == expected


def test_a_flow_is_drawn_before_the_first_step_and_its_losses_are_compared(quick, tmp_path):
    """By its own scheduler, which the pipeline cannot use as it is."""
    model = shutil.copytree(TINY, tmp_path / "flow")
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(own))
    folder = quick("run", f"model.path={model}", "log.sample_count=1", "log.sample_steps=2")
    assert (folder / "samples/step-000000.png").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prediction_before"] == summary["prediction"] == "flow_prediction"


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 16.0)])
def test_lora_export_in_diffusers_gives_the_picture_of_the_trained_model(
    composed, tmp_path, rank, alpha
):
    """Includes alpha != rank: a reader that lost alpha would give another picture."""
    from trainer.phases.assembly import assemble
    from trainer.phases.evaluation import eval_batches
    from trainer.run import finish, train

    config = composed(
        *QUICK, "method=lora", f"method.rank={rank}", f"method.alpha={alpha}", "optim.lr=0.05"
    )
    state = assemble(config, tmp_path, None)
    writer = metrics.Metrics(tmp_path, config, 0)
    train(state, writer)
    finish(state, writer)

    reader = StableDiffusionXLPipeline.from_pretrained(config.model.path).to(torch.float32)
    batch = next(eval_batches(state, state.data.dataset.own))
    without = batches.predict(reader.unet, batch)
    reader.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    state.model.unet.eval()
    with torch.no_grad():
        here, there = (
            batches.predict(state.model.unet, batch),
            batches.predict(reader.unet, batch),
        )
    assert torch.allclose(here, there, atol=1e-5)
    assert not torch.allclose(there, without, atol=1e-2)


@pytest.mark.parametrize(
    "optimizer",
    [
        "optim=sgd",
        "optim=lion",
        "optim=adafactor",
        "optim=adopt_factored",
        "optim=lion_prodigy",
        "optim=sophia",
        "optim=external optim.class_path=torch.optim.RAdam +optim.options.betas=[0.9,0.99]",
    ],
)
def test_every_optimizer_trains_the_unet(quick, optimizer):
    folder = quick("run", *optimizer.split(), "schedule.steps=2", "log.eval_points=2")
    assert all(row.get("train/skipped_steps", 0) == 0 for row in rows(folder))
    assert rows(folder)[0]["eval/loss"] != rows(folder)[-1]["eval/loss"]


def test_two_runs_with_one_seed_are_bitwise_equal_and_another_seed_is_not(quick, finished):
    first, again, other = finished("a"), quick("b", "data.cache=null"), quick("c", "seed=1")
    assert_same_weights(weights(first, 4), weights(again, 4))
    assert deterministic(first) == deterministic(again)
    assert deterministic(first)[1]["train/loss"] != deterministic(other)[1]["train/loss"]
    # eval points do not depend on the seed, so that seeds can be compared
    assert rows(first)[0] == rows(other)[0]


def test_optimizers_see_the_same_data_noise_and_timesteps(finished):
    """The first loss precedes any optimizer's step; later ones differ because of the optimizer."""
    runs = [rows(finished(name, f"optim={name}")) for name in ("adamw", "lion", "adafactor8bit")]
    assert len({written[1]["train/loss"] for written in runs}) == 1
    assert len({written[1]["train/grad_norm"] for written in runs}) == 1
    assert len({written[4]["train/loss"] for written in runs}) == 3


def test_the_rate_that_prodigy_finds_is_reported(quick):
    folder = quick("run", "optim=prodigy", "schedule=constant", "schedule.steps=8")
    found = [row["optim/d"] for row in rows(folder)[1:9]]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0] == 2e-6


def test_a_clip_threshold_called_d_is_no_rate_that_was_found():
    adafactor = torch.optim.Adafactor([torch.zeros(2, requires_grad=True)])
    assert "d" in adafactor.param_groups[0]
    assert optimizers.found_rate(adafactor) == {}


def test_progress_lines_carry_loss_speed_and_eta(quick, capfd):
    quick("run")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    for part in ("loss", "images/s", "ETA"):
        assert part in lines[0]


def test_the_clock_of_a_run_counts_training_only(quick, monkeypatch):
    """Each evaluation takes 100 s on this clock, none of which is counted."""
    now = [0.0]
    original = losses.evaluate

    def evaluate(*arguments):
        now[0] += 100.0
        return original(*arguments)

    monkeypatch.setattr(losses, "evaluate", evaluate)
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    folder = quick("run", "log.eval_every=1")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seconds"] < 100
