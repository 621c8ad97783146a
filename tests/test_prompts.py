"""`log.prompts` and the options of each prompt, in kohya's syntax."""

import json

import pytest
from helpers import QUICK
from PIL import Image

from trainer.checks import remarks
from trainer.errors import UserError
from trainer.sampling import prompts

LINE = "a cat, on a -- roof --w 32 --h 96 --n blurred, grey --d 7 --l 5.5 --s 30"


def of(config, side=64):
    return prompts.of_config(config.log, side)


def test_a_prompt_has_options_of_its_own_and_the_configured_ones_otherwise(composed):
    config = composed(
        *QUICK, f"log.prompts={json.dumps([LINE, 'two --d 9', 'three'])}", "log.guidance_scale=2"
    )
    config.log.negative_prompt = "low quality"
    first, second, third = of(config)
    assert first.text == "a cat, on a -- roof"
    assert first.size == (96, 32)
    assert (first.negative, first.seed) == ("blurred, grey", 7)
    assert (first.guidance_scale, first.steps) == (5.5, 30)
    assert (second.text, second.seed, second.size) == ("two", 9, (64, 64))
    assert (third.text, third.seed, third.negative) == ("three", 2, "low quality")
    assert third.guidance_scale == 2
    assert first.line == LINE


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a cat --w 833", "--w 833 is not a multiple of 8 pixels"),
        ("a cat --h 0", "--h 0 is not a multiple of 8"),
        ("a cat --d -1", "--d -1 must be from 0 to 2^64"),
        (f"a cat --d {2**64}", "must be from 0 to 2^64"),
        ("a cat --w wide", "--w takes a whole number"),
        ("a cat --d 1.5", "--d takes a whole number"),
        ("a cat --l high", "--l takes a number"),
        ("a cat --s 0", "--s 0 must be from 1 to 1000 steps"),
        ("a cat --ar 16:9", "no option of a prompt 'ar'"),
        ("a cat --n blurred", "--n only has an effect with guidance"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_prompt(composed, line, said):
    with pytest.raises(UserError) as raised:
        composed(*QUICK, f"log.prompts={json.dumps([line])}")
    assert said in str(raised.value)
    assert line in str(raised.value)


def test_a_file_has_a_prompt_a_line(composed, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff # mine\na cat, sitting --w\t128\n\n two hearts\n", encoding="utf-8")
    config = composed(*QUICK, f"log.prompts_file={path}")
    assert config.log.prompts == ["a cat, sitting --w\t128", "two hearts"]
    assert of(config)[0].size == (64, 128)
    assert not any(remark.startswith("log.prompts_file") for remark in remarks.of_config(config))
    both = composed(*QUICK, f"log.prompts_file={path}", "log.prompts=[a dog]")
    assert both.log.prompts == ["a dog"]
    assert any(remark.startswith("log.prompts_file") for remark in remarks.of_config(both))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"# none\n", "no prompt"), (b"\xff", "utf-8")]
)
def test_a_file_without_prompts_is_refused_by_name(composed, tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        composed(*QUICK, f"log.prompts_file={path}")
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_pictures_have_their_prompts_sizes_and_seeds(quick):
    lines = ["two hearts --w 96 --h 32", "two hearts --d 5", "two hearts --d 5", "two hearts --s 1"]
    folder = quick("run", f"log.prompts={json.dumps(lines)}", "log.sample_steps=2")
    drawn = [Image.open(folder / f"samples/step-000004/0{n}.png") for n in range(4)]
    assert [picture.size for picture in drawn] == [(96, 32), (64, 64), (64, 64), (64, 64)]
    assert drawn[1].tobytes() == drawn[2].tobytes() != drawn[3].tobytes()
    assert drawn[0].text["caption"] == lines[0]
