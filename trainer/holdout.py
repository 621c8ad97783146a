"""Pictures that are never trained on, by which memorising can be told from learning."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import UserError


@dataclass(kw_only=True)
class Split:
    """Row numbers of a data set, each in its order."""

    training: list[int]
    held_out: list[int]


def split(names: Sequence[str], count: int) -> Split:
    """Hold out the last `count` of these names in the order of their hashes.

    The order does not depend on the seed or on what else there is: every run holds out the same
    pictures, and one that is added to the folder puts at most itself in another's place.

    Raises UserError where nothing would be left to train on.
    """
    if count and count >= len(names):
        raise UserError(
            f"data.holdout={count}: there are {len(names)} pictures, and none would be left to "
            f"train on; hold out at most {len(names) - 1}"
        )
    by_hash = sorted(range(len(names)), key=lambda row: (_digest(names[row]), row))
    held_out = set(by_hash[len(names) - count :])
    rows = range(len(names))
    return Split(
        training=[row for row in rows if row not in held_out],
        held_out=[row for row in rows if row in held_out],
    )


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
