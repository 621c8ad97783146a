"""Pictures and captions: what is read, what is refused, and which samples make a batch."""

import dataclasses
from collections import Counter

import pytest
import torch
from PIL import Image

from trainer.data import batch_indices, fingerprint, load_folder, read_pixels
from trainer.errors import UserError


@pytest.fixture
def options(composed, pictures):
    return composed("data=folder", f"data.path={pictures}", "data.resolution=64").data


def load(options, **changes):
    return load_folder(dataclasses.replace(options, **changes))


def test_pictures_come_in_the_order_of_their_names_with_captions(options):
    samples = load(options)
    assert [s.caption for s in samples] == [
        "a blue card",
        "a green card",
        "a red card",
        "a yellow card",
    ]
    red = read_pixels(samples[2])
    assert red.shape == (3, 64, 64)
    assert torch.equal(red[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize(
    ("time_ids", "expected"),
    [("original", (70, 100, 0, 13, 64, 64)), ("resized", (64, 91, 0, 13, 64, 64))],
)
def test_time_ids_are_height_width_crop_target(options, time_ids, expected):
    blue = load(options, time_ids=time_ids)[0]  # 100 x 70
    assert blue.time_ids == expected


def test_exif_rotation_and_transparency_are_applied(options, pictures):
    turned = Image.new("RGB", (64, 64), "red")
    turned.paste("blue", (0, 0, 64, 8))  # blue at the top of the file, which EXIF 6 turns right
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(pictures / "a.png", exif=exif)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(pictures / "b.png")
    for name in "ab":
        (pictures / f"{name}.txt").write_text(name)
    first, second = load(options)[:2]
    assert torch.equal(read_pixels(first)[:, 32, 63], torch.tensor([-1.0, -1.0, 1.0]))
    assert (read_pixels(second) == 1).all()


def ramp(mode):
    """A picture of this mode that goes from black at the left to white at the right."""
    grey = Image.linear_gradient("L").rotate(90)  # 256 x 256
    if mode == "I;16":
        import numpy as np

        return Image.fromarray(np.asarray(grey).astype("uint16") * 257)
    return grey.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_pixel_format_keeps_black_black_and_white_white(options, tmp_path, mode):
    folder = tmp_path / "modes"
    folder.mkdir()
    ending = "tiff" if mode == "CMYK" else "png"
    ramp(mode).save(folder / f"ramp.{ending}")
    (sample,) = load(options, path=str(folder), resolution=256)
    pixels = read_pixels(sample)
    assert pixels[:, :, :4].mean() < -0.9
    assert pixels[:, :, -4:].mean() > 0.9
    assert pixels.mean().item() == pytest.approx(0, abs=0.05)


def test_pixels_without_a_defined_range_are_refused_by_name(options, tmp_path):
    folder = tmp_path / "floats"
    folder.mkdir()
    Image.new("F", (64, 64), 0.5).save(folder / "x.tiff")
    with pytest.raises(UserError, match=r"x\.tiff.*no defined range"):
        load(options, path=str(folder), max_unreadable=0)


def test_the_fingerprint_knows_names_captions_and_sizes(options, pictures):
    before = fingerprint(load(options))
    assert fingerprint(load(options)) == before
    (pictures / "red.txt").write_text("another")
    assert fingerprint(load(options)) != before


def test_an_unreadable_picture_is_named_counted_and_skipped_up_to_the_limit(
    options, pictures, caplog
):
    (pictures / "broken.png").write_bytes(b"<html>not a picture</html>")
    (pictures / "short.png").write_bytes((pictures / "red.png").read_bytes()[:60])
    caplog.set_level("INFO")
    assert len(load(options, max_unreadable=2)) == 4
    assert "broken.png" in caplog.text
    assert "short.png" in caplog.text
    assert "2 unreadable" in caplog.text
    with pytest.raises(UserError, match=r"data\.max_unreadable=2"):
        load(options, max_unreadable=1)


def test_a_missing_caption_is_named_and_handled_as_chosen(options, pictures, caplog):
    (pictures / "red.txt").unlink()
    with pytest.raises(UserError, match=r"1 pictures have no \.txt.*red\.png"):
        load(options, on_missing_caption="error")
    assert [s.caption for s in load(options, on_missing_caption="empty")][2] == ""
    assert "red.png" in caplog.text
    assert len(load(options, on_missing_caption="skip")) == 3


def test_an_empty_folder_and_a_folder_of_nothing_usable_are_refused(options, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="has no pictures"):
        load(options, path=str(empty))
    (empty / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none can be used"):
        load(options, path=str(empty), on_missing_caption="empty")


def test_a_caption_that_is_not_utf8_is_named(options, pictures):
    (pictures / "red.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"red\.txt is not UTF-8"):
        load(options)


def test_captions_survive_byte_order_marks_line_breaks_and_other_alphabets(options, pictures):
    (pictures / "red.txt").write_bytes("\ufeffein rötes\r\nКарточка 🟥".encode())
    assert load(options)[2].caption == "ein rötes Карточка 🟥"


def test_every_sample_is_seen_once_an_epoch_and_batches_depend_on_the_step_alone():
    seen = [i for step in range(7) for i in batch_indices(3, step, 5, 7)]  # 5 epochs of 7
    for epoch in range(5):
        assert Counter(seen[epoch * 7 : epoch * 7 + 7]) == Counter(range(7))
    assert seen[:7] != seen[7:14]
    assert batch_indices(3, 4, 5, 7) == seen[20:25]
    assert batch_indices(4, 4, 5, 7) != seen[20:25]
