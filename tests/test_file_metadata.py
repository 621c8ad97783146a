"""What a run's files say of themselves: the user's words, and what kohya's scripts count."""

import base64
import io
import json
import shutil

import pytest
from helpers import QUICK, run_export
from PIL import Image
from safetensors import safe_open

from trainer.config import ASSETS
from trainer.data import census
from trainer.errors import UserError
from trainer.run import run
from trainer.storage import result
from trainer.sweep import identity

ONE_STEP = ("schedule.steps=1", "schedule.warmup_steps=0", "log.eval_points=1")
LORA = ("name=cats", "method=lora", "method.rank=1", "method.targets=[to_q]", *ONE_STEP)
FILES = ("lora/cats.safetensors", "lora/pytorch_lora_weights.safetensors")
WORDS = {
    "title": "My cats",
    "author": "me",
    "description": "cats, drawn",
    "license": "CC0-1.0",
    "tags": "cat, drawing",
    "trigger_phrase": "sks cat",
    "usage_hint": "weight: 0.8",
}


def told(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def sources(tmp_path):
    """Two folders of the user's pictures, and one of regularisation pictures."""
    pictures = sorted((ASSETS / "emoji24").glob("*.png"))
    every = {
        "10_cat": ["sks cat, Red, sitting", "sks cat,  red", "sks cat, , blue"],
        "others": ["a dog, red"],
        "prior": ["somebody's secret", "another secret"],
    }
    for name, captions in every.items():
        (tmp_path / name).mkdir()
        for caption in captions:
            picture = pictures.pop()
            shutil.copy(picture, tmp_path / name)
            (tmp_path / name / picture.name).with_suffix(".txt").write_text(caption)
    return [
        f"{{path: {tmp_path}/10_cat/, repeats: 3}}",
        f"{{path: {tmp_path}/others}}",
        f"{{path: {tmp_path}/prior, prior: true, repeats: 2}}",
    ]


def test_the_users_words_are_in_both_files_of_a_lora(quick):
    given = ", ".join(f'{key}: "{word}"' for key, word in WORDS.items())
    folder = quick("run", *LORA, f"method.metadata={{{given}}}")
    for name in FILES:
        found = told(folder / name)
        assert {f"modelspec.{key}": word for key, word in WORDS.items()}.items() <= found.items()
        assert "modelspec.thumbnail" not in found
        assert found["ss_output_name"] in ("cats", "pytorch_lora_weights")


def test_the_users_words_are_in_a_single_file_and_a_checkpoints(quick, tmp_path, capsys):
    options = ("method.export=[single_file]", "method.metadata.author=me", "name=cats", *ONE_STEP)
    folder = quick("run", *options)
    target = tmp_path / "cats.safetensors"
    assert run_export(capsys, folder / "checkpoints/step-000001", target)[0] == 0
    for path in (folder / "cats.safetensors", target):
        found = told(path)
        assert found["modelspec.author"] == "me"
        assert found["modelspec.title"] == "cats"
        assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        assert not [key for key in found if key.startswith("ss_")]


@pytest.mark.parametrize("kind", ["path", "data url"])
def test_a_thumbnail_is_a_small_picture(kind, composed, tmp_path):
    Image.new("RGBA", (600, 300), "red").save(tmp_path / "cat.png")
    given = str(tmp_path / "cat.png") if kind == "path" else "data:image/png;base64,AAAA"
    config = composed("method=lora", f'method.metadata.thumbnail="{given}"')
    words = vars(config.method.metadata)
    found = result._words(words)["modelspec.thumbnail"]
    if kind != "path":
        assert found == given
        return
    head, _, content = found.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (256, 128))
    (tmp_path / "cat.png").unlink()
    assert result._words(words) == {}
    with pytest.raises(UserError, match=r"method\.metadata\.thumbnail=.*cat\.png cannot be read"):
        composed("method=lora", f'method.metadata.thumbnail="{given}"')


def test_pictures_and_epochs_are_counted_as_kohyas_scripts_do(quick, sources, tmp_path, capsys):
    """3 pictures 3 times and 1 once; 2 regularisation pictures twice: 14 in batches of 4."""
    options = (f"data.sources=[{', '.join(sources)}]", "data.path=null", "data.batch_size=4")
    more = ("schedule.steps=5", "method.export_every=2", "model.path=" + str(ASSETS / "tiny_sdxl"))
    saved = ("runtime.save_every=2", "runtime.keep_checkpoints=3")
    folder = quick("run", *LORA, *options, *more, *saved)
    for step in (2, 5):
        checkpoint = folder / f"checkpoints/step-00000{step}"
        assert run_export(capsys, checkpoint, tmp_path / f"{step}.safetensors")[0] == 0
    counts = {
        "ss_num_train_images": "10",
        "ss_num_reg_images": "4",
        "ss_num_batches_per_epoch": "4",  # 3.5
        "ss_num_epochs": "2",  # 5 steps are 1.4
        "ss_sd_model_name": "tiny_sdxl",
    }
    for path, epoch in (
        *((folder / name, "2") for name in FILES),
        (folder / "results/step-000002/lora/cats-step-000002.safetensors", "1"),
        (tmp_path / "2.safetensors", "1"),
        (tmp_path / "5.safetensors", "2"),
    ):
        found = told(path)
        assert (counts | {"ss_epoch": epoch}).items() <= found.items()
        assert "ss_tag_frequency" not in found
        assert "sks" not in json.dumps(found)


def test_every_resolution_counts_and_a_held_out_picture_and_a_mirror_image_do_not(load):
    plain = census.own_and_prior(load())
    assert plain == (4, 0)
    assert census.own_and_prior(load(random_flip=True)) == plain
    assert census.own_and_prior(load(holdout=1)) == (3, 0)
    assert census.own_and_prior(load(resolutions=[32, 64])) == (8, 0)


def test_tags_are_counted_on_request_but_not_those_of_regularisation_pictures(quick, sources):
    options = (f"data.sources=[{', '.join(sources)}]", "data.path=null", "data.batch_size=4")
    more = ("method.tag_frequency=true", "data.shuffle_tags=true", "data.resolutions=[32,64]")
    folder = quick("run", *LORA, *options, *more)
    for name in FILES:
        found = told(folder / name)
        assert json.loads(found["ss_tag_frequency"]) == {
            "10_cat": {"sks cat": 3, "red": 2, "sitting": 1, "blue": 1},
            "others": {"a dog": 1, "red": 1},
        }
        assert "secret" not in json.dumps(found)


def test_words_may_change_when_a_run_is_resumed(quick, composed):
    folder = quick("run", *LORA, "method.metadata.title=Cats")
    options = ("method.metadata.title=Dogs", "method.metadata.author=me", f"resume={folder}")
    run(composed(*QUICK, *LORA, *options), folder)
    found = told(folder / FILES[0])
    assert (found["modelspec.title"], found["modelspec.author"]) == ("Dogs", "me")


def test_words_and_tags_in_a_file_do_not_make_another_run():
    assert not identity.is_setting("method.metadata.title")
    assert not identity.is_setting("method.tag_frequency")
    assert identity.is_setting("method.rank")
