"""Data sets: what is found, what is refused by name, and what of it a step is given."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from trainer.config import SourceConfig
from trainer.data import captions
from trainer.errors import UserError


def names(dataset):
    return [sample.name.rpartition("/")[2] for sample in dataset.samples]


def test_pictures_come_in_the_order_of_their_names_with_captions(load):
    samples = load().samples
    assert [s.caption for s in samples] == [
        "a blue card",
        "a green card",
        "a red card",
        "a yellow card",
    ]
    red = samples[2].read_pixels()
    assert red.shape == (3, 64, 64)
    assert torch.equal(red[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize(
    ("time_ids", "expected"),
    [
        ("original", (70, 100, 0, 13, 64, 64)),
        ("resized", (64, 91, 0, 13, 64, 64)),
        ("bucket", (64, 64, 0, 0, 64, 64)),
    ],
)
def test_time_ids_are_height_width_crop_target(load, time_ids, expected):
    blue = load(time_ids=time_ids).samples[0]  # 100 x 70
    assert blue.time_ids == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "red.txt").write_text("another"),
        lambda folder: Image.new("RGB", (80, 70), "pink").save(folder / "red.png"),
        lambda folder: (folder / "red.png").rename(folder / "z.png"),
        lambda folder: (folder / "metadata.jsonl").write_text('{"file_name":"red.png","weight":2}'),
    ],
    ids=["caption", "pixels", "order", "weight"],
)
def test_the_fingerprint_knows_pictures_captions_order_and_weights(load, pictures, change):
    before = load().fingerprint
    assert load().fingerprint == before
    assert load(resolution=56).fingerprint != before
    change(pictures)
    assert load().fingerprint != before


def test_an_unreadable_picture_is_named_counted_and_skipped_up_to_the_limit(load, pictures, caplog):
    (pictures / "broken.png").write_bytes(b"<html>not a picture</html>")
    (pictures / "short.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    caplog.set_level("INFO")
    assert len(load(max_unreadable=3).samples) == 4
    for said in ("broken.png", "short.png", "gone.png", "3 unreadable"):
        assert said in caplog.text
    with pytest.raises(UserError, match=r"data\.max_unreadable=2"):
        load(max_unreadable=1)


def test_a_missing_caption_is_named_and_handled_as_chosen(load, pictures, caplog):
    (pictures / "red.txt").unlink()
    with pytest.raises(UserError, match=r"1 pictures have no \.txt or \.caption.*red\.png"):
        load(on_missing_caption="error")
    (pictures / "blue.png").write_bytes(b"")  # which is not even looked at before
    with pytest.raises(UserError, match=r"1 pictures have no \.txt"):
        load(on_missing_caption="error", max_unreadable=0)
    shutil.copy(pictures / "green.png", pictures / "blue.png")
    assert [s.caption for s in load(on_missing_caption="empty").samples][2] == ""
    assert "red.png" in caplog.text
    assert len(load(on_missing_caption="skip").samples) == 3


def test_an_empty_folder_and_a_folder_of_nothing_usable_are_refused(load, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        load(path=str(empty))
    (empty / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none can be used"):
        load(path=str(empty))


CAPTIONS = [
    # bytes, what they say or a part of the complaint
    ("ein rötes\nKarte 🟥".encode(), "ein rötes Karte 🟥"),
    ("\ufeffein rötes\r\nКарточка 🟥".encode(), "ein rötes Карточка 🟥"),
    ("\ufeffzwei\r\nZeilen 🟥".encode("utf-16-le"), "zwei Zeilen 🟥"),
    ("\ufeffzwei\nZeilen".encode("utf-16-be"), "zwei Zeilen"),
    (b"", ""),
    (b" \r\n", ""),
    (b"word " * 10_000, ("word " * 10_000).strip()),
    (b"caf\xe9", r"red\.txt is not UTF-8.*at byte 3"),
    (b"a\x92b", r"red\.txt is not UTF-8.*at byte 1"),
    ("é\0b".encode(), r"red\.txt has a NUL character at byte 2"),
    ("no mark".encode("utf-16-le"), r"red\.txt has a NUL character at byte 1"),
    (b"\xff\xfea", r"red\.txt is not UTF-16.*at byte 2"),
]


@pytest.mark.parametrize(("content", "says"), CAPTIONS, ids=lambda x: repr(x)[:24])
def test_captions_are_read_as_what_they_are_or_refused_by_name(load, pictures, content, says):
    (pictures / "red.txt").write_bytes(content)
    if says.startswith("red"):
        with pytest.raises(UserError, match=says):
            load()
    else:
        assert load().samples[2].caption == says


def test_captions_and_names_do_not_depend_on_the_locale(tmp_path):
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    Image.new("RGB", (64, 64), "red").save(tmp_path / "höhe 名.png")
    (tmp_path / "höhe 名.txt").write_bytes("ein Bär 🐻".encode())
    program = (
        "import sys; from trainer.data import items, sources; from pathlib import Path; "
        "reading = items.Reading(extensions=['.txt']); "
        "(item,) = sources.find(Path(sys.argv[1]), reading); "
        "print(item.captions()[0].encode(), len(item.read()), item.name.encode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    size = (tmp_path / "höhe 名.png").stat().st_size
    name = str(tmp_path / "höhe 名.png").encode()
    assert done.stdout.strip() == f"{'ein Bär 🐻'.encode()} {size} {name}"


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
    assert "passed over" in caplog.text
    assert "1 links to a folder above" in caplog.text


PASSED_OVER = {
    # files beside the four pictures, what is said of them
    "a.tar.gz b.tgz c.ZIP": "3 archives are passed over",
    "a.svg b.NEF c.mpo": "3 pictures of a kind that is not read",
    "gas.mask.png red.mask.jpg": "2 masks are of no picture",
    "gas.txt gas.caption sub/red.txt": "3 caption files are beside no picture",
    ".red.png .cache/a/b/red.png .x/red.jpg": "3 hidden pictures, or folders of them,",
    # and those that nothing is said of
    "README.txt LICENSE.txt ._red.png .git/config .hidden.txt red.mask.png notes.md": None,
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


def test_a_mask_or_hidden_picture_that_metadata_lists_is_a_picture(load, pictures, caplog):
    for name in ("gas.mask.png", ".hidden.png", "n"):
        shutil.copy(pictures / "red.png", pictures / name)
    lines = [
        {"file_name": "gas.mask.png", "text": "gas"},
        {"file_name": ".hidden.png", "text": "hidden"},
        {"file_name": "red.png", "mask": "n"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (pictures / ".hidden.txt").write_text("unread")
    assert names(load())[:1] == [".hidden.png"]
    assert "gas.mask.png" in names(load())
    assert "data: " not in caplog.text
    assert "1 pictures have a text file that their metadata disagrees with" in caplog.text


def test_what_lies_beside_a_picture_elsewhere_is_read_too(load, pictures, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("L", (80, 70), 0).save(pictures / "red.mask.png")
    lines = [{"file_name": "../pictures/red.png"}, {"file_name": f"{pictures}/blue.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    blue, red = load(path=str(folder), mask="file").samples
    assert (blue.caption, red.caption) == ("a blue card", "a red card")
    assert (red.read()[1] == 0).all()


@pytest.mark.parametrize("suffix", ["tga", "PPM", "jp2", "avif", "dds", "pcx", "qoi", "ico"])
def test_every_kind_of_picture_that_pillow_opens_is_one(load, pictures, suffix):
    image = Image.open(pictures / "red.png")
    image.save(pictures / f"x.{suffix}", **({"sizes": [(64, 64)]} if suffix == "ico" else {}))
    (pictures / f"x.{suffix}").with_suffix(".txt").write_text("a card")
    assert len(load(max_unreadable=0).samples) == 5


def test_data_without_a_picture_tells_what_is_there_instead(load, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"has no pictures; 1 archives are passed over.*0\.tar\.gz"):
        load(path=str(tmp_path / "shards"))


def test_only_regular_files_are_opened(load, pictures, caplog, monkeypatch):
    for name in ("pipe.png", "red.mask.png", "pipe.txt", "blue.mask.png"):
        os.mkfifo(pictures / name)
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(pictures)  # for its name must be short
        made.bind("socket.jpg")
    (pictures / "device.png").symlink_to("/dev/zero")
    dataset = load(mask="file", max_unreadable=5)
    assert names(dataset) == ["green.png", "yellow.png"]
    for name in ("pipe.png", "red.png", "blue.png", "socket.jpg", "device.png"):
        assert re.search(rf"unreadable picture \S*{name}: .*is no regular file", caplog.text)
    for name in ("metadata.jsonl", "shard.tar", "table.parquet"):
        os.mkfifo(pictures / name)
        with pytest.raises(UserError, match=rf"{name}.* is no regular file"):
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
    assert said[0].startswith("data: 2 folders of runs are passed over")
    assert len(load(path=str(folder)).samples) == 1  # which was asked for


def test_both_kinds_of_sidecars_are_found_and_one_kind_can_be_chosen(load, pictures, caplog):
    (pictures / "red.txt").rename(pictures / "red.caption")
    (pictures / "blue.caption").write_text("unread")
    assert [s.caption for s in load().samples] == [
        "a blue card",
        "a green card",
        "a red card",
        "a yellow card",
    ]
    assert "1 pictures have a .caption beside their .txt; it is not read: " in caplog.text
    chosen = load(caption_extension=".caption", on_missing_caption="skip")
    assert [s.caption for s in chosen.samples] == ["unread", "a red card"]


@pytest.mark.parametrize("extension", [".txt", ".TXT", [".caption", ".Txt", ".txt"]])
def test_the_case_of_a_text_files_ending_does_not_matter(load, pictures, caplog, extension):
    (pictures / "red.txt").rename(pictures / "red.TXT")
    (pictures / "red.png").rename(pictures / "red.PNG")
    dataset = load(caption_extension=extension, on_missing_caption="error")
    assert dataset.samples[2].caption == "a red card"
    assert "not read" not in caplog.text
    (pictures / "blue.TXT").write_text("another")
    first = load(caption_extension=extension).samples[0].caption
    assert first == ("another" if extension == ".TXT" else "a blue card")
    assert "it is not read" in caplog.text


def test_metadata_gives_captions_weights_and_masks(load, pictures):
    Image.new("L", (80, 70), 0).save(pictures / "m.mask.png")
    lines = [
        {"file_name": "red.png", "text": "one\nline", "weight": 0.5, "mask": "m.mask.png"},
        {"file_name": "blue.png", "captions": ["first", "second"]},
        {"file_name": "green.png", "caption": ""},
    ]
    text = "\n\n".join(json.dumps(line) for line in lines)
    (pictures / "metadata.jsonl").write_text(text)
    blue, green, red, yellow = load(mask="file").samples
    assert blue.captions == ("first", "second")
    assert (green.caption, red.caption, yellow.caption) == ("", "one line", "a yellow card")
    assert (red.loss_weight, blue.loss_weight) == (0.5, 1.0)
    assert (red.read()[1] == 0).all()
    assert (blue.read()[1] == 1).all()


@pytest.mark.parametrize(
    ("text", "is_noted"),
    [
        (b"metadata says other", False),
        (b"metadata\nsays other\n", False),
        (b"x", True),
        (b"\xff", True),
    ],
)
def test_a_text_file_that_metadata_overrules_is_noted(load, pictures, caplog, text, is_noted):
    (pictures / "red.txt").write_bytes(text)
    lines = [
        {"file_name": "red.png", "text": "metadata says other"},
        {"file_name": "blue.png", "weight": 1},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load().samples[2].caption == "metadata says other"
    said = "1 pictures have a text file that their metadata disagrees with; it is not read: "
    assert (said in caplog.text) == is_noted


def test_a_text_file_of_two_pictures_is_noted(load, pictures, caplog):
    Image.new("RGB", (64, 64)).save(pictures / "red.jpg")
    assert [s.caption for s in load().samples].count("a red card") == 2
    assert "2 pictures have a .txt that is another picture's too, of the same name: " in caplog.text


def test_a_metadata_csv_says_the_same_as_a_jsonl(load, pictures):
    Image.new("L", (80, 70), 0).save(pictures / "m.mask.png")
    (pictures / "metadata.csv").write_text(
        'file_name,text,weight,mask\r\nred.png,"one, two",0.5,m.mask.png\r\nblue.png,three,,\r\n'
    )
    blue, _, red, yellow = load(mask="file").samples
    assert (blue.caption, red.caption, yellow.caption) == ("three", "one, two", "a yellow card")
    assert (blue.loss_weight, red.loss_weight) == (1.0, 0.5)
    assert (red.read()[1] == 0).all()


@pytest.mark.parametrize("named", ["../b.png", "{folder}/b.png", "../../data/link/../b.png"])
@pytest.mark.parametrize("start", [".", "../data", "{folder}", "../alias"])
def test_a_picture_is_one_by_whatever_path_metadata_lists_it(
    load, pictures, tmp_path, monkeypatch, named, start
):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").mkdir()
    (tmp_path / "alias").symlink_to(folder)
    shutil.copy(pictures / "red.png", folder / "b.png")
    shutil.copy(pictures / "blue.png", folder / "sub/a.png")
    line = {"file_name": named.format(folder=folder), "text": "the b"}
    (folder / "sub/metadata.jsonl").write_text(json.dumps(line))
    monkeypatch.chdir(folder)
    dataset = load(path=start.format(folder=folder))
    assert [s.caption for s in dataset.samples] == ["the b", ""]
    assert names(dataset) == ["b.png", "a.png"]
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png"}')
    with pytest.raises(UserError, match="listed for the second time"):
        load(path=start.format(folder=folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text,prompt\nred.png,x,one\nblue.png,y,"),
        (
            "metadata.jsonl",
            '{"file_name": "red.png", "text": "x", "prompt": "one"}\n{"file_name": "blue.png"}',
        ),
    ],
)
def test_the_column_of_captions_can_be_named_in_metadata(load, pictures, name, text):
    (pictures / name).write_text(text)
    blue, _, red, yellow = load(caption_column="prompt").samples
    assert [s.caption for s in (red, blue, yellow)] == ["one", "a blue card", "a yellow card"]
    says = r"data\.caption_column=promt; there is file_name, text, prompt$"
    with pytest.raises(UserError, match=says):
        load(caption_column="promt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file_name,text\nred.png,a, b", r"metadata\.csv, line 2: it has more cells .* quotes"),
        ("name,text\nred.png,a", r"line 2: it has no \"file_name\""),
        ("file_name,weight\nred.png,much", r"red\.png: its weight is 'much'"),
        ("file_name\nred.png\nred.png", r"red\.png is listed for the second time"),
    ],
)
def test_a_bad_metadata_csv_is_refused_by_its_line(load, pictures, text, says):
    (pictures / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        load()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"metadata\.jsonl, line 2: it is not JSON"),
        ("[]", r"line 2: it has no \"file_name\""),
        ('{"file_name": "red.png", "text": 3}', r"red\.png: its caption is 3"),
        ('{"file_name": "red.png", "weight": -1}', r"red\.png: its weight is -1"),
        ('{"file_name": "red.png", "mask": 1}', r"line 2: \"mask\" is not the name"),
    ],
)
def test_bad_metadata_is_refused_by_its_line(load, pictures, line, says):
    (pictures / "metadata.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=says):
        load()


def test_a_picture_that_only_metadata_knows_is_unreadable(load, pictures, caplog):
    (pictures / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    assert len(load().samples) == 4
    assert "gone.png" in caplog.text


def test_several_sources_have_repeats_weights_and_captions_of_their_own(load, pictures, tmp_path):
    prior = tmp_path / "prior"
    prior.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64), "gray").save(prior / f"{name}.png")
    (prior / "a.txt").write_text("a dog")
    dataset = load(
        path=None,
        sources=[
            SourceConfig(path=str(prior), weight=0.5, prior=True, caption="any"),
            SourceConfig(path=str(pictures), repeats=3),
        ],
        caption_prefix="sks,",
        caption_suffix="!",
    )
    assert [s.caption for s in dataset.samples] == [
        *(f"sks, a {colour} card !" for colour in ("blue", "green", "red", "yellow")),
        "a dog",
        "any",
    ]
    assert [s.loss_weight for s in dataset.samples] == [1, 1, 1, 1, 0.5, 0.5]
    assert dataset.own == [0, 1, 2, 3]
    epoch = Counter(p.sample for n in range(14) for p in dataset.batch(0, n))
    assert epoch == {0: 3, 1: 3, 2: 3, 3: 3, 4: 1, 5: 1}


def test_pictures_of_two_sources_are_named_with_both(load, pictures, tmp_path, caplog):
    (pictures / "sub").mkdir()
    shutil.copy(pictures / "red.png", pictures / "sub/red.png")
    (tmp_path / "alias").symlink_to(pictures)
    whole, part, alias = str(pictures), f"{pictures}/sub", f"{tmp_path}/alias"
    for paths, says in (
        ([whole, part], f"data: 1 pictures of {whole} are of {part} too, and trained on for both"),
        ([part, alias], f"data: 1 pictures of {part} are of {alias} too"),
        ([whole, alias], f"data: 5 pictures of {whole} are of {alias} too"),
        ([whole, whole], f"data: 5 pictures of {whole} are of {whole} too"),
        ([whole], None),
    ):
        caplog.clear()
        load(path=None, sources=[SourceConfig(path=path) for path in paths])
        said = [line for line in caplog.messages if "trained on for both" in line]
        assert [line.startswith(says) for line in said] == ([True] if says else [])


def test_shuffled_and_thinned_captions_keep_their_first_tags_and_need_no_seed(options):
    config = dataclasses.replace(
        options, shuffle_tags=True, tag_dropout=0.3, keep_tokens=2, caption_variants=1000
    )
    tags = ["1girl", "solo", "hat", "dress", "sky", "sea"]
    drawn = captions.variants(", ".join(tags), config, frame=True)
    assert drawn == captions.variants(", ".join(tags), config, frame=False)
    assert len(drawn) == 1000
    lists = [text.split(", ") for text in drawn]
    assert all(found[:2] == tags[:2] and len({*found}) == len(found) for found in lists)
    kept = Counter(tag for found in lists for tag in found[2:])
    for tag in tags[2:]:
        assert kept[tag] / 1000 == pytest.approx(0.7, abs=0.05)
    assert len({tuple(found) for found in lists if len(found) == 6}) == 24  # all orders
    unchanged = dataclasses.replace(config, shuffle_tags=False, tag_dropout=0.0)
    assert captions.variants("a,  b", unchanged, frame=False) == ["a,  b"]


def test_a_step_draws_captions_of_which_all_were_announced(load, pictures):
    (pictures / "red.txt").write_text("a, b, c, d, e")
    line = {"file_name": "blue.png", "captions": ["first", "second"]}
    (pictures / "metadata.jsonl").write_text(json.dumps(line))
    dataset = load(shuffle_tags=True, caption_variants=5, caption_dropout=0.25, batch_size=4)
    announced = dataset.all_captions()
    assert len(announced) == len({*announced})
    picks = [pick for number in range(300) for pick in dataset.batch(7, number)]
    drawn = Counter(pick.caption for pick in picks)
    assert drawn[None] / len(picks) == pytest.approx(0.25, abs=0.04)
    assert {*drawn} - {None} <= {*announced}
    assert drawn["first"] == pytest.approx(drawn["second"], abs=40)
    reds = {pick.caption for pick in picks if pick.sample == 2 and pick.caption}
    assert reds == {*dataset.samples[2].captions}
    assert len(reds) > 3
    assert dataset.batch(7, 5) == dataset.batch(7, 5) == picks[20:24]
    assert dataset.batch(8, 5) != picks[20:24]


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_and_of_all_captions(load, dropout):
    dataset = load(caption_dropout=dropout, batch_size=4)
    dropped = {p.caption is None for n in range(50) for p in dataset.batch(0, n)}
    assert dropped == {dropout == 1.0}


def test_held_out_pictures_are_in_no_batch_whatever_their_source(load, pictures, tmp_path):
    prior = tmp_path / "prior"
    prior.mkdir()
    Image.new("RGB", (64, 64), "gray").save(prior / "a.png")
    sources = [
        SourceConfig(path=f"{pictures}/", repeats=2),
        SourceConfig(path=str(prior), prior=True),
    ]
    dataset = load(path=None, sources=sources, holdout=3, resolutions=[64, 56])
    assert len(dataset.held_out) == 6  # three pictures, twice
    assert len(dataset.own) == 2  # the fourth, twice
    seen = {pick.sample for number in range(60) for pick in dataset.batch(0, number)}
    assert seen == {*dataset.own, 4, 9}
    alone = load(holdout=3)
    held_out = [alone.samples[i].name for i in alone.held_out]
    assert held_out == [dataset.samples[i].name for i in dataset.held_out[:3]]
    with pytest.raises(UserError, match=r"data\.holdout=4: there are 4 different pictures"):
        load(holdout=4)
