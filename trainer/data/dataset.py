"""The dataset of a run: its samples, their buckets, and the batches."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optim import rng
from trainer.config import DataConfig
from trainer.data import captions, findings
from trainer.data.buckets import Size
from trainer.data.holdout import holdout
from trainer.data.plan import BatchPlan, Pick
from trainer.data.sample import Sample
from trainer.data.survey import UsablePicture, survey
from trainer.streams import Stream
from trainer.wording import counted, some

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Dataset:
    """All samples, one resolution after another, each with its regularisation pictures last; other
    crops and mirror images, which are only trained on, follow at the end."""

    samples: list[Sample]
    views: dict[int, list[int]]  # trained sample -> those of which a step draws one in its place
    plan: BatchPlan  # of central crops
    config: DataConfig

    @property
    def own(self) -> list[int]:
        """The samples for eval points and generated pictures: the central crop of all trained ones
        except those of `prior` sources.  If all sources are `prior`, theirs are used."""
        samples = enumerate(self.samples)
        trained = [i for i, sample in samples if sample.is_central and not sample.held_out]
        return [i for i in trained if not self.samples[i].prior] or trained

    @property
    def shown(self) -> list[int]:
        """The samples to generate pictures of: each picture of `own` once, at its largest size."""
        by_area = sorted(self.own, key=lambda row: math.prod(self.samples[row].bucket))
        largest = {id(self.samples[row].item): row for row in by_area}
        return list(dict.fromkeys(largest[id(self.samples[row].item)] for row in self.own))

    @property
    def held_out(self) -> list[int]:
        """The samples that are never trained on."""
        return [i for i, sample in enumerate(self.samples) if sample.held_out]

    @property
    def fingerprint(self) -> str:
        """A hash of what is trained on: pictures, sizes, captions and how often, in order."""
        digest = hashlib.sha256()
        for s in self.samples:
            parts = (s.digest, s.transform, s.time_ids, s.caption, s.captions, s.loss_weight)
            digest.update(repr(parts).encode())
        digest.update(repr((self.plan.buckets, self.plan.members)).encode())
        return digest.hexdigest()

    def batch(self, seed: int, number: int) -> list[Pick]:
        """Batch `number` (from 0); depends on nothing but the two arguments.  All picks share one
        bucket.  A bucket's last batch may be smaller than `batch_size`."""
        return [
            Pick(
                sample=self._view(index, seed, number, position),
                caption=self.caption(index, seed, number, position),
            )
            for position, index in enumerate(self.plan.batch(seed, number))
        ]

    def _view(self, index: int, seed: int, number: int, position: int) -> int:
        """One of a sample's views, all equally likely."""
        views = self.views[index]
        return views[int(rng.uniform(seed, Stream.VIEW, number, position) * len(views))]

    def all_captions(self) -> list[str]:
        """Every distinct caption that a batch or an eval point may use."""
        texts = (text for s in self.samples for text in (s.caption, *s.captions))
        return list(dict.fromkeys(texts))

    def table(self) -> str:
        """A table of buckets with their picture and batch counts."""
        plan = self.plan
        if len(plan.buckets) == 1:
            ((height, width),) = plan.buckets
            return (
                f"one bucket of {width} x {height}, batches of {plan.batch_size}, "
                f"{round(float(plan.batches_per_epoch), 3):g} per epoch"
            )
        lines = ["  width x height  pictures  batches per epoch"]
        for (height, width), members in zip(plan.buckets, plan.members, strict=True):
            batches, rest = plan.batches_of(len(members)), len(members) % plan.batch_size
            how = "filled by repeating" if plan.repeats_short else f"of {rest}"
            note = f", the last {how}" if rest else ""
            lines.append(f"{width:>7} x {height:<6}{len(members):>10}{batches:>9}{note}")
        total = f"{len(plan.buckets)} buckets, batches of {plan.batch_size}, "
        return "\n".join([f"{total}{float(plan.batches_per_epoch):g} per epoch:", *lines])

    def caption(self, index: int, seed: int, number: int, position: int) -> str | None:
        """The caption of the sample at this position of batch `number`; None if it is dropped."""
        if rng.uniform(seed, Stream.DROPOUT, number, position) < self.config.caption_dropout:
            return None
        drawn = self.samples[index].captions
        share = rng.uniform(seed, Stream.CAPTION, number, position)
        return drawn[int(share * len(drawn))]


def load(config: DataConfig, stop: Sequence[int] = ()) -> Dataset:
    """Read all pictures and captions and plan the batches.  Logs what is skipped.

    Raises UserError if there are no pictures, more than `max_unreadable` cannot be read, a caption
    cannot be decoded, or one is missing and that is an error; SystemExit once `stop` holds a
    signal.
    """
    surveyed = survey(config, for_run=True, stop=stop)
    findings.refuse(surveyed, config)
    dataset = build(surveyed.usable, config)
    findings.report(surveyed, config)
    if config.holdout:
        held_out = [dataset.samples[i].name for i in dataset.held_out]
        log.info("data: %s: %s", counted(config.holdout, "pictures are held out"), some(held_out))
    log.info("data: %s", dataset.table())
    for what, names in findings.of_batches(dataset.plan, dataset.samples).items():
        log.warning("%s", counted(len(names), what))
    return dataset


def build(usable: list[UsablePicture], config: DataConfig) -> Dataset:
    """Samples and plan of these pictures.  Raises UserError if all of them would be held out."""
    usable = sorted(usable, key=lambda picture: picture.source.prior)  # stable
    held_out = holdout(
        [picture.digest for picture in usable if not picture.source.prior], config.holdout
    )
    samples: list[Sample] = []
    members: dict[Size, list[int]] = {}
    # All pictures at one resolution, then all at the next.
    for index in range(max(len(config.resolutions), 1)):
        for picture in usable:
            if index < len(picture.fits):
                sample = _sample(picture, index, config, picture.digest in held_out)
                if not sample.held_out:
                    indexes = members.setdefault(sample.bucket, [])
                    indexes += [len(samples)] * picture.source.repeats
                samples.append(sample)
    plan = BatchPlan(members, config.batch_size, config.short_batches == "repeat")
    views: dict[int, list[int]] = {}
    for index, sample in enumerate(list(samples)):
        if sample.held_out:
            continue
        views[index] = []
        for view in sample.views():
            if view.is_central:
                views[index].append(index)
            else:
                views[index].append(len(samples))
                samples.append(view)
    return Dataset(samples=samples, views=views, plan=plan, config=config)


def _sample(picture: UsablePicture, index: int, config: DataConfig, is_held_out: bool) -> Sample:
    first_caption, frame = picture.captions[0], not picture.source.prior
    return Sample(
        item=picture.item,
        source=Path(picture.source.path).expanduser().resolve().name,
        digest=picture.digest,
        picture_digest=picture.picture_digest,
        is_transparent=picture.is_transparent,
        caption=(captions.framed if frame else captions.plain)(first_caption, config),
        captions=tuple(
            variant
            for text in picture.captions
            for variant in captions.variants(text, config, frame)
        ),
        size=picture.size,
        fit=picture.fits[index],
        loss_weight=picture.source.weight * picture.item.weight,
        prior=picture.source.prior,
        held_out=is_held_out,
        config=config,
    )
