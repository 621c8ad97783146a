"""What a data set is made of, as kohya's scripts count it for a LoRA's metadata."""

from collections import Counter

from trainer.data.dataset import Dataset
from trainer.data.sample import Sample


def own_and_prior(dataset: Dataset) -> tuple[int, int]:
    """How many pictures an epoch shows: the user's own, and those of `prior` sources.

    Each counts as often as its source is repeated, and at every resolution; other crops and mirror
    images do not.
    """
    priors = [dataset.samples[i].prior for members in dataset.plan.members for i in members]
    return len(priors) - sum(priors), sum(priors)


def tag_frequency(dataset: Dataset) -> dict[str, dict[str, int]]:
    """How many of a source's own pictures have each tag in their (first) caption, in lower case:
    {the name of the source's folder: {tag: count}}, the commonest first."""
    pictures = {id(sample.item): sample for sample in _trained(dataset)}  # at one resolution
    by_source: dict[str, Counter[str]] = {}
    for sample in pictures.values():
        tags = (tag.strip().lower() for tag in sample.caption.split(sample.config.tag_separator))
        by_source.setdefault(sample.source, Counter()).update(tag for tag in tags if tag)
    return {source: dict(counter.most_common()) for source, counter in by_source.items()}


def _trained(dataset: Dataset) -> list[Sample]:
    """The samples that are trained on, except those of `prior` sources."""
    indexes = sorted({i for members in dataset.plan.members for i in members})
    return [dataset.samples[i] for i in indexes if not dataset.samples[i].prior]
