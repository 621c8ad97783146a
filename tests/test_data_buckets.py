"""Buckets and batch order: every picture is seen; a batch is a function of counters."""

import dataclasses
import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
from PIL import Image

from trainer.data import buckets
from trainer.data.plan import BatchPlan
from trainer.errors import UserError
from trainer.sampling import sampler


@pytest.fixture
def shapes(tmp_path, options):
    """Load pictures of these sizes (width, height): shapes([(64, 64)], step=8, ...)."""
    from trainer import data

    def make(sizes, **changes):
        folder = tmp_path / "shapes"
        if not folder.exists():
            folder.mkdir()
            for number, size in enumerate(sizes):
                Image.new("RGB", size).save(folder / f"{number:03d}.png")
        chosen = {"path": str(folder), "buckets": True, "bucket_step": 8} | changes
        return data.load(dataclasses.replace(options, **chosen))

    return make


@pytest.mark.parametrize(
    ("resolution", "step"), [(1024, 64), (1024, 32), (768, 64), (512, 8), (64, 8), (64, 64)]
)
def test_buckets_have_the_area_the_step_and_the_aspects(resolution, step):
    found = buckets.sizes(resolution, step, 4.0)
    assert (resolution, resolution) in found
    assert {(w, h) for h, w in found} == {*found}
    for h, w in found:
        assert h % step == w % step == 0
        assert 1 / 4 <= h / w <= 4
        assert h * w <= resolution**2 < (h + step) * (w + step)


def test_the_buckets_of_sdxl_are_among_them():
    """Podell et al. 2023, appendix I: sizes within 1:4 in steps of 64."""
    published = {(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216),
                 (896, 1152), (960, 1088), (1024, 1024)}  # fmt: skip
    assert published <= {*buckets.sizes(1024, 64, 4.0)}


@pytest.mark.parametrize("size", [(1000, 3000), (1500, 1501), (3000, 2000), (1024, 8000)])
def test_a_picture_goes_to_the_nearest_bucket_in_log_aspect_and_loses_little(options, size):
    config = dataclasses.replace(options, buckets=True, bucket_step=64, resolution=1024)
    fitted = buckets.fit(size, 1024, config)
    distance = abs(math.log(fitted.bucket[1] / fitted.bucket[0] / (size[1] / size[0])))
    assert distance == min(
        abs(math.log(w / h / (size[1] / size[0]))) for h, w in buckets.sizes(1024, 64, 4.0)
    )
    for edge, resized, start in zip(fitted.bucket, fitted.resized, fitted.crop, strict=True):
        assert resized >= edge
        assert start == (resized - edge) // 2
    assert any(map(int.__eq__, fitted.bucket, fitted.resized))
    if max(size) / min(size) < 4:
        assert math.prod(fitted.bucket) / math.prod(fitted.resized) > 0.93


def test_a_small_picture_is_not_enlarged_unless_asked(options):
    config = dataclasses.replace(options, buckets=True, bucket_step=64, resolution=1024)
    larger = dataclasses.replace(config, upscale=True)
    for size in ((300, 700), (1023, 1025), (64, 64), (70, 5000), (500, 4000)):
        for chosen in (size, size[::-1]):
            fitted = buckets.fit(chosen, 1024, config)
            assert all(b <= s and b % 64 == 0 for b, s in zip(fitted.bucket, chosen, strict=True))
            assert math.prod(fitted.bucket) <= 1024**2
            assert max(fitted.bucket) <= 4 * min(fitted.bucket)
            assert fitted.undersized
            assert buckets.fit(chosen, 1024, larger).bucket in buckets.sizes(1024, 64, 4.0)
    assert buckets.fit((300, 700), 1024, config).bucket == (256, 640)


def test_a_picture_of_one_pixel_is_refused_with_the_remedy_or_enlarged(shapes, caplog):
    sizes = [(1, 1), (80, 80)]
    assert len(shapes(sizes, max_unreadable=1).samples) == 1
    assert "1 x 1 pixels" in caplog.text
    assert "data.upscale=true" in caplog.text
    assert len(shapes(sizes, upscale=True).samples) == 2


SIZES = [(64, 64)] * 5 + [(100, 64)] * 3 + [(64, 130)] * 8 + [(300, 60)]


@pytest.mark.parametrize("policy", ["train", "repeat"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 20])
def test_an_epoch_sees_every_picture_once_and_a_batch_has_one_bucket(shapes, policy, batch_size):
    dataset = shapes(SIZES, batch_size=batch_size, short_batches=policy, max_unreadable=0)
    epoch = int(dataset.plan.batches_per_epoch)
    assert epoch == dataset.plan.batches_per_epoch
    batches = [dataset.batch(3, number) for number in range(3 * epoch)]
    for batch in batches:
        assert len({dataset.samples[pick.sample].bucket for pick in batch}) == 1
        assert len(batch) == batch_size if policy == "repeat" else 1 <= len(batch) <= batch_size
    for number in range(3):
        seen = Counter(p.sample for b in batches[number * epoch : (number + 1) * epoch] for p in b)
        assert {*seen} == {*range(len(SIZES))}
        if policy == "train":
            assert {*seen.values()} == {1}
    orders = [tuple(p.sample for b in batches[i * epoch : i * epoch + epoch] for p in b)
              for i in range(3)]  # fmt: skip
    assert len({*orders}) == 3


def test_buckets_of_as_many_pictures_have_orders_of_their_own():
    plan = BatchPlan({(64, 64): [*range(12)], (64, 96): [*range(12, 24)]}, 3, repeats_short=False)
    batches = [plan.batch(0, number) for number in range(8)]
    square = {tuple(batch) for batch in batches if max(batch) < 12}
    wide = {tuple(row - 12 for row in batch) for batch in batches if min(batch) >= 12}
    assert len(square) == len(wide) == 4
    assert square != wide


def test_a_batch_is_a_function_of_seed_and_number_alone(shapes):
    dataset = shapes(SIZES, batch_size=2)
    in_order = [dataset.batch(5, number) for number in range(40)]
    fresh = shapes(SIZES, batch_size=2)
    assert [fresh.batch(5, number) for number in reversed(range(40))] == in_order[::-1]
    assert [fresh.batch(6, number) for number in range(40)] != in_order


def test_batches_of_one_bucket_go_on_from_epoch_to_epoch(load):
    dataset = load(batch_size=3)
    seen = [p.sample for number in range(8) for p in dataset.batch(3, number)]  # 6 epochs of 4
    for epoch in range(6):
        assert sorted(seen[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    assert seen[:4] != seen[4:8]
    assert dataset.plan.batches_per_epoch == Fraction(4, 3)


def test_fewer_pictures_than_a_batch_fill_it_by_repeating(load):
    assert Counter(p.sample for p in load(batch_size=10).batch(0, 0)).total() == 10


def test_the_plan_is_printed(shapes, caplog):
    caplog.set_level("INFO")
    shapes(SIZES, batch_size=4)
    lines = [line.split() for line in caplog.text.splitlines()]
    assert ["64", "x", "64", "5", "2,", "the", "last", "of", "1"] in lines
    assert ["40", "x", "88", "8", "2"] in lines


def test_several_resolutions_show_every_picture_at_each_that_it_is_large_enough_for(shapes):
    dataset = shapes([(300, 300), (70, 70)], resolutions=[64, 128], batch_size=1)
    assert [s.bucket for s in dataset.samples] == [(64, 64), (64, 64), (128, 128)]


def test_of_several_resolutions_the_largest_is_drawn(shapes, composed):
    log = composed("log.prompts=[a]").log
    for given in ([64, 128], [128, 64]):
        dataset = shapes([(300, 300), (70, 70), (200, 200)], resolutions=given)
        names_and_sides = [
            (s.name[-5], s.bucket[0]) for s in map(dataset.samples.__getitem__, dataset.shown)
        ]
        assert names_and_sides == [("0", 128), ("1", 64), ("2", 128)]
        encoded = SimpleNamespace(dataset=dataset, read=None)
        shown = sampler.of_run(None, encoded, log, batch_size=1)
        assert [prompt.size for prompt in shown.prompts] == [(128, 128)]


@pytest.mark.parametrize("repeats", [True, False])
def test_undersized_pictures_are_reported(shapes, caplog, repeats):
    shapes([(30, 30), (80, 80)], upscale=repeats)
    (said,) = [r.getMessage() for r in caplog.records if "is smaller" in r.getMessage()]
    assert said.startswith("1 picture is smaller than its bucket")
    assert said.endswith("000.png: 30 x 30")


def test_options_that_no_bucket_can_have_are_refused(composed):
    for change, says in (
        ("data.bucket_step=12", "multiple of 8"),
        (
            "data.resolutions=[512,100]",
            r"data.resolutions=\[512, 100\]: 100 is not a multiple of 8",
        ),
        (
            "data.resolutions=[512,-64]",
            r"data.resolutions=.*: -64 is out of range; .* \[8, 16384\]",
        ),
        ("data.resolutions=[512,32]", r"data.resolutions=.*: 32 is less than data.bucket_step=64"),
        ("data.resolution=32", "less than data.bucket_step=64"),
        (
            "data.resolution=104 data.max_aspect=1",
            "data.resolution=104 has no bucket with data.bucket_step=64 and data.max_aspect=1",
        ),
    ):
        with pytest.raises(UserError, match=says):
            composed("data=folder", "data.path=/", *change.split())
