"""`data=`: pictures, their captions, and how batches are made of them."""

from dataclasses import dataclass
from typing import Any

from trainer.config.fields import one_of, within


@dataclass(kw_only=True)
class SourceConfig:
    """One of several places of pictures: 'data.sources=[{path: /a, repeats: 2}, {path: /b}]'."""

    path: str  #: as data.path
    #: How often each picture occurs in an epoch.
    repeats: int = within(1, default=1)
    #: Multiplies the loss of its pictures.
    weight: float = within(0, default=1.0)
    #: Regularisation pictures: no caption_prefix or _suffix, and never an eval point or a sample.
    prior: bool = False
    caption: str | None = None  #: for its pictures without one


@dataclass(kw_only=True)
class DataConfig:
    """Pictures and their captions: a folder (pictures with text files next to them, or with a
    metadata.jsonl or metadata.csv; webdataset .tar files; the .parquet or .arrow files of a Hugging
    Face dataset), or one such file.  Hidden files, and run folders in it, are ignored."""

    #: A folder of pictures, or one .tar, .parquet or .arrow file.
    path: str | None
    sources: list[SourceConfig]  #: several, instead of `path`
    #: Read folders named REPEATS_CAPTION in them, such as "10_sks cat", as kohya's scripts do: as
    #: sources of their own, with this number of repeats, and this caption for pictures without one.
    kohya_folders: bool

    # Captions.
    #: Suffixes of the text files next to pictures, one or a list, in upper or lower case; the first
    #: found is used.  README, LICENSE, COPYING and NOTICE are not captions.
    caption_extension: Any
    #: The caption column of tables and metadata files (and of the .json of webdataset samples);
    #: null: captions, text or caption.
    caption_column: str | None
    on_missing_caption: str = one_of("error", "empty", "skip")  #: skip: leave the picture out
    caption_prefix: str  #: before every caption, such as a trigger word; never shuffled
    caption_suffix: str  #: behind every caption
    caption_dropout: float = within(0, 1)  #: share of samples trained with the empty prompt
    tag_separator: str  #: between tags, for shuffle_tags, tag_dropout and keep_tokens
    shuffle_tags: bool  #: train on tags in changing orders
    tag_dropout: float = within(0, 1)  #: share of tags left out
    keep_tokens: int = within(0)  #: leading tags that are neither shuffled nor dropped
    #: A text that is removed from captions, as kohya's scripts do (|||): tags before it, and after
    #: a second one, are neither shuffled nor dropped.  A caption without it keeps `keep_tokens`.
    keep_separator: str | None
    #: Shuffled captions are drawn in advance, so that all of them can be encoded before training:
    #: this many per caption, if tags are shuffled or dropped.
    caption_variants: int = within(1)

    # Pixels.
    resolution: int = within(8, 16384)  #: the square root of a picture's area in pixels
    #: Several, instead of `resolution`: every picture is trained on at all of them, and drawn at
    #: the largest.
    resolutions: list[int] = within(8, 16384)
    #: Sort pictures into buckets of that area and several aspect ratios; false: crop the central
    #: square.
    buckets: bool
    bucket_step: int = within(8)  #: pixels; a bucket's sides are multiples of it
    max_aspect: float = within(1, 16)  #: of a bucket's sides; longer pictures are cropped
    #: Enlarge pictures that are smaller than their bucket; false: such a picture goes to a bucket
    #: of its own size, down to the step.
    upscale: bool
    #: Train on this many crops of a picture that does not have its bucket's shape, spread evenly
    #: from one edge to the other and drawn at random; 1: the central one.  All are encoded.
    crops: int = within(1, 64)
    #: Train on a picture's mirror image half of the time; both are encoded.
    random_flip: bool
    background: str  #: behind transparent pixels: a colour's name, or #rrggbb
    #: Loss mask: alpha (transparent pixels do not count), file (NAME.mask.png next to a picture, or
    #: `mask` in metadata: white counts, black does not).
    mask: str = one_of("none", "alpha", "file")
    #: SDXL size conditioning: the file's size, the size after resizing, or the bucket's (without
    #: crop).
    time_ids: str = one_of("original", "resized", "bucket")

    # Batches.
    #: Pictures in a micro-batch; a step has runtime.accumulation of them.
    batch_size: int = within(1, 65536)
    #: A bucket's last pictures of an epoch that do not fill a batch: train a smaller one, or fill
    #: it by repeating others.  (With a single bucket a batch continues into the next epoch.)
    short_batches: str = one_of("train", "repeat")
    #: Pictures that are never trained on; eval/holdout_loss is their loss.
    holdout: int = within(0)

    # Reading.
    max_unreadable: int = within(0)  #: pictures skipped as unreadable before the run stops
    max_pixels: int = within(1)  #: larger files are not decoded (decompression bombs)
    #: A folder for latents and text embeddings, shared between runs; null: keep them in memory.
    cache: str | None
    cache_dtype: str = one_of("float32", "bfloat16")  #: of latents and text embeddings

    @property
    def caption_extensions(self) -> list[str]:
        """caption_extension as a list."""
        extensions = self.caption_extension
        return [extensions] if isinstance(extensions, str) else list(extensions)

    @property
    def largest_resolution(self) -> int:
        """The largest one trained on."""
        return max(self.resolutions or [self.resolution])
