"""Pictures that are never trained on, to distinguish memorising from learning."""

import hashlib
from collections.abc import Collection

from trainer.errors import UserError
from trainer.wording import plural


def holdout(digests: Collection[str], count: int) -> set[str]:
    """Choose `count` of these digests to hold out: the last ones, ordered by a hash of them.

    The order depends neither on the seed, nor on names or other pictures, so every run holds out
    the same ones, and an added picture can at most replace one of them.  Pictures that are equal
    byte for byte count as one.  The hash is salted, so that it is independent of other choices by
    digest.

    Raises UserError if nothing would be left to train on.
    """
    different = set(digests)
    if count and count >= len(different):
        most, verb = len(different) - 1, "is" if len(different) == 1 else "are"
        raise UserError(
            f"data.holdout={count}: there {verb} {plural(len(different), 'different picture')} "
            "(not counting prior sources), and none would be left to train on; hold out "
            f"{f'at most {most}' if most > 0 else 'none'}"
        )
    return set(sorted(different, key=_order)[len(different) - count :])


def _order(digest: str) -> bytes:
    return hashlib.sha256(f"holdout {digest}".encode()).digest()
