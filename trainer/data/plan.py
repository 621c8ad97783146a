"""The order of batches: which samples make up batch n.

A batch depends only on (seed, n), so a resumed run needs no sampler state, and runs that differ in
the optimizer see the same batches.  With one bucket, the epochs' permutations are concatenated and
batch n takes `batch_size` entries from n * `batch_size` on.  With several, an epoch is a list of
batches, each from one bucket, shuffled anew for the epoch.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from optim import rng
from trainer.data.buckets import Size
from trainer.streams import Stream


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One sample of a batch, and its caption."""

    sample: int
    caption: str | None  # None: dropped, the empty prompt


class BatchPlan:
    """Batches over `members`: {bucket: its samples, each as often as an epoch shows it}."""

    def __init__(self, members: dict[Size, list[int]], batch_size: int, repeats_short: bool):
        self.members = [members[bucket] for bucket in sorted(members)]
        self.buckets = sorted(members)
        self.batch_size = batch_size
        self.repeats_short = repeats_short
        self._order = lru_cache(maxsize=8)(self._permutation)
        self._epoch = lru_cache(maxsize=2)(self._batches)

    @property
    def pictures_per_epoch(self) -> int:
        return sum(map(len, self.members))

    @property
    def batches_per_epoch(self) -> Fraction:
        """A whole number if there are several buckets."""
        if len(self.members) == 1:
            return Fraction(len(self.members[0]), self.batch_size)
        return Fraction(sum(self.batches_of(len(m)) for m in self.members))

    def batches_of(self, count: int) -> int:
        """How many batches a bucket of `count` pictures yields per epoch."""
        return -(-count // self.batch_size)

    def batch(self, seed: int, number: int) -> list[int]:
        """The samples of batch `number` (from 0), all from one bucket."""
        if len(self.members) > 1:
            epoch, index = divmod(number, int(self.batches_per_epoch))
            return self._epoch(seed, epoch)[index]
        (members,) = self.members
        count = len(members)
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        return [members[self._order(seed, p // count, 0)[p % count]] for p in positions]

    def _batches(self, seed: int, epoch: int) -> list[list[int]]:
        """All batches of an epoch, in order."""
        batches, size = [], self.batch_size
        for bucket, members in enumerate(self.members):
            order = [members[i] for i in self._order(seed, epoch, bucket)]
            if self.repeats_short:
                order += [order[i % len(order)] for i in range(-len(order) % size)]
            batches += [order[i : i + size] for i in range(0, len(order), size)]
        counters = (seed, Stream.EPOCH, epoch, len(self.members), 0)
        order = torch.randperm(len(batches), generator=rng.generator(*counters)).tolist()
        return [batches[i] for i in order]

    def _permutation(self, seed: int, epoch: int, bucket: int) -> list[int]:
        counters = (seed, Stream.EPOCH, epoch, *([bucket] if bucket else []))
        count = len(self.members[bucket])
        return torch.randperm(count, generator=rng.generator(*counters)).tolist()
