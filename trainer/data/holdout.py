"""Pictures that are never trained on, by which memorising can be told from learning."""

import hashlib
from collections.abc import Sequence

from trainer.errors import UserError


def held_out(names: Sequence[str], count: int) -> list[int]:
    """The places of the last `count` of these names in the order of their hashes.

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
    return sorted(by_hash[len(names) - count :])


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
