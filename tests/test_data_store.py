"""The store: nothing is encoded twice, and nothing stale or damaged is used."""

import hashlib
import multiprocessing
import os
import signal
import threading

import pytest
import torch
from encoders import Clip, Vae, entries, truncate
from helpers import QUICK, deterministic
from PIL import Image
from safetensors.torch import load, save_file

from trainer import data
from trainer.data import Store
from trainer.errors import UserError
from trainer.objective import encoding
from trainer.run import run
from trainer.storage import resuming
from trainer.system import memory
from trainer.system.threads import ahead


@pytest.fixture
def encode(load, cache):
    """Encode the picture folder with these changes -> (latents and masks, number encoded)."""

    def run(fingerprint="vae", dtype="float32", folder=cache, **changes):
        vae = Vae()
        samples = load(**changes).samples
        store = Store(folder and str(folder), dtype)
        latents = store.latents(samples, fingerprint, vae.make)
        masks = store.masks(samples, latents)
        assert vae.made == (vae.encoded > 0), "an encoder without work"
        return [latents[i] | (masks[i] if masks else {}) for i in range(len(samples))], vae.encoded

    return run


def test_what_has_not_changed_is_never_encoded_twice(encode, pictures, cache):
    first, count = encode()
    assert count == 4
    again, count = encode()
    assert count == 0
    in_memory, count = encode(folder=None)
    assert count == 4
    for a, b, c in zip(first, again, in_memory, strict=True):
        assert torch.equal(a["latent"], b["latent"])
        assert torch.equal(a["latent"], c["latent"])
        assert a["latent"].shape == (4, 8, 8)
    (pictures / "red.png").rename(pictures / "elsewhere.png")
    assert encode()[1] == 0


CHANGES = {
    # change: (edit, options, number of pictures encoded anew)
    "a picture's pixels": (lambda p: Image.new("RGB", (80, 70), "pink").save(p / "red.png"), {}, 1),
    "resolution": (None, {"resolution": 56}, 4),
    "crop": (None, {"buckets": True, "bucket_step": 8}, 4),
    "vae": (None, {"fingerprint": "another"}, 4),
    "dtype": (None, {"dtype": "bfloat16"}, 4),
    "background, of an opaque picture": (None, {"background": "black"}, 0),
    "mask": (None, {"mask": "alpha"}, 0),
    "a new picture": (lambda p: Image.new("RGB", (64, 64)).save(p / "new.png"), {}, 1),
    "captions": (lambda p: (p / "red.txt").write_text("other"), {"caption_prefix": "x"}, 0),
    "batch size": (None, {"batch_size": 7}, 0),
    "time_ids": (None, {"time_ids": "bucket"}, 0),
    "mirror images": (None, {"random_flip": True}, 4),
    "crops": (None, {"crops": 3}, 8),  # besides the central ones, of 9 to 37 pixels
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_a_miss_and_what_has_not_is_a_hit(encode, pictures, change):
    encode()
    edit, options, missing = CHANGES[change]
    if edit:
        edit(pictures)
    assert encode(**options)[1] == missing
    assert encode(**options)[1] == 0


def test_threads_that_read_ahead_end_with_the_reader_who_stops_early():
    before = threading.active_count()
    with ahead(str, range(100)) as made:
        assert next(made) == "0"
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_only_a_transparent_picture_is_encoded_anew_on_another_background(encode, pictures):
    Image.new("RGBA", (80, 70), (255, 0, 0, 128)).save(pictures / "red.png")
    Image.new("RGBA", (80, 70), (0, 0, 255, 255)).save(pictures / "blue.png")  # opaque
    light, count = encode()
    assert count == 4
    dark, count = encode(background="black")
    assert count == 1
    changed = [not torch.equal(*pair) for pair in zip(values(light), values(dark), strict=True)]
    assert changed == [False, False, True, False]
    assert encode()[1] == 0  # the old entries are still there


def values(entries):
    return [entry["latent"] for entry in entries]


def test_a_mask_changes_no_latent(encode, pictures):
    Image.new("RGBA", (64, 64), (255, 0, 0, 51)).save(pictures / "red.png")
    Image.new("L", (90, 70), 0).save(pictures / "green.mask.png")
    plain, count = encode()
    assert count == 4
    for mask, means in ("alpha", [1, 1, 0.2, 1]), ("file", [1, 0, 1, 1]):
        masked, count = encode(mask=mask)
        assert count == 0
        assert [e["mask"].mean().item() for e in masked] == pytest.approx(means)
        for pair in zip(values(plain), values(masked), strict=True):
            assert torch.equal(*pair)
    Image.new("L", (90, 70), 255).save(pictures / "green.mask.png")
    again, count = encode(mask="file")
    assert (count, again[1]["mask"].mean()) == (0, 1)


def test_a_latents_name_is_what_it_has_been(encode, load, cache):
    """Without a mask and on white, names stay valid, so that hours of encoding are not lost."""
    encode()
    pixels = "(64, 64), {}, 'white', 'none', 'centre, lanczos'"
    known = [(1, s.digest, f"({pixels.format(s.size)})", "vae", "torch.float32")
             for s in load().samples]  # fmt: skip
    expected = sorted(hashlib.sha256(repr(parts).encode()).hexdigest() for parts in known)
    assert [path.stem for path in entries(cache)] == expected


def replaced(change):
    return lambda path: save_file(
        {k: change(v).contiguous() for k, v in load(path.read_bytes()).items()}, path
    )


DAMAGE = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "another shape": replaced(lambda x: x[:, 1:]),
    "another dtype": replaced(lambda x: x.half()),
    "another name": lambda path: save_file({"x": load(path.read_bytes())["latent"]}, path),
    "a folder's worth of text": lambda path: path.write_text("{}" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_replaced(encode, cache, caplog, damage):
    first, _ = encode()
    DAMAGE[damage](entries(cache)[1])
    again, count = encode()
    assert count == 1
    assert "1 damaged entries" in caplog.text
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["latent"], b["latent"])
    assert encode()[1] == 0


def test_an_entry_that_is_not_finite_is_named_when_it_is_used_and_made_again(load, cache):
    samples, vae = load().samples, Vae()
    Store(str(cache), "float32").latents(samples, "vae", vae.make)
    for path in entries(cache):
        replaced(lambda x: x / 0)(path)
    latents = Store(str(cache), "float32").latents(samples, "vae", vae.make)
    with pytest.raises(
        UserError, match=r"latents/.* was not finite and has been deleted; resume or restart"
    ):
        latents[0]
    assert vae.encoded == 4
    latents = Store(str(cache), "float32").latents(samples, "vae", vae.make)
    assert latents[0]["latent"].isfinite().all()
    assert vae.encoded == 5


def test_a_start_reads_no_values_of_the_cache(encode, monkeypatch):
    encode()
    monkeypatch.setattr(data.entries, "load", lambda content: pytest.fail("an entry is read"))
    with pytest.raises(pytest.fail.Exception, match="is read"):
        encode()  # by this fixture's own reads
    monkeypatch.setattr(data.Entries, "__getitem__", lambda entries, name: {})
    assert encode()[1] == 0


def test_a_latent_that_is_not_finite_is_named_and_not_kept(load, cache):
    vae = Vae()
    vae.spoiled = 3
    with pytest.raises(UserError, match=r"red\.png is not finite.*vae_dtype=float32.*fp16-fix"):
        Store(str(cache), "float32").latents(load().samples, "vae", vae.make)
    assert len(entries(cache)) == 2
    vae.spoiled = None
    Store(str(cache), "float32").latents(load().samples, "vae", vae.make)
    assert vae.encoded == 3 + 2


@pytest.mark.parametrize(
    ("is_cached", "told"),
    [(True, "1 of 4 are kept in {cache}"), (False, "nothing is kept; data.cache=... would keep")],
)
def test_a_signal_ends_the_encoding_and_what_is_kept_is_told(load, cache, is_cached, told, caplog):
    caplog.set_level("INFO")
    vae, stop = Vae(), []
    store = Store(str(cache) if is_cached else None, "float32")

    def encode(pixels):
        stop.append(signal.SIGTERM)
        return vae(pixels)

    with pytest.raises(SystemExit) as leaving:
        store.latents(load().samples, "vae", lambda: encode, stop)
    assert leaving.value.code == 128 + signal.SIGTERM
    assert vae.encoded == 1
    assert len(entries(cache)) == is_cached
    assert f"stopped while encoding pictures: {told.format(cache=cache)}" in caplog.text


def test_a_full_disk_is_named_with_the_remedy_and_leaves_no_litter(load, cache, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.data.store.save_file", full)
    with pytest.raises(UserError, match=r"data\.cache=.*No space left.*data\.cache=null"):
        Store(str(cache), "float32").latents(load().samples, "vae", Vae().make)
    assert not [path for path in (cache / "latents").rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_is_refused_by_name(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*file/x.*data\.cache=null"):
        load(cache=str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match=r"data\.cache=.*file/x.*data\.cache=null"):
        Store(str(tmp_path / "file" / "x"), "float32")


def test_what_does_not_fit_in_memory_is_refused_before_it_fills_it(load, monkeypatch, cache):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 3.5 * 4 * 64 * 4)
    vae = Vae()
    with pytest.raises(UserError, match=r"4 encoded pictures need .* GB.*data\.cache="):
        Store(None, "float32").latents(load().samples, "", vae.make)
    assert vae.encoded == 1
    Store(None, "bfloat16").latents(load().samples, "", vae.make)
    Store(str(cache), "float32").latents(load().samples, "", vae.make)


def test_captions_are_encoded_once_each_and_with_the_encoder_they_name(cache):
    store, clip = Store(str(cache), "float32"), Clip()
    captions = [f"caption {'x' * i}" for i in range(20)]
    texts = store.texts(captions, "clip", clip.make)
    assert clip.calls == 2
    assert texts[captions[3]]["prompt"].shape == (3, 4)
    assert texts[captions[3]]["pooled"][0] == len(captions[3])
    store.texts([*captions, "one more"], "clip", clip.make)
    assert clip.captions == [*captions, "one more"]
    store.texts(captions[:2], "another clip", clip.make)
    assert len(clip.captions) == 23
    truncate(entries(cache, "texts")[0])
    store.texts([*captions, "one more"], "clip", clip.make)
    store.texts(captions[:2], "another clip", clip.make)
    assert len(clip.captions) == 24


def encode_and_leave(cache, kill_at):
    """In a new process: encode twelve captions, dying at rename number `kill_at`; exit with the
    number of entries written."""
    renames, replace = [], os.replace

    def dying(*paths):
        renames.append(paths)
        if len(renames) == kill_at:
            os._exit(99)
        replace(*paths)

    os.replace = dying
    texts = [f"text {'x' * i}" for i in range(12)]
    found = Store(str(cache), "float32").texts(texts, "clip", Clip().make)
    right = all((found[text]["prompt"] == len(text)).all() for text in texts)
    os._exit(len(renames) if right else 98)


def test_a_killed_process_loses_one_entry_and_two_processes_may_share_a_folder(cache):
    def start(kill_at):
        process = multiprocessing.get_context("fork").Process(
            target=encode_and_leave, args=(cache, kill_at)
        )
        process.start()
        return process

    def ends(process):
        process.join(60)
        return process.exitcode

    assert ends(start(5)) == 99
    assert len(entries(cache, "texts")) == 4
    two = [start(0), start(0)]
    written = [ends(process) for process in two]
    assert max(written) <= 8 <= sum(written)  # the existing 4 are not encoded again
    assert len(entries(cache, "texts")) == 12
    assert ends(start(0)) == 0


def test_a_signal_while_pictures_are_encoded_ends_the_run_and_the_next_goes_on(
    composed, pictures, cache, tmp_path, monkeypatch
):
    encoded = []

    def encoder(model):
        def encode(pixels):
            encoded.append(pixels)
            if len(encoded) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return torch.zeros(4, *(side // 4 for side in pixels.shape[1:]))

        return encode

    monkeypatch.setattr(encoding, "_picture_encoder", encoder)
    options = [*QUICK, "data=folder", f"data.path={pictures}", "data.resolution=64",
               "data.bucket_step=8", f"data.cache={cache}"]  # fmt: skip
    with pytest.raises(SystemExit) as leaving:
        run(composed(*options), tmp_path / "run")
    assert leaving.value.code == 128 + signal.SIGTERM
    assert len(entries(cache)) == 2
    run(composed(*options, "schedule.steps=1"), tmp_path / "run")
    assert len(encoded) == 4
    elsewhere = [*options, "schedule.steps=1", "data.cache=null", f"resume={tmp_path / 'run'}"]
    assert resuming.to_resume(composed(*elsewhere)).step == 1  # the cache does not affect resuming


def test_a_cached_run_is_bitwise_the_run_in_memory_and_encodes_nothing_anew(
    quick, composed, pictures, cache, monkeypatch
):
    """In buckets, with shuffled captions and masks."""
    (pictures / "red.txt").write_text("a, b, c")
    options = ["data=folder", f"data.path={pictures}", "data.resolution=64", "data.bucket_step=8",
               "data.shuffle_tags=true", "data.mask=alpha", "data.batch_size=2"]  # fmt: skip
    sampled = ["log.sample_count=4", "log.sample_steps=1"]
    memory = quick("memory", *options, *sampled, "data.cache=null")
    drawn = [Image.open(memory / f"samples/step-000004/{i:02d}.png").size for i in range(4)]
    assert drawn == [(72, 56), (72, 56), (72, 56), (80, 48)]
    cached = quick("cached", *options, f"data.cache={cache}")

    def refuse(*_):
        raise AssertionError("an encoder was made")

    monkeypatch.setattr(encoding, "_picture_encoder", refuse)
    monkeypatch.setattr(encoding, "_text_encoder", refuse)
    again = quick("again", *options, f"data.cache={cache}")
    assert deterministic(memory) == deterministic(cached) == deterministic(again)


def test_captions_are_encoded_many_at_a_time_and_counted_one_by_one(caplog):
    sizes = []

    def encoder(captions):
        sizes.append(len(captions))
        return [{"prompt": torch.zeros(1, 2)} for _ in captions]

    with caplog.at_level("INFO"):
        Store(None, "float32").texts([str(i) for i in range(20)], "", lambda: encoder)
    assert sizes == [16, 4]
    assert "encoding captions: 20 entries" in caplog.text


def test_a_mask_is_averaged_to_the_latent_and_kept(encode, pictures, cache):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 64))
    image.save(pictures / "red.png")
    for _ in range(2):
        latents, _ = encode(mask="alpha")
        assert torch.equal(latents[2]["mask"], torch.tensor([0.5] + [1.0] * 7).expand(1, 8, 8))
        assert (latents[0]["mask"] == 1).all()
    assert len(entries(cache, "masks")) == 2  # one for it, one shared by pictures without a mask
    assert "mask" not in encode()[0][2]
