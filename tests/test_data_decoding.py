"""A picture's pixels: every kind of file is converted to the correct RGB, or refused."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from trainer.data import decoding
from trainer.data.buckets import covering
from trainer.errors import UserError

LIMIT = 1_000_000


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(content, **options):
    return decoding.decode(content, LIMIT, **options)


def array(content, **options):
    return np.asarray(decode(content, **options).rgb).tolist()


# A 3 x 2 picture of distinct pixels, and what each EXIF orientation turns it into.
F = [[1, 2, 3], [4, 5, 6]]
ORIENTED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_turns_the_picture_upright(orientation):
    image = Image.fromarray((np.array(F) * 40).astype("uint8"))
    exif = image.getexif()
    exif[0x0112] = orientation
    picture = decode(encoded(image, exif=exif))
    assert (np.asarray(picture.rgb)[..., 0] // 40).tolist() == ORIENTED[orientation]
    assert picture.size == np.array(ORIENTED[orientation]).shape


def palette(**info):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image, **info)


def pixels_of(mode, *values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def sixteen_bits(*values, mode="I;16"):
    return Image.fromarray(np.array([values], dtype="uint16"))


RED, BLUE, WHITE, BLACK = [255, 0, 0], [0, 0, 255], [255] * 3, [0] * 3
GOLDEN = {
    # kind: (the file's bytes, the RGB of its two pixels)
    "grey": (encoded(pixels_of("L", 0, 200)), [BLACK, [200] * 3]),
    "bits": (encoded(pixels_of("1", 0, 255)), [BLACK, WHITE]),
    "rgb": (encoded(pixels_of("RGB", (1, 2, 3), (255, 0, 0))), [[1, 2, 3], RED]),
    "palette": (palette(), [RED, BLUE]),
    "palette, one transparent": (palette(transparency=1), [RED, WHITE]),
    "palette, half transparent": (palette(transparency=bytes([255, 51])), [RED, [204, 204, 255]]),
    "rgba": (encoded(pixels_of("RGBA", (255, 0, 0, 255), (9, 9, 9, 0))), [RED, WHITE]),
    "rgba, half": (encoded(pixels_of("RGBA", (0, 0, 0, 102), (0, 0, 255, 255))), [[153] * 3, BLUE]),
    "grey and alpha": (encoded(pixels_of("LA", (0, 255), (0, 0))), [BLACK, WHITE]),
    "grey, one transparent": (encoded(pixels_of("L", 0, 7), transparency=7), [BLACK, WHITE]),
    "rgb, one transparent": (
        encoded(pixels_of("RGB", (9, 9, 9), (255, 0, 0)), transparency=(9, 9, 9)),
        [WHITE, RED],
    ),
    "16 bits": (encoded(sixteen_bits(257 * 100, 65535)), [[100] * 3, WHITE]),
    "16 bits, tiff": (encoded(sixteen_bits(0, 257 * 30), "tiff"), [BLACK, [30] * 3]),
    "cmyk": (encoded(pixels_of("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "tiff"), [RED, BLACK]),
    "webp": (encoded(pixels_of("RGBA", (255, 0, 0, 255), (9, 9, 9, 0)), "webp", lossless=True),
             [RED, WHITE]),
    "gif": (encoded(pixels_of("P", 0, 1), "gif"), None),
    "bmp": (encoded(pixels_of("RGB", (1, 2, 3), (255, 0, 0)), "bmp"), [[1, 2, 3], RED]),
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind, (_, golden) in GOLDEN.items() if golden])
def test_every_kind_of_file_has_its_golden_pixels(kind):
    content, golden = GOLDEN[kind]
    assert array(content) == [golden]


def test_the_background_can_be_chosen():
    content = GOLDEN["rgba"][0]
    assert array(content, background="#102030") == [[RED, [16, 32, 48]]]


def test_a_colour_profile_is_followed_to_srgb():
    """A profile with red and green swapped gives swapped channels, up to its rounding."""
    content = encoded(pixels_of("RGB", (255, 0, 0), (128, 128, 128)), icc_profile=swapped())
    (first, grey), = array(content)  # fmt: skip
    assert np.abs(np.array(first) - [0, 255, 0]).max() <= 3
    assert np.abs(np.array(grey) - 128).max() <= 3


def swapped():
    """The sRGB profile with the tags of its red and green primaries swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "GRB ".encode("utf-16-be"))


@pytest.mark.parametrize("profile", [b"no profile", swapped()])
def test_a_colour_profile_of_another_kind_is_noted_and_passed_over(profile):
    picture = decode(encoded(pixels_of("L", 0, 200), icc_profile=profile))
    assert np.asarray(picture.rgb).tolist() == [[BLACK, [200] * 3]]
    assert ["colour profile" in note for note in picture.notes] == [True]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_taken_and_noted(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    picture = decode(content)
    assert np.abs(np.asarray(picture.rgb)[4, 4].astype(int) - RED).max() <= 2
    assert picture.notes == ["more than one frame; the first is used"]


def test_the_second_frame_of_a_phones_photograph_is_no_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert not decode(encoded(frames[0], "mpo", save_all=True, append_images=frames[1:])).notes


def test_exif_that_cannot_be_read_is_noted_and_the_picture_kept(monkeypatch):
    def damaged(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", damaged)
    picture = decode(GOLDEN["rgb"][0])
    assert np.asarray(picture.rgb).tolist() == [GOLDEN["rgb"][1]]
    assert picture.notes == ["unreadable EXIF data; not rotated"]


JPEG = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), "jpeg")
REFUSED = {
    "nothing": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "a jpeg without its last kB": JPEG[:-1000],
    "half a png": (noise := encoded(Image.effect_noise((200, 200), 80)))[: len(noise) // 2],
    "a damaged png": noise[:2000] + bytes(100) + noise[2100:],
    "floats": encoded(Image.new("F", (8, 8), 0.5), "tiff"),
    "a bomb": encoded(Image.new("1", (1001, 1000))),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_no_whole_picture_is_skipped_by_name_and_never_silently(
    load, tmp_path, caplog, fault
):
    folder = tmp_path / "faults"
    folder.mkdir()
    (folder / "bad.png").write_bytes(REFUSED[fault])
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    changes = {"path": str(folder), "max_pixels": LIMIT}
    assert [s.item.read() for s in load(**changes, max_unreadable=1).samples] == [
        (folder / "good.png").read_bytes()
    ]
    assert "skipped unreadable picture" in caplog.text
    assert "BytesIO" not in caplog.text
    assert "bad.png" in caplog.text
    with pytest.raises(UserError, match=r"1 unreadable picture,.*bad\.png.*max_unreadable=1"):
        load(**changes, max_unreadable=0)


def test_a_kind_of_picture_that_cannot_be_read_is_named(load, pictures, caplog):
    (pictures / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert len(load().samples) == 4
    assert "phone.heic: it is not in a picture format that Pillow reads" in caplog.text


def test_pixels_are_the_centre_antialiased():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    square = decoding.pixels(wide, covering((100, 300), (64, 64)))[2]
    assert (square[:, 4:-4] == 1).all()
    assert square.min() > 0.9  # the filter blends edges with their neighbours
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype="uint8"), (256, 128)))
    shrunk = decoding.pixels(stripes.convert("RGB"), covering((256, 256), (32, 32)))
    assert shrunk.abs().max() < 0.05
    assert decoding.pixels(wide, covering((100, 300), (64, 128))).shape == (3, 64, 128)


def test_the_alpha_channel_can_be_the_mask(load, pictures, tmp_path, caplog):
    image = Image.new("RGBA", (128, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 36, 64))  # the first 4 of 64 columns of the central square
    image.save(pictures / "red.png")
    dataset = load(mask="alpha")
    assert "3 pictures have no transparent part; the loss covers all of them" in caplog.text
    mask = dataset.samples[2].read_mask()
    assert dataset.samples[2].read_pixels().shape == (3, 64, 64)
    assert mask.shape == (1, 64, 64)
    assert torch.equal(mask[0], torch.tensor([0.0] * 4 + [1.0] * 60).expand(64, 64))
    assert (dataset.samples[0].read_mask() == 1).all()
    Image.new("RGBA", (128, 64), "red").save(pictures / "red.png")  # opaque
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        load(mask="alpha", cache=str(tmp_path / "cache"))
        assert "4 pictures have no transparent part" in caplog.text


def test_a_mask_beside_a_picture_is_cropped_like_it_and_must_have_its_shape(load, pictures, caplog):
    mask = Image.new("L", (40, 35), 0)  # for red.png, 80 x 70
    mask.paste(255, (0, 0, 20, 35))
    mask.save(pictures / "red.mask.png")
    dataset = load(mask="file")
    assert len(dataset.samples) == 4
    (drawn,) = dataset.samples[2].read_mask()
    assert torch.equal(drawn, torch.tensor([1.0] * 32 + [0.0] * 32).expand(64, 64))
    assert "3 pictures have no mask" in caplog.text
    load()
    assert "1 picture has a mask that data.mask=none does not read" in caplog.text
    Image.new("L", (80, 60)).save(pictures / "red.mask.png")
    with pytest.raises(UserError, match=r"red\.png \(its mask is 80 x 60"):
        load(mask="file", max_unreadable=0)


def test_a_picture_that_changes_while_a_run_reads_it_is_not_taken_for_the_old_one(load, pictures):
    sample = load().samples[2]
    Image.new("RGB", (80, 70), "pink").save(pictures / "red.png")
    with pytest.raises(UserError, match=r"red\.png has changed"):
        sample.read_pixels()
