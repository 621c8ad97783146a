"""metadata.jsonl and metadata.csv: captions, weights and masks by file name."""

import json
import shutil
import unicodedata

import pytest
from helpers import names
from PIL import Image

from trainer.errors import UserError


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
    assert "1 picture has a text file that contradicts its metadata" in caplog.text


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
    assert (red.read_mask() == 0).all()
    assert (blue.read_mask() == 1).all()


@pytest.mark.parametrize("there", ["NFC", "NFD"])
def test_names_are_the_same_in_any_unicode_normalisation(load, pictures, caplog, there):
    """Mac archives spell café with five characters, editors with four."""
    here = {"NFC": "NFD", "NFD": "NFC"}[there]
    named, written = (unicodedata.normalize(form, "café") for form in (there, here))
    for path in pictures.iterdir():
        path.unlink()
    for name in (f"{named}.png", f"b{named}.png"):
        Image.new("RGB", (64, 64)).save(pictures / name)
    Image.new("L", (64, 64)).save(pictures / f"{written}.mask.png")
    (pictures / f"{written}.txt").write_text("beside")
    Image.new("L", (64, 64)).save(pictures / f"c{named}.png")
    line = {"file_name": f"b{written}.png", "text": "listed", "mask": f"c{written}.png"}
    (pictures / "metadata.jsonl").write_text(json.dumps(line))
    samples = load(mask="file").samples
    assert sorted(sample.caption for sample in samples) == ["beside", "listed"]
    assert all(sample.mask_key for sample in samples)
    assert [line for line in caplog.messages if line.startswith("data: ")] == [
        f"data: 1 picture is named as a mask by metadata, and not trained on (list it there to "
        f"train on it): {pictures}/c{named}.png"
    ]


@pytest.mark.parametrize("mask", ["none", "file"])
def test_a_picture_that_metadata_names_as_a_mask_is_not_trained_on(load, pictures, caplog, mask):
    (pictures / "sub").mkdir()
    for name, width in ("m.png", 80), ("sub/0001.png", 100):
        Image.new("L", (width, 70), 0).save(pictures / name)
    lines = [
        {"file_name": "red.png", "mask": "sub/../m.png"},
        {"file_name": "blue.png", "mask": "sub/0001.png"},
        {"file_name": "green.png", "mask": "green.png"},  # a picture as well
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert names(load(mask=mask)) == ["blue.png", "green.png", "red.png", "yellow.png"]
    said = [line for line in caplog.messages if "as a mask by metadata" in line]
    assert len(said) == 1
    assert said[0].startswith("data: 2 pictures are named as a mask")


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
    said = "1 picture has a text file that contradicts its metadata; it is ignored: "
    assert (said in caplog.text) == is_noted


def test_a_metadata_csv_says_the_same_as_a_jsonl(load, pictures):
    Image.new("L", (80, 70), 0).save(pictures / "m.mask.png")
    (pictures / "metadata.csv").write_text(
        'file_name,text,weight,mask\r\nred.png,"one, two",0.5,m.mask.png\r\nblue.png,three,,\r\n'
    )
    blue, _, red, yellow = load(mask="file").samples
    assert (blue.caption, red.caption, yellow.caption) == ("three", "one, two", "a yellow card")
    assert (blue.loss_weight, red.loss_weight) == (1.0, 0.5)
    assert (red.read_mask() == 0).all()


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
    with pytest.raises(UserError, match="listed twice"):
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
    says = r"data\.caption_column=promt; it has file_name, text, prompt$"
    with pytest.raises(UserError, match=says):
        load(caption_column="promt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file_name,text\nred.png,a, b", r"metadata\.csv, line 2: it has more cells .* quotes"),
        ("name,text\nred.png,a", r"line 2: it has no \"file_name\""),
        ("file_name,weight\nred.png,much", r"red\.png: its weight is 'much'"),
        ('file_name,text\nred.png,"a b\nblue.png,c', r"from line 2 on: .*; is a quote unclosed\?"),
        ("file_name\nred.png\nred.png", r"red\.png is listed twice"),
        ("file_name;text\nred.png;a", r"metadata\.csv: .* separated by ';'; .* by commas"),
        ("file_name\ttext\nred.png\ta", r"metadata\.csv: .* separated by '\\t'; .* by commas"),
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
        ('{"file_name": "red.png", "weight": true}', r"red\.png: its weight is True"),
        ('{"file_name": "red.png", "mask": 1}', r"line 2: \"mask\" is not the name"),
    ],
)
def test_bad_metadata_is_refused_by_its_line(load, pictures, line, says):
    (pictures / "metadata.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=says):
        load()


def test_a_run_is_refused_for_the_first_of_many_bad_lines_and_says_who_names_them(load, pictures):
    (pictures / "metadata.jsonl").write_text("{\n[]\n")
    with pytest.raises(
        UserError, match=r"line 1: .*, or leave it out \(and 1 more .*doctor` lists"
    ):
        load(max_unreadable=9)


@pytest.mark.parametrize(
    ("name", "says"), [("gone.png", "No such file"), ("sub", "sub is a folder")]
)
def test_a_picture_that_only_metadata_knows_is_unreadable_and_its_line_is_named(
    load, pictures, cache, caplog, name, says
):
    (pictures / "sub").mkdir()
    (pictures / "metadata.jsonl").write_text(f'\n{{"file_name": "{name}", "text": "x"}}')
    assert len(load(cache=str(cache)).samples) == 4
    (said,) = [line for line in caplog.messages if line.startswith("skipped unreadable")]
    assert says in said
    assert said.endswith(f"(named in {pictures}/metadata.jsonl, line 2)")
