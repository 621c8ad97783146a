"""What a survey of the data found: what stops a run, what it warns of, what the doctor lists."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from trainer.config import DataConfig
from trainer.data import captions, sources
from trainer.data.buckets import LATENT_SCALE
from trainer.data.plan import BatchPlan
from trainer.data.sample import Sample
from trainer.data.survey import Survey, UsablePicture
from trainer.errors import UserError
from trainer.wording import counted, plural, some

log = logging.getLogger(__name__)

_MUCH = 1 / 3  # of a picture's area


def refuse(surveyed: Survey, config: DataConfig) -> None:
    """Raise UserError for problems that stop a run; warn about the others."""
    for what, names in (surveyed.problems | surveyed.remarks).items():
        log.warning("data: %s: %s", counted(len(names), what), some(names))
    for wrong in (surveyed.broken, surveyed.undecodable):
        if wrong:
            more = f" (and {len(wrong) - 1} more like it: `python -m trainer.doctor` lists them)"
            raise UserError(wrong[0] + (more if len(wrong) > 1 else ""))
    if not surveyed.count:
        raise nothing_found(surveyed, config)
    if surveyed.uncaptioned:
        extensions = " or ".join(config.caption_extensions)
        names = surveyed.uncaptioned
        what = (
            f"pictures have no {extensions} file next to them, and no caption in metadata or a "
            "table"
        )
        message = f"{counted(len(names), what)}: {some(names)}"
        if config.on_missing_caption == "error":
            raise UserError(f"{message}; write them, or set data.on_missing_caption=empty or skip")
        skipped = config.on_missing_caption == "skip"
        log.warning("%s; %s", message, "skipped" if skipped else "trained without a caption")
    for name, reason in surveyed.unreadable.items():
        log.warning("skipped unreadable picture %s: %s", name, reason)
    if len(surveyed.unreadable) > config.max_unreadable:
        name, reason = list(surveyed.unreadable.items())[-1]
        count = plural(len(surveyed.unreadable), "unreadable picture")
        raise UserError(
            f"{count}, the last {name} ({reason}); "
            f"remove such files, or allow more with data.max_unreadable={len(surveyed.unreadable)}"
        )
    if not surveyed.usable:
        raise UserError(
            f"data.path={_where(config)}: no picture of {surveyed.count} can be used; see the "
            "warnings above"
        )


def nothing_found(surveyed: Survey, config: DataConfig) -> UserError:
    """The error for data without pictures; says what was found instead."""
    others = (surveyed.problems | surveyed.remarks).items()
    instead = [f"{counted(len(names), what)}: {some(names)}" for what, names in others]
    broken = [some(surveyed.broken)] if surveyed.broken else []
    return UserError("; ".join([f"data.path={_where(config)} has no pictures", *broken, *instead]))


def report(surveyed: Survey, config: DataConfig) -> None:
    """Log what will be trained on, and warn about what may surprise the user."""
    for what, names in (_of_usable(surveyed, config) | _of_masks(surveyed, config)).items():
        if names:
            log.warning("%s: %s", counted(len(names), f"pictures {what}"), some(names))
    message = "data: %s in %s, %d unreadable, %d without a caption"
    count = len(sources.of_config(config))
    log.info(
        message,
        plural(len(surveyed.usable), "picture"),
        _where(config) if count == 1 else f"{count} sources",
        len(surveyed.unreadable),
        len(surveyed.uncaptioned),
    )
    for line in of_sources(surveyed, config):
        log.info("%s", line)
    for line in _without_effect(surveyed, config):
        log.warning("%s", line)


def _without_effect(surveyed: Survey, config: DataConfig) -> Iterator[str]:
    """A line for each option that these pictures and captions give no work."""
    if config.kohya_folders and len(sources.of_config(config)) == max(len(config.sources), 1):
        yield (
            "data.kohya_folders=true has no effect: no folder in the sources is named "
            "REPEATS_CAPTION, such as '10_sks cat'; name the folder that holds such folders"
        )
    mark, texts = config.keep_separator, {t for p in surveyed.usable for t in p.captions}
    if mark and not any(mark in text for text in texts):
        yield f"data.keep_separator={mark} has no effect: no caption contains it"
    if config.shuffle_tags and all(len(captions.free_tags(t, config)) < 2 for t in texts):
        yield (
            "data.shuffle_tags=true has no effect: no caption has two tags that may move, with "
            f"data.tag_separator={config.tag_separator} between them"
        )
    if config.tag_dropout and not any(captions.free_tags(t, config) for t in texts):
        yield (
            f"data.tag_dropout={config.tag_dropout:g} has no effect: no caption has a tag that may "
            "be dropped"
        )
    fits = [fit for picture in surveyed.usable for fit in picture.fits]
    if config.crops > 1 and all(len(fit.places(config.crops)) == 1 for fit in fits):
        yield (
            f"data.crops={config.crops} has no effect: no crop cuts off {LATENT_SCALE} pixels or "
            "more"
        )


def of_sources(surveyed: Survey, config: DataConfig) -> list[str]:
    """A line about each of several sources, and about one with repeats; and a caption as it is
    trained."""
    by_path = {source.path: source for source in sources.of_config(config)}
    counts, lines = Counter(picture.source.path for picture in surveyed.usable), []
    for path, source in by_path.items():
        count, told = counts[path], []
        if source.repeats > 1:
            told.append(f"{source.repeats} times each: {count * source.repeats} in an epoch")
        if source.prior:
            told.append("regularisation (prior)")
        if source.weight != 1:
            told.append(f"weight {source.weight:g}")
        if told or len(by_path) > 1:
            lines.append(f"  {path}: " + ", ".join([plural(count, "picture"), *told]))
    first = next((p for p in surveyed.usable if p.captions[0] and not p.source.prior), None)
    if first:
        lines.append(f'  a caption: "{captions.framed(first.captions[0], config)}"')
    return lines


def of_batches(plan: BatchPlan, samples: list[Sample]) -> dict[str, list[str]]:
    """What is odd about batches of these samples, as the doctor lists it."""
    if len(plan.buckets) > 1 or plan.batch_size <= plan.pictures_per_epoch:
        return {}
    what = "pictures are in a batch several times, as an epoch has fewer than data.batch_size"
    names = dict.fromkeys(samples[i].name for i in plan.members[0])
    return {f"{what}={plan.batch_size}": list(names)}


def problems(surveyed: Survey, config: DataConfig) -> dict[str, list[str]]:
    """What the doctor lists: {kind of problem: names of the pictures, captions or files}."""
    by_bytes = defaultdict(list)
    for picture in surveyed.usable:
        by_bytes[picture.digest].append(picture.item.name)
    uncaptioned = set(surveyed.uncaptioned)
    listed = {
        "parts of the data (archives, tables, lines of metadata) cannot be read": surveyed.broken,
        "pictures cannot be read": [f"{k}: {v}" for k, v in surveyed.unreadable.items()],
        "captions cannot be decoded": surveyed.undecodable,
        "pictures have no caption": surveyed.uncaptioned,
        "captions are empty": [
            name
            for name in _names(surveyed, lambda p: not all(p.captions))
            if name not in uncaptioned
        ],
        "pictures are there several times, byte for byte": [
            " = ".join(names) for names in by_bytes.values() if len(names) > 1
        ],
    }
    listed |= {f"pictures {what}": names for what, names in _of_usable(surveyed, config).items()}
    return {what: names for what, names in (listed | surveyed.problems).items() if names}


def _of_usable(surveyed: Survey, config: DataConfig) -> dict[str, list[str]]:
    """{what is odd, to follow the word "pictures": names of the usable pictures concerned}."""
    fate = "enlarged" if config.upscale or not config.buckets else "trained at their own size"
    small = [
        f"{picture.item.name}: {picture.size[1]} x {picture.size[0]}"
        for picture in surveyed.usable
        if any(fit.undersized for fit in picture.fits)
    ]
    cropped = [
        f"{picture.item.name}: {picture.size[1]} x {picture.size[0]}, {lost:.0%}"
        for picture in surveyed.usable
        if config.buckets and (lost := max(fit.lost for fit in picture.fits)) > _MUCH
    ]
    notes = {f"have {note}": names for note, names in surveyed.notes.items()}
    again = "have a caption that already begins with data.caption_prefix"
    return {
        f"are smaller than their bucket, {fate}": small,
        "have more than a third of their area cut off to fit a bucket "
        f"(data.max_aspect={config.max_aspect:g}, data.bucket_step={config.bucket_step})": cropped,
        again: _names(surveyed, lambda p: _is_prefixed(p, config)),
    } | notes


def _of_masks(surveyed: Survey, config: DataConfig) -> dict[str, list[str]]:
    """The same about masks; the doctor does not count these as problems."""
    if config.mask == "file":
        whole = "have no mask; the loss covers all of them"
        return {whole: _names(surveyed, lambda p: p.item.read_mask is None)}
    unread = f"have a mask that data.mask={config.mask} does not read"
    remarks = {unread: _names(surveyed, lambda p: p.item.read_mask is not None)}
    if config.mask == "alpha":
        opaque = "have no transparent part; the loss covers all of them"
        remarks[opaque] = _names(surveyed, lambda p: not p.is_transparent)
    return remarks


def _names(surveyed: Survey, which: Callable[[UsablePicture], bool]) -> list[str]:
    return [picture.item.name for picture in surveyed.usable if which(picture)]


def _is_prefixed(picture: UsablePicture, config: DataConfig) -> bool:
    prefix = config.caption_prefix.strip(" ,.;:").lower()
    is_framed = bool(prefix) and not picture.source.prior
    return is_framed and any(text.lower().startswith(prefix) for text in picture.captions)


def _where(config: DataConfig) -> str:
    return ", ".join(source.path for source in sources.of_config(config))
