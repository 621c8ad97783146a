"""`data=`: pictures, their captions, and how batches are made of them."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from trainer.config.fields import one_of, within

# What Pillow knows that is no single picture of pixels: drawings, films, tables of measurements.
_NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def _picture_suffixes() -> set[str]:
    """Of what this Pillow opens; and of kinds that not every Pillow does, so that such a picture is
    named and not passed over in silence."""
    Image.preinit()  # common kinds are tried first, as they are where nobody asks for all
    known = Image.registered_extensions().items()
    opened = {end for end, kind in known if kind in Image.OPEN and kind not in _NO_PICTURES}
    return opened | {".avif", ".heic", ".heif", ".jp2", ".jxl", ".tif", ".tiff", ".webp"}


PICTURE_SUFFIXES = _picture_suffixes()


@dataclass(kw_only=True)
class SourceConfig:
    """One of several places of pictures: 'data.sources=[{path: /a, repeats: 2}, {path: /b}]'."""

    path: str  # as data.path
    # How often an epoch shows each picture.
    repeats: int = within(1, default=1)
    # Multiplies the loss of its pictures.
    weight: float = within(0, default=1.0)
    # Regularisation pictures: no caption_prefix or _suffix, and never an eval point or a sample.
    prior: bool = False
    caption: str | None = None  # of its pictures that have none


@dataclass(kw_only=True)
class DataConfig:
    """Pictures and their captions: a folder (pictures with text files beside them, or with a
    metadata.jsonl or metadata.csv; webdataset .tar files; the .parquet or .arrow files of a Hugging
    Face dataset), or one such file.  Hidden files, and what runs left in the folder, are passed
    over."""

    path: str | None
    sources: list[SourceConfig]  # several in place of `path`

    # Captions.  Endings of the text files beside pictures, one or a list, in upper or lower case;
    # the first found counts.  README, LICENSE, COPYING and NOTICE are no captions.
    caption_extension: Any
    # Of tables and metadata files (and the .json of webdataset samples): the name of the captions'
    # column; null: captions, text or caption.
    caption_column: str | None
    on_missing_caption: str = one_of("error", "empty", "skip")  # skip: leave the picture out
    caption_prefix: str  # before every caption, such as a trigger word; never shuffled
    caption_suffix: str
    caption_dropout: float = within(0, 1)  # share of samples trained with the empty prompt
    tag_separator: str  # what tags end with, for the next three
    shuffle_tags: bool
    tag_dropout: float = within(0, 1)  # share of tags left out
    keep_tokens: int = within(0)  # tags at the beginning that are neither shuffled nor left out
    # Shuffled captions are drawn in advance, so that all of them can be encoded before training:
    # this many of each caption, where tags are shuffled or dropped.
    caption_variants: int = within(1)

    # Pixels.  An area of resolution^2, or of each of `resolutions` where any are given: every
    # picture is then trained on at all of them, and drawn at the largest.
    resolution: int = within(8, 16384)
    resolutions: list[int] = within(8, 16384)
    # Buckets of that area and many shapes; false: the central square.
    buckets: bool
    bucket_step: int = within(8)  # pixels; the sides of a bucket are multiples
    max_aspect: float = within(1, 16)  # of a bucket; what is longer is cropped
    # Without it a picture smaller than its bucket goes to one of its own size, down to the step.
    upscale: bool
    # Half of the times that a picture is trained on, its mirror image is; both are encoded.
    random_flip: bool
    background: str  # behind transparent pixels: a colour's name, or #rrggbb
    # Of the loss: alpha (the transparent does not count), file (NAME.mask.png beside a picture, or
    # `mask` in metadata: white counts, black does not).
    mask: str = one_of("none", "alpha", "file")
    # SDXL size conditioning: the size of the file, the size after resizing, or that of the bucket
    # (with no crop).
    time_ids: str = one_of("original", "resized", "bucket")

    # Batches.  A bucket's last pictures of an epoch that do not fill a batch: train them as a
    # smaller one, or repeat others of the bucket.  (A single bucket has none left over: a batch
    # goes on into the next epoch.)
    batch_size: int = within(1)
    short_batches: str = one_of("train", "repeat")
    # Pictures that are never trained on; eval/holdout_loss is their loss.
    holdout: int = within(0)

    # Reading.
    max_unreadable: int = within(0)  # pictures skipped as unreadable before the run stops
    max_pixels: int = within(1)  # of a file; one with more is not decoded (a decompression bomb)
    # A folder for latents and text embeddings, which other runs find there; null: in memory.
    cache: str | None
    cache_dtype: str = one_of("float32", "bfloat16")  # of both, in memory and on the disk

    @property
    def largest_resolution(self) -> int:
        """Of those that are trained on."""
        return max(self.resolutions or [self.resolution])
