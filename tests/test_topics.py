"""`python -m trainer --help TOPIC`: what groups, their choices and options are."""

import itertools
import re
import signal
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest
from conftest import compose_raw
from omegaconf import OmegaConf

import optim
from optim import described
from trainer import config
from trainer.config import documented
from trainer.config.schedule import CosineConfig

GROUPS = [group for group in config.group_names() if group not in ("ema", "experiment", "sweep")]


def schemas():
    """The dataclasses of all options."""
    found, new = set(), {config.Config, config.PeerConfig, *sum(config.ALTERNATIVES.values(), ())}
    while new:
        found |= new
        hints = [hint for schema in new for hint in get_type_hints(schema).values()]
        new = {each for hint in hints for each in (hint, *get_args(hint)) if is_dataclass(each)}
        new -= found
    return sorted(found, key=lambda schema: schema.__name__)


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_option_is_documented(schema):
    groups, texts = config.group_names(), documented.of_fields(schema)
    names = {option.name for option in fields(schema)}
    if schema is not config.Config:
        groups, names = [], names - {"name"}  # of the choice itself
    assert names - {*groups} == {*texts} - {*groups}


@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_every_option_of_an_optimizer_is_documented(name):
    texts = described.arguments(optim.FAMILY[name])
    assert all(texts.get(option) for option in optim.options_of(name))


def test_comments_before_and_behind_a_field_are_its_documentation():
    source = """
class Some:
    # Not this.
    one: int  #: Behind.
    #: Before,
    #: twice;
    two: str = one_of("a")  #: and behind.
    # Nor this.
    three: int
"""
    found = documented._of_source(source)
    assert found == {"one": "Behind.", "two": "Before, twice; and behind."}


@pytest.fixture
def told(command):
    """What --help says of topics, and that it succeeds."""

    def tell(*topics):
        status, out, err = command("--help", *topics)
        assert (status, err) == (0, "")
        return out

    return tell


def listed(text):
    """{option: its value} of a text."""
    return dict(re.findall(r"^([a-z_0-9.\[\]]+)=(.*)$", text, re.MULTILINE))


def test_a_group_has_its_choices_and_options(told):
    text = told("schedule")
    assert text.startswith("schedule=CHOICE\n  constant ")
    assert all(f"\n  {choice} " in text for choice in config.choices_of("schedule"))
    assert re.search(r"\nschedule\.hold=0\.0\n    \(in \[0, 1\]\) share of the run before", text)
    known = {f"schedule.{option.name}" for option in fields(CosineConfig)}
    assert {*listed(text)} == {"schedule", *known} - {"schedule.name"}


def test_every_shown_value_is_one_that_hydra_reads(told):
    shown = {
        key: value for key, value in listed(told(*GROUPS)).items() if "." in key and "[]" not in key
    }
    before = compose_raw()
    after = compose_raw(*(f"{key}={value}" for key, value in shown.items()))
    assert len(shown) > 100
    for key in shown:
        assert OmegaConf.select(after, key) == OmegaConf.select(before, key)


def test_a_shown_mapping_is_one_that_hydra_reads(told):
    chosen = "optim=peer/hf_adafactor"
    shown = listed(told(chosen))["optim.options"]
    before, after = compose_raw(chosen), compose_raw(chosen, f"optim.options={shown}")
    assert before.optim.options
    assert after.optim.options == before.optim.options


def test_a_choice_has_its_options_with_the_values_and_bounds_they_may_have(told):
    text = told("optim=prodigy_factored")
    assert "Prodigy with factored moments and 1-bit signs" in text
    assert "\noptim.slice_p=11\n    (an integer >= 1 and < 2^62) d comes from every" in text
    assert {*listed(text)} == {
        "optim",
        *(f"optim.{name}" for name in optim.options_of("prodigy_factored") if name != "seed"),
    }
    assert "\nmethod.ema.dtype=bfloat16\n" in told("ema=bf16")


def test_no_value_is_written_as_hydra_reads_it(told):
    text = told("optim.grad_clip")
    assert text.startswith("optim.grad_clip=null\n    (a number > 0, or null) ")
    assert "null disables clipping" in text
    assert "None" not in told("optim=adafactor8bit")


def test_values_are_those_of_the_choices_on_the_command_line(told):
    assert told("data.resolution").startswith("data.resolution=64\n    (in [8, 16384])")
    assert told("experiment=sdxl", "data.resolution").startswith("data.resolution=1024\n")
    assert told("data.mask=alpha").startswith(
        "data.mask=alpha\n    (none, alpha or file) Loss mask"
    )
    assert told("data=folder", "model=sdxl", "model.path").startswith("model.path=...\n")


def test_a_preset_lists_the_values_that_it_changes(told):
    text = told("experiment=[low_memory,smoke]")
    values = dict(re.findall(r"^    ([a-z_.]+)=(.*)$", text, re.MULTILINE))
    assert values["runtime.fused_backward"] == "true"
    assert values["schedule.steps"] == "4"
    assert "data.path" not in values


def test_a_word_is_every_option_with_it_in_its_name(told):
    assert {*listed(told("flip"))} == {"data.random_flip"}
    assert {"data.caption_prefix", "data.caption_suffix"} < {*listed(told("caption"))}
    both = told("flip", "optim=lion", "optim.betas")
    assert {*listed(both)} == {"data.random_flip", "optim.betas"}


def test_items_of_a_list_are_explained_with_it(told):
    text = told("data.sources")
    assert "\ndata.sources[].repeats=1\n    (at least 1) How often each picture occurs" in text


@pytest.mark.parametrize(
    ("topics", "says"),
    [
        (["train_batch_size"], "it is called 'data.batch_size' here"),
        (["datta"], "did you mean 'data'?"),
        (["optim=lionn"], "did you mean 'lion'?"),
        (["+optim.betta1=0.5"], "did you mean 'beta1'?"),
        (["lion"], "'lion' is a choice; to explain it and its options: --help optim=lion\n"),
        (["sdxl"], "--help experiment=sdxl or --help model=sdxl"),
        (["hydra.run.dir"], "python -m trainer --cfg hydra"),
        (["method.rank"], "method=loha, method=lokr, method=lora have it"),
        (
            ["rank"],
            "there is no option 'rank' here; there is method.rank with method=loha, method=lokr, "
            "method=lora and optim.rank with optim=adafactor8bit_apollo, optim=apollo, "
            "optim=apollo_mini",
        ),
    ],
)
def test_an_unknown_topic_is_an_error_that_names_the_nearest(command, topics, says):
    status, out, err = command("--help", *topics)
    assert (status, out) == (2, "")
    assert says in err


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="not on Windows")
def test_help_ends_silently_when_nobody_reads_on(told):
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python sets it: an exception
    try:
        told("seed")
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("group", config.group_names())
def test_the_first_line_of_a_choices_comment_ends_a_sentence_where_the_next_begins_one(group):
    for choice in config.choices_of(group):
        lines = documented.of_choice(group, choice)
        for line, following in itertools.pairwise(lines):
            assert line.endswith((".", ":", ",", ";")) or not following[:1].isupper(), choice
