"""Captions: from bytes to the strings that a step may draw.

Captions are encoded before training, so tags are shuffled and dropped in advance: each caption gets
`caption_variants` variants, which depend only on the caption and the options.  Every run has the
same ones and finds their embeddings in the cache.
"""

import hashlib

import torch

from optim import rng
from trainer.config import DataConfig
from trainer.errors import UserError
from trainer.streams import Stream

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode(content: bytes, where: object) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one; ignores the locale.

    Anything else, NUL characters included, raises a UserError that names `where` and the byte.
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
    """A caption's lines joined into one; runs of white space become one space."""
    return " ".join(text.split())


def framed(caption: str, config: DataConfig) -> str:
    """The caption between the prefix and the suffix."""
    return one_line(f"{config.caption_prefix} {caption} {config.caption_suffix}")


def variants(caption: str, config: DataConfig, frame: bool) -> list[str]:
    """What a step may draw for this caption: itself, or `caption_variants` variants with shuffled
    or dropped tags.  `frame` adds prefix and suffix."""
    drawn = [caption]
    if config.shuffle_tags or config.tag_dropout > 0:
        drawn = [_variant(caption, config, number) for number in range(config.caption_variants)]
    return [framed(text, config) for text in drawn] if frame else drawn


def _variant(caption: str, config: DataConfig, number: int) -> str:
    """Drop some of the tags after the first `keep_tokens` and shuffle the rest."""
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
