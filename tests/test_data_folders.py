"""Folders of pictures: which files belong to a picture, which are ignored, and the log of both."""

import json
import logging
import os
import re
import shutil
import socket
from collections import Counter

import pytest
from helpers import names
from PIL import Image

from trainer.errors import UserError


def test_strange_names_links_and_hidden_files(load, tmp_path, caplog):
    folder = tmp_path / "straße \n x"
    (folder / ("d" * 200)).mkdir(parents=True)
    (folder / ".hidden").mkdir()
    picture = Image.new("RGB", (64, 64), "red")
    for place in ("ä\n1.png", f"{'d' * 200}/{'p' * 200}.png", "A.PNG", "a.png"):
        picture.save(folder / place, format="png")
    for hidden in ("._a.png", ".hidden/x.png"):
        (folder / hidden).write_bytes(b"no picture")
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    outside = tmp_path / "outside"
    outside.mkdir()
    picture.save(outside / "o.png")
    (folder / "link").symlink_to(outside)
    caplog.set_level("INFO")
    dataset = load(path=str(folder), max_unreadable=0)
    assert len(dataset.samples) == 5
    assert names(dataset) == ["A.PNG", "a.png", f"{'p' * 200}.png", "o.png", "ä\\n1.png"]
    assert "ignored" in caplog.text
    assert "1 link to a parent folder" in caplog.text


PASSED_OVER = {
    # files beside the four pictures: the log message about them
    "a.tar.gz b.tgz c.ZIP": "3 archives are ignored",
    "a.svg b.NEF c.mpo": "3 pictures in unsupported formats",
    "gas.mask.png red.mask.jpg": "2 masks without a picture",
    "gas.txt gas.caption sub/red.txt": "3 captions have no picture",
    ".red.png .cache/a/b/red.png .x/red.jpg": "3 paths are hidden (by a name that starts with a",
    # files ignored silently
    "README.txt LICENSE.txt ._red.png .git/config .hidden.txt red.mask.png notes.md": None,
    "red.Mask.PNG": None,
}


@pytest.mark.parametrize("files", PASSED_OVER)
def test_what_is_passed_over_is_counted_and_named(load, pictures, caplog, files):
    for name in files.split():
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes((pictures / "red.png").read_bytes())
    assert len(load(mask="file").samples) == 4
    said = [line for line in caplog.messages if line.startswith("data: ")]
    if says := PASSED_OVER[files]:
        assert len(said) == 1
        assert said[0].startswith(f"data: {says}")
        assert sorted(files.split())[-1].split("/")[0] in said[0]
    else:
        assert not said


def test_what_lies_beside_a_picture_elsewhere_is_read_too(load, pictures, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("L", (80, 70), 0).save(pictures / "red.mask.png")
    lines = [{"file_name": "../pictures/red.png"}, {"file_name": f"{pictures}/blue.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    blue, red = load(path=str(folder), mask="file").samples
    assert (blue.caption, red.caption) == ("a blue card", "a red card")
    assert (red.read_mask() == 0).all()


@pytest.mark.parametrize("suffix", ["tga", "PPM", "jp2", "avif", "dds", "pcx", "qoi", "ico"])
def test_every_kind_of_picture_that_pillow_opens_is_one(load, pictures, suffix):
    if Image.registered_extensions().get(f".{suffix.lower()}") not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    image = Image.open(pictures / "red.png")
    image.save(pictures / f"x.{suffix}", **({"sizes": [(64, 64)]} if suffix == "ico" else {}))
    (pictures / f"x.{suffix}").with_suffix(".txt").write_text("a card")
    assert len(load(max_unreadable=0).samples) == 5


def test_data_without_a_picture_tells_what_is_there_instead(load, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no pictures; 1 archive is ignored.*0\.tar\.gz"):
        load(path=str(tmp_path / "shards"))


def test_only_regular_files_are_opened(load, pictures, caplog, monkeypatch):
    for name in ("pipe.png", "red.mask.png", "pipe.txt", "blue.mask.png"):
        os.mkfifo(pictures / name)
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(pictures)  # a socket's path must be short
        made.bind("socket.jpg")
    (pictures / "device.png").symlink_to("/dev/zero")
    dataset = load(mask="file", max_unreadable=5)
    assert names(dataset) == ["green.png", "yellow.png"]
    for name in ("pipe.png", "red.png", "blue.png", "socket.jpg", "device.png"):
        assert re.search(rf"unreadable picture \S*{name}: .*is not a regular file", caplog.text)
    for name in ("metadata.jsonl", "shard.tar", "table.parquet"):
        os.mkfifo(pictures / name)
        with pytest.raises(UserError, match=rf"{name}.* is not a regular file"):
            load(max_unreadable=5)
        (pictures / name).unlink()


@pytest.mark.parametrize(
    "signs",
    [
        ("environment.json", "config.yaml"),
        ("metrics.jsonl", "checkpoints/x"),
        (".hydra/config.yaml",),
    ],
)
def test_pictures_that_runs_left_in_the_folder_are_no_data(load, pictures, caplog, signs):
    for run in ("a", "b"):
        folder = pictures / "runs/2026-01-01" / run
        for name in ("samples/step-1.png", *signs):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures / "red.png", folder / name)
    assert len(load().samples) == 4
    said = [line for line in caplog.messages if "folders of runs" in line]
    assert len(said) == 1
    assert said[0].startswith("data: 2 folders of runs are ignored")
    assert len(load(path=str(folder)).samples) == 1  # named explicitly


def test_both_kinds_of_sidecars_are_found_and_one_kind_can_be_chosen(load, pictures, caplog):
    (pictures / "red.txt").rename(pictures / "red.caption")
    (pictures / "blue.caption").write_text("unread")
    assert [s.caption for s in load().samples] == [
        "a blue card",
        "a green card",
        "a red card",
        "a yellow card",
    ]
    assert "1 picture has a .caption next to its .txt; it is ignored: " in caplog.text
    chosen = load(caption_extension=".caption", on_missing_caption="skip")
    assert [s.caption for s in chosen.samples] == ["unread", "a red card"]


@pytest.mark.parametrize("extension", [".txt", ".TXT", [".caption", ".Txt", ".txt"]])
def test_the_case_of_a_text_files_ending_does_not_matter(load, pictures, caplog, extension):
    (pictures / "red.txt").rename(pictures / "red.TXT")
    (pictures / "red.png").rename(pictures / "red.PNG")
    dataset = load(caption_extension=extension, on_missing_caption="error")
    assert dataset.samples[2].caption == "a red card"
    assert "it is ignored" not in caplog.text
    (pictures / "blue.TXT").write_text("another")
    first = load(caption_extension=extension).samples[0].caption
    assert first == ("another" if extension == ".TXT" else "a blue card")
    assert "it is ignored" in caplog.text


def test_a_text_file_of_two_pictures_is_noted(load, pictures, caplog):
    Image.new("RGB", (64, 64)).save(pictures / "red.jpg")
    assert [s.caption for s in load().samples].count("a red card") == 2
    assert "2 pictures have a .txt that is another picture's too, of the same name: " in caplog.text


def test_kohyas_repeats_in_folder_names_are_pointed_out(pictures, load, caplog):
    for name in ("10_cat", "1_dog", "2024"):
        shutil.copytree(pictures, pictures / name, ignore=shutil.ignore_patterns("*_*", "2*"))
    caplog.set_level(logging.INFO)
    assert len(load().samples) == 16
    (said,) = (message for message in caplog.messages if "in kohya's style" in message)
    assert "10_cat" in said
    assert "data.kohya_folders=true" in said
    assert "1_dog" not in said
    assert "2024" not in said


def test_kohyas_folders_are_sources_on_request(pictures, load, caplog):
    """Also of regularisation pictures, and beside others in the same folder."""
    load(kohya_folders=True)
    assert "data.kohya_folders=true has no effect: no folder in the sources" in caplog.text
    caplog.clear()
    for name in ("10_sks cat", "1_dog", "2024"):
        shutil.copytree(pictures, pictures / name, ignore=shutil.ignore_patterns("*_*", "2*"))
    for text in (pictures / "10_sks cat").glob("*.txt"):
        text.unlink()
    caplog.set_level(logging.INFO)
    dataset = load(kohya_folders=True)
    assert len(dataset.samples) == 16
    counts = Counter(i for members in dataset.plan.members for i in members)
    repeats = {"10_sks cat": 10, "1_dog": 1, "2024": 1, pictures.name: 1}
    for index, sample in enumerate(dataset.samples):
        folder = os.path.basename(os.path.dirname(sample.item.path))
        assert counts[index] == repeats[folder]
        assert (sample.caption == "sks cat") is (folder == "10_sks cat")
    assert "in kohya's style" not in caplog.text
    assert "no effect" not in caplog.text
    assert f"  {pictures}/10_sks cat: 4 pictures, 10 times each: 40 in an epoch" in caplog.text
    (pictures / "0_none").mkdir()
    with pytest.raises(UserError, match=r"0_none has 0 repeats"):
        load(kohya_folders=True)


def test_a_caption_is_shown_as_it_is_trained_and_a_prefix_twice_is_noticed(load, caplog):
    caplog.set_level(logging.INFO)
    load(caption_prefix="A blue, ")
    assert '  a caption: "A blue, a blue card"' in caplog.text
    assert "1 picture has a caption that already begins with data.caption_prefix: " in caplog.text


def test_a_batch_larger_than_an_epoch_is_noticed(load, caplog):
    load(batch_size=4, buckets=False)
    several = "4 pictures are in a batch several times, as an epoch has fewer than data.batch_size="
    assert several not in caplog.text
    load(batch_size=5, buckets=False)
    assert f"{several}5" in caplog.text


def test_tables_that_are_called_otherwise_are_named(pictures, load, caplog):
    (pictures / "metadata.csv").write_text("file_name,text\nred.png,listed\n")
    for name in ("captions.csv", "train.JSONL"):
        (pictures / name).write_text("file_name,text\n")
    assert "listed" in [sample.caption for sample in load().samples]
    (said,) = (message for message in caplog.messages if "tables are ignored" in message)
    assert said.startswith("data: 2 tables are ignored (only metadata.csv and metadata.jsonl are")
