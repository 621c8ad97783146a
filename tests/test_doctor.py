"""`python -m trainer.doctor`: its findings, and its exit status for scripts."""

import io
import json
import re
import shutil
import sys
import tarfile

import pytest
from PIL import Image

from trainer import doctor
from trainer.config import ASSETS


@pytest.fixture
def examine(in_tmp, monkeypatch, capfd):
    """Run the command in this process: examine("data=folder") -> (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer.doctor", *arguments])
        with pytest.raises(SystemExit) as leaving:
            doctor.main()
        captured = capfd.readouterr()
        return leaving.value.code, captured.out, captured.err

    return call


@pytest.fixture
def folder(pictures):
    return ["data=folder", f"data.path={pictures}", "data.resolution=64", "data.bucket_step=8"]


def test_a_preset_needs_no_model(examine, pictures):
    status, out, _ = examine("experiment=sdxl_lora", f"data.path={pictures}")
    assert status == 1  # for four small pictures
    assert "a run with these options: 2000 steps, 500 epochs" in out
    _, _, err = examine("experiment=sdxl_lora", f"data.path={pictures}", "data.cache=cache")
    assert "model.path has no value" in err


def test_one_of_a_kind_is_not_said_in_the_plural(examine, pictures, folder):
    for path in pictures.iterdir():
        if path.stem != "red":
            path.unlink()
    prior = f"data.sources=[{{path: {pictures}, weight: 2}}]"
    _, out, _ = examine(*folder[:1], *folder[2:], prior, "schedule.steps=1")
    for line in (
        "1 picture, 1 of them usable",
        f"  {pictures}: 1 picture, weight 2",
        "an epoch: 1 picture, 1 batch; its duration is unknown (--images-per-second)",
        "a run with these options: 1 step, 1 epoch",
    ):
        assert line in out.splitlines()
    assert "every run encodes 1 picture and 2 captions" in out  # with the empty prompt


def test_the_pictures_of_a_run_to_resume_are_checked_with_its_options(examine, folder, in_tmp):
    (in_tmp / "saved").mkdir()
    saved = json.dumps({"overrides": [*folder, "schedule.steps=77"]})
    (in_tmp / "saved/checkpoint.json").write_text(saved)
    _, out, _ = examine("resume=saved")
    assert "a run with these options: 77 steps" in out
    status, _, err = examine("resume=nowhere")
    assert status == 2
    assert "resume=nowhere: there is no checkpoint there" in err


def test_pictures_of_ones_own_with_the_demos_options_are_pointed_out(examine, pictures):
    _, out, _ = examine(f"data.path={pictures}")
    assert out.startswith("data.path is given, but data=emoji24 is chosen")
    _, out, _ = examine("data=folder", f"data.path={pictures}")
    assert "emoji24" not in out


def test_the_shipped_pictures_have_no_problems(examine):
    status, out, err = examine("data.batch_size=8")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "24 pictures, 24 of them usable"
    assert "one bucket of 64 x 64, batches of 8, 3 per epoch" in lines
    assert "every run encodes 24 pictures and 25 captions" in out
    assert "an epoch: 24 pictures, 3 batches; its duration is unknown" in out
    assert "a run with these options: 550 steps, 183 epochs" in out
    assert lines[-1] == "no problems"


@pytest.mark.parametrize(
    ("options", "epochs", "batches"),
    [
        (("data.batch_size=1", "schedule.steps=2"), "0.0833 epochs", "batches of 1, 24 per epoch"),
        (("data.batch_size=7",), "160 epochs", "batches of 7, 3.429 per epoch"),
        (("data.batch_size=24", "schedule.steps=12345"), "12,345 epochs", "of 24, 1 per epoch"),
    ],
)
def test_numbers_of_epochs_and_batches_are_short_and_never_powers_of_ten(
    examine, options, epochs, batches
):
    _, out, _ = examine(*options)
    assert f" steps, {epochs}\n" in out
    assert batches in out


def test_every_problem_is_counted_and_named(examine, pictures, folder):
    (pictures / "broken.png").write_bytes(b"<html>")
    (pictures / "broken.txt").write_text("a broken card")
    (pictures / "red.txt").unlink()
    (pictures / "blue.txt").write_text(" \n")
    (pictures / "green.txt").write_text("word " * 100)
    (pictures / "yellow.txt").write_bytes(b"\xe9")
    shutil.copy(pictures / "red.png", pictures / "twin.png")
    Image.new("RGB", (40, 40)).save(pictures / "small.png")
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    frames[0].save(pictures / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("twin", "small", "moving"):
        (pictures / f"{name}.txt").write_text("a card")
    status, out, _ = examine(*folder)
    assert status == 1
    assert "8 pictures, 6 of them usable" in out
    for problem, name in {
        "1 picture cannot be read": "broken.png: it is not in a picture format",
        "1 caption cannot be decoded": "yellow.txt is not UTF-8",
        "1 picture has no caption": "red.png",
        "1 caption is empty": "blue.png",
        "1 picture is there several times, byte for byte": "red.png = ",
        "1 picture is smaller than its bucket": "small.png: 40 x 40",
        "1 picture has more than one frame": "moving.gif",
        "1 caption is truncated at 75 tokens": "green.png: 100 tokens: word word",
    }.items():
        assert f"PROBLEM: {problem}" in out
        assert name in out.split(problem)[1].splitlines()[1]
    assert out.splitlines()[-1] == "8 kinds of problem"


def test_a_link_to_nothing_is_called_so(examine, pictures, folder):
    (pictures / "gone.png").symlink_to("nowhere.png")
    (pictures / "gone.txt").write_text("a card")
    _, out, _ = examine(*folder)
    assert "gone.png: a link to a file that is not there\n" in out


def test_pictures_of_which_the_crop_leaves_little_are_named_with_the_share(
    examine, pictures, folder
):
    for name, size in {"pan": (800, 100), "tower": (64, 640), "wide": (370, 64)}.items():
        Image.new("RGB", size).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text("a card")
    status, out, _ = examine(*folder)
    assert status == 1
    problem = "PROBLEM: 2 pictures have more than a third of their area cut off to fit a bucket "
    first, second = out.split(f"{problem}(data.max_aspect=4, data.b")[1].splitlines()[1:3]
    assert first.endswith("pan.png: 800 x 100, 50%")
    assert second.endswith("tower.png: 64 x 640, 60%")
    assert "a third" not in examine(*folder, "data.max_aspect=8")[1]


def test_what_is_passed_over_is_a_problem_too(examine, pictures, folder):
    (pictures / "more.tar.gz").write_bytes(b"")
    status, out, _ = examine(*folder)
    assert status == 1
    assert "PROBLEM: 1 archive is ignored" in out
    assert out.splitlines()[-1] == "1 kind of problem"
    (pictures / "more.tar.gz").unlink()
    (pictures / "loop").symlink_to(pictures)
    status, out, _ = examine(*folder)
    assert status == 0
    assert "1 link to a parent folder is ignored: " in out


def test_what_cannot_be_read_at_all_is_named_and_the_rest_examined(examine, pictures, folder):
    content = (pictures / "red.png").read_bytes()
    for name, members in ("good", ["a.png", "a.txt"]), ("cut", ["b.png", "c.png"]):
        with tarfile.open(pictures / f"{name}.tar", "w") as archive:
            for member in members:
                info = tarfile.TarInfo(member)
                info.size = len(content) if member.endswith("png") else 6
                archive.addfile(info, io.BytesIO(content if member.endswith("png") else b"a card"))
    whole = (pictures / "cut.tar").read_bytes()
    (pictures / "cut.tar").write_bytes(whole[: 512 + len(content) // 2])
    lines = ['{"file_name": "red.png", "text": "metadata\'s"}', "{", '{"file_name": 3}']
    lines += ['{"file_name": "blue.png", "weight": -1}', '{"file_name": "green.png", "text": ""}']
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (pictures / "table.parquet").write_bytes(b"PAR1 and no more")
    status, out, err = examine(*folder, "--names=99")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    at = lines.index(
        "PROBLEM: 5 parts of the data (archives, tables, lines of metadata) cannot be read"
    )
    for line, says in zip(
        sorted(lines[at + 1 : at + 6]),
        (
            r"blue\.png: its weight is -1",
            r"cut\.tar cannot be read as an uncompressed tar .*; recreate it, or remove it",
            r"metadata\.jsonl, line 2: it is not JSON: .*; correct it, or leave it out",
            r"metadata\.jsonl, line 3: it has no \"file_name\"; name a picture, or leave it out",
            r"table\.parquet (cannot be read: .*; recreate it|needs the package pyarrow)",
        ),
        strict=True,
    ):
        assert re.search(says, line)
    assert lines[0] == "4 pictures, 4 of them usable"  # red, green, yellow and one in the good tar
    assert "PROBLEM: 1 caption is empty" in lines  # line 5 of the metadata


def test_a_picture_that_cannot_be_read_is_one_problem(examine, pictures, folder):
    (pictures / "broken.png").write_bytes(b"<html>")
    (pictures / "red.txt").unlink()
    status, out, _ = examine(*folder)
    assert status == 1
    assert "PROBLEM: 1 picture cannot be read" in out
    assert "PROBLEM: 1 picture has no caption" in out
    assert out.count("broken.png") == 1


def test_only_so_many_names_are_shown(examine, pictures, folder):
    for path in pictures.glob("*.txt"):
        path.unlink()
    status, out, _ = examine(*folder, "--names", "1")
    assert status == 1
    assert "    ... and 3 more (--names)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere is not a folder"),
        (["data.pth=/x"], "data.pth"),
        (["data=folder", "data.path={empty}"], "has no pictures"),
        (["data=folder", "data.path={broken}"], "no picture of 1 can be used; "),
        (["data=folder", "data.path={captioned}"], "x.png: the file is empty"),
        (["data=folder", "data.path={shards}"], "has no pictures; "),
        (["data=folder", "data.path={shards}/0.tar"], "0.tar cannot be read as an uncompressed"),
        (["--images-per-second", "fast"], "invalid float value"),
    ],
)
def test_what_cannot_be_read_is_status_2_and_one_line(examine, tmp_path, arguments, says):
    paths = {name: tmp_path / name for name in ("empty", "broken", "captioned", "shards")}
    for path in paths.values():
        path.mkdir()
    for name in ("broken/x.png", "captioned/x.png", "shards/0.tar"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "captioned/x.txt").write_text("a card")
    status, out, err = examine(*(a.format(**paths) for a in arguments))
    assert status == 2
    assert says in err.splitlines()[-1]
    assert not out


def test_it_says_what_the_cache_still_needs(examine, quick, pictures, folder, tmp_path):
    cached = [*folder, f"data.cache={tmp_path / 'cache'}"]
    assert "4 of 4 pictures, 5 of 5 captions" in examine(*cached)[1]
    quick("run", *cached, "schedule.steps=1")
    assert "0 of 4 pictures, 0 of 5 captions" in examine(*cached)[1]
    Image.new("RGB", (80, 70), "pink").save(pictures / "red.png")
    (pictures / "blue.txt").write_text("another")
    assert "1 of 4 pictures, 1 of 5 captions" in examine(*cached)[1]
    assert "4 of 4 pictures, 1 of 5 captions" in examine(*cached, "data.resolution=56")[1]


def test_a_models_weights_are_downloaded_only_for_a_caches_sake(
    examine, folder, tmp_path, monkeypatch
):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, [p for p in allow_patterns if "safetensors" in p]))
        return str(ASSETS / "tiny_sdxl")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub = [*folder, "model.path=owner/model", "model.vae=owner/vae"]
    status, _, err = examine(*hub)
    assert (status, err) == (0, "")
    assert asked == [("owner/model", []), ("owner/vae", [])]
    asked.clear()
    assert "4 of 4 pictures" in examine(*hub, f"data.cache={tmp_path / 'cache'}")[1]
    assert all(weights for _, weights in asked)


def test_it_tells_how_long_an_epoch_takes_where_a_speed_is_known(examine, in_tmp):
    _, out, _ = examine("--images-per-second", "0.2")
    assert "an epoch: 24 pictures, 1.5 batches, 2 min 0 s at 0.2 images/s (as given)" in out

    def run(name, path, speed):
        folder = in_tmp / "runs" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"images_per_second": speed}))
        config = {
            "model": {"path": path},
            "method": {"name": "full"},
            "data": {"resolution": 64, "resolutions": [], "batch_size": 16},
        }
        (folder / "config.yaml").write_text(json.dumps(config))

    run("same", f"{ASSETS}/tiny_sdxl", 2.0)
    run("newer, of another model", "/models/sdxl", 9.0)
    assert "0 min 12 s at 2 images/s (runs/same/summary.json)" in examine()[1]


def test_it_draws_the_pictures_as_a_run_would_see_them(examine, pictures, folder, tmp_path):
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (0, 0, 60, 100))  # cropped away by a square bucket
    wide.save(pictures / "aside.png")
    (pictures / "aside.txt").write_text("a card aside")
    sheet = tmp_path / "out/sheet.png"
    status, out, _ = examine(*folder, "data.max_aspect=1", f"--sheet={sheet}")
    assert status == 1
    assert "aside.png: 300 x 100, 67%" in out
    assert f"{sheet}: 5 pictures as a run would see them" in out
    drawn = Image.open(sheet)
    tile = drawn.crop((64, 14, 64 + 96, 14 + 96))  # the first picture
    assert tile.getextrema() == ((255, 255),) * 3
    blue = drawn.getpixel((64 + 96 + 48, 14 + 48))
    assert blue[2] > 200 > 60 > blue[0]
    status, _, err = examine(*folder, "--sheet=sheet")
    assert (status, err) == (2, "error: --sheet sheet: name it .png, .jpg or .webp\n")


def test_it_draws_the_crops_of_a_picture_side_by_side(examine, pictures, folder, tmp_path):
    halves = Image.new("RGB", (128, 64), "lime")
    halves.paste("magenta", (64, 0, 128, 64))
    halves.save(pictures / "aside.png")
    sheet, options = tmp_path / "sheet.png", ("data.buckets=false", "data.crops=2")
    _, out, _ = examine(*folder, *options, "data.random_flip=true", f"--sheet={sheet}")
    assert f"{sheet}: 10 pictures as a run would see them" in out
    left, right = (Image.open(sheet).getpixel((64 + 96 * n + 48, 14 + 48)) for n in (0, 1))
    assert left[1] > 200 > 60 > left[0]
    assert right[0] > 200 > 60 > right[1]
    assert "25 pictures (20 of them other crops or mirror images)" in out


@pytest.mark.parametrize(
    ("sheet", "says"),
    [
        ("pictures/red.png", "already exists"),
        ("pictures/new/sheet.png", "is inside data.path="),
        ("link.png", "already exists"),
    ],
)
def test_a_sheet_takes_the_place_of_no_picture(examine, pictures, folder, sheet, says):
    (pictures.parent / "link.png").symlink_to("nowhere.png")
    before = sorted((p, p.stat().st_size) for p in pictures.iterdir())
    status, out, err = examine(*folder, f"--sheet={sheet}")
    assert (status, out) == (2, "")
    assert says in err
    assert sorted((p, p.stat().st_size) for p in pictures.iterdir()) == before


def test_it_has_a_help_page_that_tells_the_exit_statuses(examine):
    status, out, _ = examine("--help")
    assert status == 0
    assert "0, no problems; 1, there are" in out
    assert "experiment=sdxl_lora data.path=/pictures" in out
