"""Pictures that are never trained on, by which memorising can be told from learning."""

import hashlib
from collections.abc import Collection

from trainer.errors import UserError


def holdout(digests: Collection[str], count: int) -> set[str]:
    """The `count` pictures to hold out, of those with these digests: the last in the order of a
    hash of them.

    The order depends neither on the seed, on names, nor on what else there is: every run holds out
    the same pictures, and one that is added puts at most itself in another's place.  Pictures that
    are equal byte for byte are one.  The hash is salted, so that another choice by the same digests
    is not this one.

    Raises UserError where nothing would be left to train on.
    """
    different = set(digests)
    if count and count >= len(different):
        raise UserError(
            f"data.holdout={count}: there are {len(different)} different pictures, and none would "
            f"be left to train on; hold out at most {len(different) - 1}"
        )
    return set(sorted(different, key=_order)[len(different) - count :])


def _order(digest: str) -> bytes:
    return hashlib.sha256(f"holdout {digest}".encode()).digest()
