"""Captions: from bytes to the strings that a step may draw.

Captions are encoded before training, so tags are shuffled and dropped in advance: each caption gets
`caption_variants` variants, which depend only on the caption and the options.  Every run has the
same ones and finds their embeddings in the cache.
"""

import hashlib
import itertools
from collections.abc import Iterable

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
        offset = len(text[: text.index("\0")].encode(encoding.removesuffix("-sig")))
        raise UserError(
            f"caption {where} has a NUL character at byte {offset} (UTF-16 without a byte order "
            "mark?); save it as UTF-8"
        )
    return text


def one_line(text: str) -> str:
    """A caption's lines joined into one; runs of white space become one space."""
    return " ".join(text.split())


def framed(caption: str, config: DataConfig) -> str:
    """The caption between the prefix and the suffix."""
    return one_line(f"{config.caption_prefix} {plain(caption, config)} {config.caption_suffix}")


def plain(caption: str, config: DataConfig) -> str:
    """The caption without any `keep_separator`."""
    return _joined(_parts(caption, config), config) if _mark(caption, config) else caption


def variants(caption: str, config: DataConfig, frame: bool) -> list[str]:
    """What a step may draw for this caption: itself, or `caption_variants` variants with shuffled
    or dropped tags.  `frame` adds prefix and suffix."""
    drawn = [caption]
    if config.shuffle_tags or config.tag_dropout > 0:
        drawn = [_variant(caption, config, number) for number in range(config.caption_variants)]
    return [framed(text, config) if frame else plain(text, config) for text in drawn]


def free_tags(caption: str, config: DataConfig) -> list[str]:
    """The tags that may be shuffled and dropped."""
    return _parts(caption, config)[1]


def _variant(caption: str, config: DataConfig, number: int) -> str:
    """Drop some of the tags between those that keep their places, and shuffle the rest."""
    content = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")
    counters = (Stream.VARIANT, content, number)
    first, free, last = _parts(caption, config)
    free = [tag for i, tag in enumerate(free) if rng.uniform(*counters, 1, i) >= config.tag_dropout]
    if config.shuffle_tags:
        order = torch.randperm(len(free), generator=rng.generator(*counters, 0)).tolist()
        free = [free[i] for i in order]
    return _joined((first, free, last), config)


def _mark(caption: str, config: DataConfig) -> str | None:
    """The `keep_separator`, if the caption has it."""
    mark = config.keep_separator
    return mark if mark and mark in caption else None


def _parts(caption: str, config: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, those that may move, and those that stay at the end, which only
    a second `keep_separator` separates."""
    if mark := _mark(caption, config):
        first, free, *last = caption.split(mark)
        more = config.tag_separator.join(last)
        return _tags(first, config), _tags(free, config), _tags(more, config)
    tags = _tags(caption, config)
    return tags[: config.keep_tokens], tags[config.keep_tokens :], []


def _tags(text: str, config: DataConfig) -> list[str]:
    return [tag for part in text.split(config.tag_separator) if (tag := part.strip())]


def _joined(parts: Iterable[list[str]], config: DataConfig) -> str:
    return f"{config.tag_separator} ".join(itertools.chain.from_iterable(parts))
