"""Remarks on configurations that work but are hardly what was meant."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from models import TINY
from PIL import Image

from trainer.checks import remarks
from trainer.models.model import Model
from trainer.phases import summary
from trainer.training.schedule import settled

QUIET = [
    [],
    ["method=lora"],
    ["loss=huber"],
    ["log=wandb"],
    ["loss.weighting=min_snr", "loss.gamma=3"],
    ["noise.timesteps=logit_normal", "noise.logit_mean=0.5"],
    ["data=folder", "data.path=/", "data.upscale=true", "data.max_aspect=2"],
    ["data.tag_dropout=0.1", "data.keep_tokens=2", "data.caption_variants=3"],
    ["data.keep_separator='|||'", "data.tag_separator=/"],
    ["method.keep_exports=2", "method.export_every=1epoch"],
    ["data.resolutions=[32,64]", "data.short_batches=repeat"],
    ["data=folder", "data.path=/", "data.resolutions=[512,1024]"],
    ["ema=bf16", "log.sample_count=0"],
    ["ema=bf16", "method.ema.sample=last"],
    ["ema=bf16", "method.ema.decay=1", "method.ema.every=4", "schedule.steps=4"],
    ["optim.lr=0", "method.rules=[{pattern: attn2, lr: 0.1}]"],
    ["method=lora", "method.train=[unet,text_encoder]", "method.text_targets=[q_proj]"],
    ["method=lora", "method.tag_frequency=true", "data.tag_separator=/"],
    ["method=lora", "method.export=[diffusers]", "method.metadata.title=Cats"],
    ["method.export=[single_file]", "method.metadata.title=Cats"],
]
IDLE = {
    "loss.gamma=3": "loss.weighting=min_snr",
    "loss=huber loss.gamma=3": "loss.weighting=min_snr",
    "loss.unmasked_weight=0.5": "data.mask",
    "noise.logit_std=2": "noise.timesteps=logit_normal",
    "data.caption_dropout=1 data.tag_dropout=0.5": "data.caption_dropout below 1",
    "data.keep_tokens=2": "data.shuffle_tags",
    "data.caption_variants=3": "data.shuffle_tags",
    "data.tag_separator=|": "data.shuffle_tags",
    "method.keep_exports=2": "method.export_every",
    "method.export_every=0epochs method.keep_exports=2": "method.export_every",
    "runtime.save_every=0 runtime.keep_checkpoints=5": "runtime.save_every",
    "runtime.max_rollbacks=2": "runtime.on_divergence=rollback",
    "runtime.save_every=0 runtime.on_divergence=rollback": "checkpoints to go back to",
    "data.short_batches=repeat": "several buckets (data.buckets=true",
    "data.buckets=true data.bucket_step=32 data.batch_size=1 data.short_batches=repeat": "above 1",
    "method=lora method.train=[text_encoder] method.targets=[to_q]": "unet in method.train",
    "data.upscale=true": "data.buckets=true",
    "data.bucket_step=32": "data.buckets=true",
    "method=lora method.text_targets=[q_proj]": "text encoders in method.train",
    "data.resolutions=[32,64] data.resolution=32": "data.resolutions=[]",
    "log.prompts=[a] log.sample_count=3": "log.prompts",
    "log.negative_prompt=blurred": "log.guidance_scale above 1",
    "schedule.epochs=2 schedule.steps=99": "schedule.epochs=null",
    "ema=bf16 log.sample_count=0 method.ema.sample=last": "pictures",
    "log.sample_count=0 log.guidance_scale=6": "pictures",
    "optim.on_nonfinite=raise": "runtime.max_skipped_steps",
    "optim.lr=0": "changes no weight",
    "method.metadata.author=me": "method.export=[single_file]",
    "method.export=[]": "writes no model",
    "ema=bf16 method.ema.warmup=false method.ema.decay=1": "never changes the average",
    "ema=bf16 schedule.steps=4 method.ema.every=5": "never updates the average",
}


@pytest.mark.parametrize("options", QUIET, ids=" ".join)
def test_nothing_is_said_of_options_that_do_something(composed, options):
    assert remarks.of_config(composed(*options)) == []


@pytest.mark.parametrize("options", IDLE)
def test_an_option_without_effect_is_pointed_out_with_what_it_belongs_to(composed, options):
    (said,) = remarks.of_config(composed(*options.split()), options.split())
    key = options.split()[-1].partition("=")[0]
    assert said.startswith(key)
    assert IDLE[options] in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["schedule.hold=1"], "schedule=cosine has no step left to decay in (schedule.hold"),
        (["schedule=wsd", "schedule.decay=0"], "to decay in (schedule.decay"),
        (
            ["schedule=cosine_restarts", "schedule.cycles=300"],
            "schedule.cycles=300 leaves fewer than two",
        ),
        (
            ["schedule=cosine_restarts", "schedule.cycles=2", "schedule.steps=3"],
            "does not fall within one; use 1",
        ),
    ],
)
def test_a_decay_without_room_is_remarked(composed, options, says):
    (said,) = remarks.of_schedule(settled(composed(*options).schedule, 1))
    assert says in said
    roomy = composed("schedule=cosine_restarts", "schedule.cycles=250").schedule
    assert list(remarks.of_schedule(settled(roomy, 1))) == []


def test_the_default_rate_is_remarked_where_a_large_model_is_trained_whole(composed):
    (said,) = remarks.of_rate(composed(), 2_567_463_684)
    assert said.endswith("start near 1e-05")
    assert not remarks.of_rate(composed(), 2_740_000)
    for quiet in (["optim.lr=1e-5"], ["optim=prodigy"]):
        assert not remarks.of_rate(composed(*quiet), 2_567_463_684)


def test_the_default_rate_is_remarked_where_a_lora_of_a_large_model_is_trained(composed):
    (said,) = remarks.of_rate(composed("method=lora", "optim=adamw"), 2_567_463_684)
    assert "for a LoRA of SDXL start near 0.0001" in said
    for quiet in (["optim.lr=1e-4"], ["optim=prodigy"]):
        assert not remarks.of_rate(composed("method=lora", *quiet), 2_567_463_684)
    assert not remarks.of_rate(composed("method=lora"), 2_740_000)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "sophia"])
def test_the_rate_that_is_advised_is_that_of_the_presets(composed, tmp_path, name):
    (said,) = remarks.of_rate(composed(f"optim={name}"), 2_567_463_684)
    preset = composed("experiment=large", f"data.path={tmp_path}", f"optim={name}").optim.lr
    assert said.endswith(f"start near {preset:g}")


@pytest.mark.parametrize("option", ["method.export_every=2", "method.export_dtype=float16"])
def test_options_of_results_that_are_not_written_are_pointed_out(composed, option):
    said = remarks.of_config(composed("method.export=[]", option))
    assert said[0] == f"{option} has no effect here: it is only used with a format in method.export"
    assert "writes no model" in said[1]


def test_time_ids_are_remarked_where_the_unet_does_not_read_them(composed, sd15):
    cpu = torch.device("cpu")
    assert Model(composed().model, cpu).reads_time_ids
    assert not Model(composed(f"model.path={sd15}").model, cpu).reads_time_ids
    given = ["data.time_ids=resized"]
    (said,) = remarks.of_time_ids(composed(*given), given, is_read=False)
    assert said.startswith("data.time_ids=resized has no effect here")
    assert remarks.of_time_ids(composed("data.time_ids=bucket"), [], is_read=False)
    assert not remarks.of_time_ids(composed(*given), given, is_read=True)
    assert not remarks.of_time_ids(composed(), [], is_read=False)


@pytest.mark.parametrize(
    ("options", "own", "says"),
    [
        (["data.resolution=1024"], 512, "data.resolution=1024: the model was made for"),
        (["data.resolution=512"], 1024, "use data.resolution=1024"),
        (["data.resolution=512", "data.resolutions=[512,1024]"], 512, "data.resolutions=[512, 10"),
        (["data.resolution=512", "data.resolutions=[512,1024]"], 1024, None),
        (["data.resolution=768"], 512, None),
        (["data.resolution=768"], 1024, None),
        (["data.resolution=64"], None, None),
    ],
)
def test_pictures_of_another_size_than_the_models_are_remarked(composed, options, own, says):
    said = remarks.of_resolution(composed("data=folder", "data.path=/", *options), own)
    assert says in said[0] if says else not said


def test_a_model_says_the_size_that_it_was_made_for(composed, tmp_path):
    cpu = torch.device("cpu")
    assert Model(composed().model, cpu).resolution == 64
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    settings = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(settings | {"sample_size": None}))
    assert Model(composed(f"model.path={folder}").model, cpu).resolution is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "the model has hardly moved; optim.lr=1e-08 is too low, or 40 steps are too few"),
        ({"rate_found": 1e-6}, "optim.lr=1e-08 times the 1e-06 found is too low"),
        ({"eval_loss_after": 0.4989}, None),
        ({"eval_loss_before": math.nan}, None),
        ({"eval_loss_after": math.nan}, None),
        ({"prediction": "v_prediction"}, None),
    ],
)
def test_a_run_that_changed_next_to_nothing_is_remarked(changed, says):
    losses = {"eval_loss_before": 0.5, "eval_loss_after": 0.4999}
    same = {"prediction_before": "epsilon", "prediction": "epsilon"}
    found = losses | same | {"lr": 1e-8, "steps": 40, "rate_found": None} | changed
    said = remarks.of_outcome(found)
    assert says in said[0] if says else not said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"eval_loss_after": 7.74}, "worse than before the first step; lower optim.lr=0.03"),
        ({"eval_loss_after": 0.4, "holdout_loss_after": 0.7}, "eval/holdout_loss was 0.6 and is"),
        ({"eval_loss_after": 0.4, "holdout_loss_after": 0.5}, None),
        ({"eval_loss_after": 0.4, "holdout_loss_before": math.nan}, None),
        ({"eval_loss_after": 7.74, "prediction": "v_prediction"}, None),
    ],
)
def test_a_run_that_made_the_model_worse_is_remarked(changed, says):
    losses = {"eval_loss_before": 0.5, "holdout_loss_before": 0.6, "holdout_loss_after": 0.7}
    same = {"prediction_before": "epsilon", "prediction": "epsilon"}
    said = remarks.of_outcome(losses | same | {"lr": 0.03, "steps": 40} | changed)
    assert says in said[0] if says else not said


@pytest.mark.parametrize(
    ("after", "found", "diverged"),
    [(7.0, False, True), (1.2, False, False), (1.2, True, True), (math.nan, False, False)],
)
def test_a_run_that_ends_far_above_its_beginning_has_diverged(after, found, diverged):
    state = SimpleNamespace(
        model=SimpleNamespace(predictions=("epsilon", "epsilon")),
        starts_from_adapter=False,
        watch=SimpleNamespace(diverged=found),
        eval_loss_before=1.0,
    )
    assert summary._has_diverged(state, after) == diverged


def test_a_divergence_that_would_not_be_noticed_is_remarked(composed):
    for policy, says in (("rollback", "heeds only steps"), ("stop", "has no effect")):
        config = composed(f"runtime.on_divergence={policy}", "log.eval_points=3")
        assert not [*remarks.of_divergence(config, is_judged=True)]
        (said,) = remarks.of_divergence(config, is_judged=False)
        assert said.startswith(f"runtime.on_divergence={policy} {says}")
        assert "log.eval_points=3; 4" in said
    assert not [*remarks.of_divergence(composed(), is_judged=False)]


def test_few_eval_points_are_remarked_if_a_run_that_diverges_is_to_stop(quick):
    for points, is_said in ((3, True), (4, False)):
        options = [f"log.eval_points={points}", "runtime.on_divergence=stop", "schedule.steps=1"]
        said = (quick(f"{points}", *options) / "train.log").read_text()
        assert ("runtime.on_divergence=stop has no effect here" in said) is is_said


def test_what_is_remarked_of_an_outcome_reaches_the_log(quick):
    folder = quick("run", "optim.lr=1e-9")
    assert "the model has hardly moved; optim.lr=1e-09" in (folder / "train.log").read_text()


def test_black_masks_are_named_before_a_run_and_blamed_after_it(quick, pictures):
    for path in pictures.glob("*.png"):
        mask = Image.new("L", Image.open(path).size, 0)
        mask.save(path.with_suffix(".mask.png"))
    Image.new("RGBA", (80, 70), (0, 0, 0, 0)).save(pictures / "red.png")
    options = ["data=folder", f"data.path={pictures}", "data.resolution=64", "data.buckets=false"]
    said = (quick("run", *options, "data.mask=file") / "train.log").read_text()
    assert "pictures have a black mask" in said
    assert "1 picture has only transparent pixels" in said
    assert "every gradient was 0, so nothing was learned" in said
    assert "hardly moved" not in said


def test_a_remark_reaches_the_log_of_the_run(quick):
    folder = quick("run", "loss.gamma=3", "data.resolution=32")
    said = (folder / "train.log").read_text()
    assert "loss.gamma=3.0 has no effect" in said
    assert "data.resolution=32: the model was made for 64 x 64" in said
