"""Read all configured data before use: what is usable, what is not, and what looks wrong."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from trainer.config import DataConfig, SourceConfig
from trainer.data import decoding, sample, sources
from trainer.data.buckets import Fit, Size, fit
from trainer.data.items import Item, Reading
from trainer.data.picture_index import PictureIndex, Traits
from trainer.errors import UserError, reason
from trainer.system import console, signals
from trainer.system.threads import ahead

Captioned = tuple[SourceConfig, Item, list[str]]  # source, picture, captions


@dataclass(kw_only=True)
class UsablePicture:
    """A picture that can be used."""

    item: Item
    source: SourceConfig
    captions: list[str]  # as they are written
    digest: str  # this and the next: as in Sample
    picture_digest: str
    size: Size
    is_transparent: bool  # anywhere
    notes: list[str]  # what is ignored or odd about it
    fits: list[Fit]  # one for each resolution, without duplicate buckets


@dataclass(kw_only=True)
class Survey:
    """What was found; pictures are identified by `Item.name`."""

    count: int = 0  # of all pictures
    usable: list[UsablePicture] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # picture -> reason
    broken: list[str] = field(default_factory=list)  # messages: archives, tables, metadata lines
    undecodable: list[str] = field(default_factory=list)  # messages: captions
    uncaptioned: list[str] = field(default_factory=list)  # without those that are unreadable
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    # message -> files that are not used; `remarks` are harmless
    problems: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


def survey(config: DataConfig, for_run: bool = False, stop: Sequence[int] = ()) -> Survey:
    """Read every caption, then every picture, in the order of the sources and their paths.

    `for_run` returns early, with what was found so far, on anything that stops a run: a broken file
    or metadata line, a missing or undecodable caption, or more than `max_unreadable` unreadable
    pictures.  Raises SystemExit once `stop` holds a signal.
    """
    every_source = sources.of_config(config)
    reading = Reading(
        extensions=config.caption_extensions,
        caption_column=config.caption_column,
        apart={os.path.abspath(Path(source.path).expanduser()) for source in every_source},
    )
    surveyed = Survey(broken=reading.broken, problems=reading.problems, remarks=reading.remarks)
    pictures = _listed(surveyed, every_source, reading, stop)
    captioned = _captioned(surveyed, pictures, config, stop)
    missing = surveyed.uncaptioned and config.on_missing_caption == "error"
    if for_run and (surveyed.broken or surveyed.undecodable or missing):
        return surveyed
    limit = config.max_unreadable if for_run else len(captioned)
    index = PictureIndex(config)
    try:
        _look_at_all(surveyed, captioned, config, index, limit, stop)
    finally:
        index.save()
    surveyed.uncaptioned = [
        name for name in surveyed.uncaptioned if name not in surveyed.unreadable
    ]
    return surveyed


def _listed(
    surveyed: Survey, every_source: list[SourceConfig], reading: Reading, stop: Sequence[int]
) -> list[tuple[SourceConfig, Item]]:
    """All pictures, with their sources."""
    pictures: list[tuple[SourceConfig, Item]] = []
    repeated = _Repeated()
    for source in every_source:
        path, reading.has_column = Path(source.path).expanduser(), False
        for item in sources.find(path, reading):
            signals.end_if(stop, "looking for pictures")
            if earlier := repeated.source(item.path, source):
                message = (
                    f"pictures are trained on twice, once in {earlier.path} and once in "
                    f"{source.path}"
                    if earlier is not source
                    else (
                        "pictures are found by several paths (links), and trained on once for each"
                    )
                )
                surveyed.problems[message].append(item.name)
            pictures.append((source, item))
        if reading.caption_column is not None and not reading.has_column:
            message = f"sources have no captions in data.caption_column={reading.caption_column}"
            reading.remarks[message].append(source.path)
    surveyed.count = len(pictures)
    return pictures


def _captioned(
    surveyed: Survey,
    pictures: list[tuple[SourceConfig, Item]],
    config: DataConfig,
    stop: Sequence[int],
) -> list[Captioned]:
    """The pictures that have captions or need none; the others are noted in `surveyed`."""
    captioned: list[Captioned] = []
    with (
        ahead(_captions_of, pictures) as read,
        console.Aside("reading captions", len(pictures), "pictures") as aside,
    ):
        for (source, item), texts in zip(pictures, read, strict=True):
            signals.end_if(stop, "reading captions")
            aside.advance(1)
            if isinstance(texts, Exception):
                surveyed.undecodable.append(str(texts))
                continue
            if not texts:
                surveyed.uncaptioned.append(item.name)
            if texts or config.on_missing_caption != "skip":
                captioned.append((source, item, texts or [""]))
    return captioned


def _captions_of(picture: tuple[SourceConfig, Item]) -> list[str] | Exception:
    """A picture's captions, or else its source's; or the error that reading them raised."""
    source, item = picture
    try:
        texts = item.captions()
    except (UserError, OSError) as error:
        return error
    return [source.caption] if not texts and source.caption is not None else texts


def _look_at_all(
    surveyed: Survey,
    captioned: list[Captioned],
    config: DataConfig,
    index: PictureIndex,
    max_unreadable: int,
    stop: Sequence[int],
) -> None:
    with (
        ahead(lambda picture: _look(*picture, config, index), captioned) as results,
        console.Aside("reading pictures", len(captioned), "pictures") as aside,
    ):
        for (_, item, _), result in zip(captioned, results, strict=False):
            signals.end_if(stop, "reading pictures")
            aside.advance(1)
            if isinstance(result, Exception):
                where = f" (named in {item.place})" if item.place else ""
                is_dangling = isinstance(result, FileNotFoundError) and os.path.islink(item.path)
                why = "a link to a file that is not there" if is_dangling else reason(result)
                surveyed.unreadable[item.name] = why + where
                if len(surveyed.unreadable) > max_unreadable:
                    break
                continue
            for note in result.notes:
                surveyed.notes[note].append(item.name)
            surveyed.usable.append(result)


def _look(
    source: SourceConfig, item: Item, texts: list[str], config: DataConfig, index: PictureIndex
) -> UsablePicture | Exception:
    """A usable picture, or the error that reading or decoding it raised.

    Decoders may raise anything for hostile bytes, so all exceptions are caught.
    """
    try:
        stamp = index.stamp(item)  # before reading, in case the file is being written
        digests = index.digests(stamp)
        traits = index.traits(digests) if digests else None
        if not digests or not traits:
            content = sample.read(item, config)
            digests = content.digest, content.picture_digest
            traits = index.traits(digests) or _decoded(content, config)
            index.add(stamp, digests, traits)
        size, is_transparent, notes = traits
        fits = [fit(size, side, config) for side in config.resolutions or [config.resolution]]
        return UsablePicture(
            item=item,
            source=source,
            captions=texts,
            digest=digests[0],
            picture_digest=digests[1],
            size=size,
            is_transparent=is_transparent,
            notes=[*item.notes, *notes],
            fits=list({fitted.bucket: fitted for fitted in fits}.values()),
        )
    except Exception as error:
        return error


def _decoded(content: sample.Content, config: DataConfig) -> Traits:
    """Decode a picture, and its mask to check it."""
    picture = decoding.decode(content.picture, config.max_pixels)
    notes = [*picture.notes]
    if picture.alpha is not None and decoding.is_black(picture.alpha):
        notes.append("only transparent pixels")
    if content.mask is not None:
        mask = decoding.decode_mask(content.mask, picture.size, config.max_pixels)
        if decoding.is_black(mask):
            notes.append("a black mask, so nothing in them counts but by loss.unmasked_weight")
    return picture.size, picture.is_transparent, notes


class _Repeated:
    """Remembers which source had a picture first, under any path to it."""

    def __init__(self) -> None:
        self.first: dict[str, tuple[str, SourceConfig]] = {}
        self.real = cache(os.path.realpath)

    def source(self, path: str, source: SourceConfig) -> SourceConfig | None:
        """The source in which this picture was found before, under this path or another."""
        folder, name = os.path.split(path)
        here = (path, source)
        earlier = self.first.setdefault(os.path.join(self.real(folder), name), here)
        return earlier[1] if earlier is not here else None
