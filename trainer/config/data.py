"""`data=`: pictures and their captions."""

from dataclasses import dataclass

from trainer.config.fields import one_of, within

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(kw_only=True)
class DataConfig:
    """A folder of pictures, each with a text file of the same name beside it."""

    path: str
    # Pixels; pictures are resized on the short side and centre-cropped to a square.
    resolution: int = within(8, 16384)
    batch_size: int = within(1)
    caption_extension: str
    caption_dropout: float = within(0, 1)  # share of samples trained with the empty prompt
    # SDXL size conditioning: the size of the file, or the size after resizing.
    time_ids: str = one_of("original", "resized")
    # empty: train with the empty caption; skip: leave the picture out.
    on_missing_caption: str = one_of("error", "empty", "skip")
    max_unreadable: int = within(0)  # pictures skipped as unreadable before the run stops
    # Pictures that are never trained on; eval/holdout_loss is their loss.
    holdout: int = within(0)
