"""Data sets: which pictures are found, which are refused by name, and what a step receives."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image

from trainer.config import SourceConfig
from trainer.data import captions
from trainer.data.buckets import covering
from trainer.errors import UserError


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
    for said in ("broken.png", "short.png", "gone.png", "3 unreadable, 0 without a caption"):
        assert said in caplog.text
    assert "trained without a caption" not in caplog.text  # unreadable pictures are not trained on
    with pytest.raises(UserError, match=r"data\.max_unreadable=2"):
        load(max_unreadable=1)


def test_a_missing_caption_is_named_and_handled_as_chosen(load, pictures, caplog):
    (pictures / "red.txt").unlink()
    with pytest.raises(UserError, match=r"1 picture has no \.txt or \.caption.*red\.png"):
        load(on_missing_caption="error")
    (pictures / "blue.png").write_bytes(b"")  # captions are checked before pictures
    with pytest.raises(UserError, match=r"1 picture has no \.txt"):
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
    with pytest.raises(UserError, match="no picture of 1 can be used"):
        load(path=str(empty))


CAPTIONS = [
    # bytes, the caption or a part of the error message
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
    for paths, count, both in (
        ([part, whole, part], "1 picture is", (part, part)),
        ([whole, part], "", ()),  # what is in `part` is its own
        ([part, alias], "1 picture is", (part, alias)),
        ([whole, alias], "5 pictures are", (whole, alias)),
        ([whole, whole], "5 pictures are", (whole, whole)),
        ([whole], "", ()),
    ):
        caplog.clear()
        load(path=None, sources=[SourceConfig(path=path) for path in paths])
        said = [line for line in caplog.messages if "trained on twice" in line]
        where = " and ".join(f"once in {path}" for path in both)
        says = f"data: {count} trained on twice, {where}: "
        assert [line.startswith(says) for line in said] == ([True] if both else [])


def test_pictures_that_a_link_leads_to_again_are_named(load, pictures, caplog):
    (pictures / "sub").mkdir()
    shutil.copy(pictures / "red.png", pictures / "sub/red.png")
    load()
    assert "several paths" not in caplog.text
    (pictures / "tub").symlink_to(pictures / "sub")
    assert len(load().samples) == 6
    assert "1 picture is found by several paths (links), and trained on once" in caplog.text


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


def test_a_separator_in_a_caption_marks_the_tags_that_keep_their_places(options):
    caption = "1girl, solo ||| hat, dress, sky ||| masterpiece"
    config = dataclasses.replace(options, keep_separator="|||", caption_prefix="sks")
    assert captions.variants(caption, config, frame=False) == [
        "1girl, solo, hat, dress, sky, masterpiece"
    ]
    assert captions.framed(caption, config) == "sks 1girl, solo, hat, dress, sky, masterpiece"
    config = dataclasses.replace(config, shuffle_tags=True, tag_dropout=0.5, caption_variants=200)
    lists = [text.split(", ") for text in captions.variants(caption, config, frame=False)]
    assert all(found[:2] == ["1girl", "solo"] and found[-1] == "masterpiece" for found in lists)
    middles = {tuple(found[2:-1]) for found in lists}
    assert len(middles) == 1 + 3 + 6 + 6  # all ordered choices of three tags
    assert captions.variants("a, b", config, frame=False) != ["a, b"] * 200  # has no separator


def test_a_separator_that_no_caption_contains_is_remarked(load, pictures, caplog):
    load(keep_separator="|||")
    assert "data.keep_separator=||| has no effect: no caption contains it" in caplog.text
    caplog.clear()
    (pictures / "red.txt").write_text("sks ||| a, b")
    load(keep_separator="|||")
    assert "keep_separator" not in caplog.text


def test_tags_that_cannot_be_shuffled_are_remarked(load, pictures, caplog):
    (pictures / "red.txt").write_text("one; two")
    load(shuffle_tags=True)
    assert "data.shuffle_tags=true has no effect" in caplog.text
    caplog.clear()
    load(shuffle_tags=True, tag_separator=";")
    assert "no effect" not in caplog.text
    load(shuffle_tags=True, tag_separator=";", keep_tokens=1)
    assert "data.shuffle_tags=true has no effect" in caplog.text


def test_tags_of_which_none_may_be_dropped_are_remarked(load, pictures, caplog):
    load(tag_dropout=0.5)
    assert "no effect" not in caplog.text
    load(tag_dropout=0.5, keep_tokens=1)
    assert "data.tag_dropout=0.5 has no effect: no caption has a tag" in caplog.text


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
    assert len(dataset.held_out) == 6  # three pictures in two resolutions
    assert len(dataset.own) == 2  # the fourth in two resolutions
    seen = {pick.sample for number in range(60) for pick in dataset.batch(0, number)}
    assert seen == {*dataset.own, 4, 9}
    alone = load(holdout=3)
    held_out = [alone.samples[i].name for i in alone.held_out]
    assert held_out == [dataset.samples[i].name for i in dataset.held_out[:3]]
    with pytest.raises(UserError, match=r"data\.holdout=4: there are 4 different pictures"):
        load(holdout=4)


def test_crops_are_spread_from_edge_to_edge_with_their_own_size_conditioning(load, pictures):
    gradient = Image.linear_gradient("L").resize((70, 100)).rotate(90, expand=True)  # 100 x 70
    gradient.convert("RGB").save(pictures / "blue.png")
    plain, cropped = load(), load(crops=3)
    blue, *views = [cropped.samples[row] for row in (0, *cropped.views[0])]
    assert [view.time_ids[2:4] for view in views] == [(0, 0), (0, 13), (0, 27)]
    assert [view.fit.place for view in views] == [0.0, 0.5, 1.0]
    assert views[1] is blue
    means = [view.read_pixels().mean() for view in views]
    assert len({*map(float, means)}) == 3
    assert means == sorted(means) or means[::-1] == sorted(means)
    assert means[0] + means[2] - 2 * means[1] == pytest.approx(0, abs=0.02)
    assert torch.equal(blue.read_pixels(), plain.samples[0].read_pixels())
    drawn = Counter(pick.sample for n in range(3000) for pick in cropped.batch(0, n))
    assert drawn.keys() == {row for rows in cropped.views.values() for row in rows}
    assert [drawn[row] / drawn[0] for row in cropped.views[0]] == pytest.approx([1] * 3, rel=0.2)
    assert cropped.fingerprint != plain.fingerprint


def test_an_even_number_of_crops_leaves_out_the_centre_except_where_it_is_evaluated(load):
    cropped = load(crops=2)
    assert cropped.own == [0, 1, 2, 3]
    assert not {0, 1, 2, 3} & {row for rows in cropped.views.values() for row in rows}


@pytest.mark.parametrize(("excess", "places"), [(0, [0.5]), (7, [0.5]), (8, [0, 1]), (40, 5)])
def test_crops_are_at_least_a_cell_of_the_latent_apart(excess, places):
    of_five = [0, 0.25, 0.5, 0.75, 1]
    tall = covering((64 + excess, 64), (64, 64))
    assert tall.places(5) == (of_five if places == 5 else places)
    assert tall.places(1) == [0.5]


def test_crops_that_no_picture_has_are_told(load, caplog):
    load(crops=3, buckets=True, bucket_step=8)
    assert "data.crops=3 has no effect" not in caplog.text
    load(crops=3, max_unreadable=4, resolution=8)
    assert "data.crops=3 has no effect: no crop cuts off 8 pixels or more" in caplog.text


def test_the_mirror_image_of_a_crop_is_conditioned_on_its_own_place(load):
    both = load(crops=3, random_flip=True)
    views = [both.samples[row] for row in both.views[0]]
    assert [(v.mirrored, v.time_ids[3]) for v in views] == [
        *((True, 27), (True, 14), (True, 0)),
        *((False, 0), (False, 13), (False, 27)),
    ]
    for mirrored, plain in zip(views[:3], views[3:], strict=True):
        assert torch.equal(mirrored.read_pixels(), plain.read_pixels().flip(-1))


def mirrors_of(dataset):
    """{a sample: its mirror image} with `random_flip`."""
    return {row: mirror for row, (mirror, same) in dataset.views.items() if same == row}


def test_a_random_flip_trains_on_the_mirror_image_half_of_the_time(load):
    plain, flipping = load(), load(random_flip=True)
    assert plain.views == {row: [row] for row in range(4)}
    mirrors = mirrors_of(flipping)
    for row in range(4):
        mirror = flipping.samples[mirrors[row]]
        assert torch.equal(mirror.read_pixels(), plain.samples[row].read_pixels().flip(-1))
        assert mirror.captions == plain.samples[row].captions
    drawn = [pick.sample for n in range(2000) for pick in flipping.batch(0, n)]
    of_plain = [pick.sample for n in range(2000) for pick in plain.batch(0, n)]
    original = {mirror: row for row, mirror in mirrors.items()}
    assert [original.get(row, row) for row in drawn] == of_plain
    assert sum(row in original for row in drawn) / len(drawn) == pytest.approx(0.5, abs=0.05)
    assert flipping.fingerprint != plain.fingerprint


def test_mirror_images_are_neither_drawn_nor_evaluated_nor_held_out(load):
    flipping = load(random_flip=True, holdout=1)
    assert len(flipping.samples) == 4 + 3
    assert flipping.own == flipping.shown == sorted(flipping.views)
    assert not any(flipping.samples[i].mirrored for i in flipping.held_out)
    assert flipping.plan.pictures_per_epoch == 3


def test_the_mask_of_a_mirror_image_is_mirrored(load, pictures):
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(pictures / "red.png")
    flipping = load(random_flip=True, mask="alpha")
    (row,) = (i for i in flipping.views if flipping.samples[i].name.endswith("red.png"))
    mask = flipping.samples[row].read_mask()
    assert mask[0, 0, 0] == 0
    assert torch.equal(flipping.samples[mirrors_of(flipping)[row]].read_mask(), mask.flip(-1))
