"""Resizing: every adapter of a LoRA replaced by the closest one of a smaller rank."""

import logging
from dataclasses import replace
from pathlib import Path

from trainer.errors import UserError
from trainer.export.kept import Kept
from trainer.formats import low_rank
from trainer.formats.adapter import Adapter, Lora
from trainer.formats.adapters import Adapters, all_of
from trainer.system import console
from trainer.wording import plural

log = logging.getLogger(__name__)


def resized(source: Path, held: Adapters, rank: int, kept: Kept) -> Adapters:
    """The adapters with at most this rank, in their own dtype; those that have no more are
    unchanged.  Of DoRA, the delta is resized, and the magnitude stays.

    Raises UserError if none has more, one is not finite, or one is no LoRA.
    """
    loras = {
        part: {path: _lora(source, adapter, rank) for path, adapter in by_path.items()}
        for part, by_path in held.items()
    }
    every = all_of(held)
    if (most := max(adapter.rank for adapter in every)) <= rank:
        raise UserError(
            f"--rank={rank} has no effect: no adapter of {source} has a rank above {most}; leave "
            "out --rank"
        )
    with console.Aside("resizing", len(every), "adapters") as bar:
        made: Adapters = {}
        for part, by_path in loras.items():
            for path, adapter in by_path.items():
                where = f"{source}: {part}.{path}"
                made.setdefault(part, {})[path] = _resized(where, adapter, rank, kept)
                bar.advance(1)
    return made


def _lora(source: Path, adapter: Adapter, rank: int) -> Lora:
    if isinstance(adapter, Lora):
        return adapter
    raise UserError(
        f"--rank={rank} is for LoRAs, and {source} is a {adapter.method.title}; train one with a "
        "smaller method.rank, or merge it (--merge) and extract a LoRA from the result (--extract)"
    )


def _resized(where: str, adapter: Lora, rank: int, kept: Kept) -> Adapter:
    delta = adapter.delta()
    if not delta.isfinite().all():
        raise UserError(f"{where} is not finite; the LoRA is damaged")
    closest, squares = low_rank.resized(adapter, rank)
    smaller = adapter
    if adapter.rank > rank:
        rounded = closest.to(adapter.up.dtype)
        smaller = replace(rounded, magnitude=adapter.magnitude)
    lost = float((smaller.delta() - delta).square().sum())
    kept.note(float(delta.square().sum()), lost, squares)
    return smaller


def report(target: Path, before: Adapters, rank: int, kept: Kept) -> None:
    """Say what the resized LoRA keeps.  before: its adapters as they were."""
    every = all_of(before)
    kept.report(rank)
    if any("magnitude" in adapter.tensors() for adapter in every):
        log.info("DoRA's magnitudes are unchanged; what is said of the change is before them")
    log.info(
        "%s: with %d of %s resized to rank %d, it keeps %.1f%% of the LoRA's change (of the sum of "
        "squares)",
        target,
        sum(adapter.rank > rank for adapter in every),
        plural(len(every), "adapter"),
        rank,
        100 * kept.kept,
    )
