"""Configurations that work, and say something that nobody meant."""

import pytest

from trainer import remarks

QUIET = [
    [],
    ["method=lora"],
    ["loss=huber"],
    ["log=wandb"],
    ["loss.weighting=min_snr", "loss.gamma=3"],
    ["noise.timesteps=logit_normal", "noise.logit_mean=0.5"],
    ["data=folder", "data.path=/", "data.upscale=true", "data.max_aspect=2"],
    ["data.tag_dropout=0.1", "data.keep_tokens=2", "data.caption_variants=3"],
    ["optim.lr=0", "method.rules=[{pattern: attn2, lr: 0.1}]"],
    ["method=lora", "method.train=[unet,text_encoder]", "method.text_targets=[q_proj]"],
]
IDLE = {
    "loss.gamma=3": "loss.weighting=min_snr",
    "loss=huber loss.gamma=3": "loss.weighting=min_snr",
    "loss.unmasked_weight=0.5": "data.mask",
    "noise.logit_std=2": "noise.timesteps=logit_normal",
    "data.keep_tokens=2": "data.shuffle_tags",
    "data.caption_variants=3": "data.shuffle_tags",
    "data.tag_separator=|": "data.shuffle_tags",
    "data.upscale=true": "data.buckets=true",
    "data.bucket_step=32": "data.buckets=true",
    "method=lora method.text_targets=[q_proj]": "text encoders in method.train",
    "log.prompts=[a] log.sample_count=3": "log.prompts",
    "log.sample_count=0 log.guidance_scale=5": "pictures",
    "optim.on_nonfinite=raise": "runtime.max_skipped_steps",
    "optim.lr=0": "changes no weight",
    "method.export=[]": "writes no model",
    "ema=bf16 method.ema.decay=1": "never moves the average",
}


@pytest.mark.parametrize("options", QUIET, ids=" ".join)
def test_nothing_is_said_of_options_that_do_something(composed, options):
    assert remarks.of_config(composed(*options)) == []


@pytest.mark.parametrize("options", IDLE)
def test_an_option_without_effect_is_pointed_out_with_what_it_belongs_to(composed, options):
    (said,) = remarks.of_config(composed(*options.split()))
    key = options.split()[-1].partition("=")[0]
    assert said.startswith(key)
    assert IDLE[options] in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["schedule.hold=1"], "schedule=cosine has no step left to decay in (schedule.hold"),
        (["schedule=wsd", "schedule.decay=0"], "to decay in (schedule.decay"),
        (["schedule=cosine_restarts", "schedule.cycles=300"], "schedule.cycles=300 leaves a cycle"),
    ],
)
def test_a_decay_without_room_is_remarked(composed, options, says):
    (said,) = remarks.of_config(composed(*options))
    assert says in said
    assert remarks.of_config(composed("schedule=cosine_restarts", "schedule.cycles=250")) == []


def test_the_default_rate_is_remarked_where_a_large_model_is_trained_whole(composed):
    (said,) = remarks.of_rate(composed(), 2_567_463_684)
    assert "1e-5" in said
    assert not remarks.of_rate(composed(), 2_740_000)
    for quiet in (["optim.lr=1e-5"], ["method=lora"], ["optim=prodigy"]):
        assert not remarks.of_rate(composed(*quiet), 2_567_463_684)


def test_a_remark_reaches_the_log_of_the_run(quick):
    folder = quick("run", "loss.gamma=3")
    assert "loss.gamma=3.0 has no effect" in (folder / "train.log").read_text()
