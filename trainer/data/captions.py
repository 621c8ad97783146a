"""Captions: from bytes to the strings that a step may draw.

What is drawn must have been encoded before training, so shuffled and thinned captions are drawn in
advance: `caption_variants` of each, functions of the caption and of the options alone.  They are
the same in every run, and their embeddings are found in the cache.
"""

import hashlib

import torch

from optim import rng
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.streams import Stream

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode(content: bytes, where: object) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one, whatever the machine's locale.

    Raises UserError that names `where` and the byte for anything else, NUL characters included.
    """
    encoding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"caption {where} is not {encoding.upper().removesuffix('-SIG')} ({error.reason} at "
            f"byte {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        place = len(text[: text.index("\0")].encode(encoding.removesuffix("-sig")))
        raise UserError(
            f"caption {where} has a NUL character at byte {place} (UTF-16 without a byte order "
            "mark?); save it as UTF-8"
        )
    return text


def one_line(text: str) -> str:
    """All lines of a caption, joined; runs of white space count as one blank."""
    return " ".join(text.split())


def framed(caption: str, config: DataConfig) -> str:
    """The caption between the prefix and the suffix."""
    return one_line(f"{config.caption_prefix} {caption} {config.caption_suffix}")


def variants(caption: str, config: DataConfig, frame: bool) -> list[str]:
    """What is drawn for this caption: itself, or `caption_variants` that are shuffled and thinned;
    with prefix and suffix where `frame` is set."""
    drawn = [caption]
    if config.shuffle_tags or config.tag_dropout > 0:
        drawn = [_variant(caption, config, number) for number in range(config.caption_variants)]
    return [framed(text, config) for text in drawn] if frame else drawn


def _variant(caption: str, config: DataConfig, number: int) -> str:
    """Tags after the first `keep_tokens`: some left out, the others in another order."""
    separator = config.tag_separator
    tags = [tag for part in caption.split(separator) if (tag := part.strip())]
    content = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")
    counters = (Stream.VARIANT, content, number)
    fixed, free = tags[: config.keep_tokens], tags[config.keep_tokens :]
    free = [tag for i, tag in enumerate(free) if rng.uniform(*counters, 1, i) >= config.tag_dropout]
    if config.shuffle_tags:
        order = torch.randperm(len(free), generator=rng.generator(*counters, 0)).tolist()
        free = [free[i] for i in order]
    return f"{separator} ".join(fixed + free)
