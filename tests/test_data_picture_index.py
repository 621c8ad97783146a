"""What is remembered about pictures between runs, so that they are not read again."""

import dataclasses
import errno
import os
import shutil
import signal

import pytest
from PIL import Image

from trainer import data
from trainer.data import survey
from trainer.errors import UserError


def test_a_cache_that_is_complete_need_not_be_written(load, pictures, cache, monkeypatch):
    aged(pictures)
    load(cache=str(cache))
    shutil.copytree(pictures, pictures.with_name("elsewhere"))
    monkeypatch.setattr("trainer.system.disk.replace_text", full)
    assert len(load(cache=str(cache), path=str(pictures.with_name("elsewhere"))).samples) == 4
    Image.new("RGB", (64, 64)).save(pictures / "new.png")
    with pytest.raises(UserError, match=r"data\.cache=.* cannot be written"):
        load(cache=str(cache))


def full(path, text):
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_a_picture_that_is_replaced_with_its_time_kept_is_read(load, pictures, cache):
    one, two = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    for path in pictures.iterdir():
        path.unlink()
    one.save(pictures / "a.bmp")
    aged(pictures)
    first = load(cache=str(cache)).samples[0].digest
    two.save(pictures / "a.bmp")
    aged(pictures)
    (sample,) = load(cache=str(cache)).samples
    assert sample.digest != first
    assert sample.read_pixels()[2].mean() > 0


@pytest.mark.parametrize("at", ["sources.find", "_captions_of", "_look"])
def test_a_signal_ends_whatever_is_read_before_the_first_step(options, cache, monkeypatch, at):
    """What is known about pictures by then is kept."""
    stop = []

    def signalled(function):
        return lambda *arguments: [stop.append(signal.SIGINT), function(*arguments)][1]

    module = survey.sources if "." in at else survey
    name = at.rpartition(".")[2]
    monkeypatch.setattr(module, name, signalled(getattr(module, name)))
    with pytest.raises(SystemExit) as leaving:
        data.load(dataclasses.replace(options, cache=str(cache)), stop)
    assert leaving.value.code == 128 + signal.SIGINT
    assert (cache / "pictures.json").is_file() == (at == "_look")


def test_a_picture_that_was_whole_once_is_not_decoded_again_to_know_it(load, cache, monkeypatch):
    load(cache=str(cache))
    decoded = []
    original = data.survey.decoding.decode
    monkeypatch.setattr(
        data.survey.decoding, "decode", lambda *a: decoded.append(a) or original(*a)
    )
    dataset = load(cache=str(cache))
    assert not decoded
    assert [s.size for s in dataset.samples] == [(70, 100), (70, 90), (70, 80), (70, 110)]
    (cache / "pictures.json").write_text("[1")
    assert len(load(cache=str(cache)).samples) == 4
    assert len(decoded) == 4


def aged(folder):
    """Backdate all files, so that any later change shows in their times."""
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


def test_a_picture_of_the_same_size_and_time_is_not_read_again(load, pictures, cache, monkeypatch):
    aged(pictures)
    first = load(cache=str(cache), mask="file")
    read = []
    original = survey.sample.read
    monkeypatch.setattr(survey.sample, "read", lambda *a: read.append(a[0].name) or original(*a))
    again = load(cache=str(cache), mask="file")
    assert not read
    assert again.fingerprint == first.fingerprint
    load(cache=str(cache))  # the digests included the masks
    assert len(read) == 4
    red = pictures / "red.png"
    content = red.read_bytes()
    red.write_bytes(content[:-1] + b"?")  # same length, too new to be trusted
    for _ in range(2):
        read.clear()
        load(cache=str(cache), mask="file")
        assert read == [str(red)]
    Image.new("L", (100, 70)).save(pictures / "blue.mask.png")
    read.clear()
    assert load(cache=str(cache), mask="file").fingerprint != first.fingerprint
    assert sorted(read) == [str(pictures / "blue.png"), str(red)]
