"""Extraction: the difference between a fine-tuned model and its base, approximated by a LoRA.

One weight at a time: both are read, and the adapter of limited rank that is closest to their
difference is kept.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.export import loras, models
from trainer.export.kept import Kept
from trainer.export.request import Request
from trainer.formats import adapters, architectures, lora, low_rank, schedulers, stream
from trainer.formats.adapter import Lora
from trainer.formats.names import canonical
from trainer.formats.origin import Origin
from trainer.formats.weights import Lazy, Weights
from trainer.system import console
from trainer.wording import plural

log = logging.getLogger(__name__)

# kohya's script extracts rank 4, its user interface 128; this is 0.4 GB of half precision for
# SDXL's UNet, which has 5.1.
DEFAULT_RANK = 64
# The layers that every program's LoRAs may change.  Others, such as conv_in and time_embedding,
# kohya's script does not extract, and diffusers 0.38, by its source, rejects a file that has them.
_IN_BLOCKS = re.compile(r"(down_blocks|mid_block|up_blocks|encoder\.layers)\.")
_UNHELD = "biases, norms, embeddings, the first and last layers"
_NOTED = 0.01  # share of the change that is rounding, from which on it is mentioned


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A tensor of both models."""

    part: str
    name: str
    tuned: Lazy
    own: Lazy  # the base's
    module: str | None  # the layer whose weight it is; None for what no LoRA changes

    def __str__(self) -> str:
        return f"{self.part}.{self.name}"

    @property
    def side(self) -> int:
        """The shorter side of a layer's matrix, on which the time depends most; 0 for others."""
        shape = self.own.shape
        return min(shape[0], math.prod(shape[1:])) if self.module else 0


@dataclass(kw_only=True)
class _Seen:
    """What is measured while the weights are read."""

    kept: Kept
    rounding: float = 0.0  # sum of squares of what the base changes in the fine-tuned dtypes
    others: int = 0  # how many tensors have changed that no LoRA changes

    def count_other(self, change: Tensor | None) -> None:
        """Count a tensor that no LoRA changes."""
        if change is not None:
            self.kept.beside += float(change.square().sum())
            self.others += 1


def write(
    source: Path,
    request: Request,
    base: Origin,
    parts: Mapping[str, Weights],
    scheduler: dict[str, Any],
    described: dict[str, str],
) -> None:
    """Write what distinguishes a model from its base as a LoRA.

    parts: of the fine-tuned model, those that may differ from the base's.  scheduler: that of the
    fine-tuned model.  described: further metadata of the file.
    """
    models.check_weights(base, "that SOURCE was fine-tuned from")
    form = loras.form_of(request, "kohya", base, {}, "--extract writes a LoRA")
    rank = DEFAULT_RANK if request.rank is None else request.rank
    pairs = _pairs(source, base, {part: w for part, w in parts.items() if part != "vae"})
    log.info("%s - %s -> %s (a LoRA in %s format)", source, base, request.target, form)
    seen = _Seen(kept=Kept())
    held = _extracted(source, base, pairs, rank, request.dtype, seen)
    told = described | schedulers.described_lora(scheduler)
    lora.save_lora(request.target, form, loras.empty(base), base.kind, None, told, adapters=held)
    _tell_what_is_missing(base, parts, scheduler)
    _report(request.target, held, rank, seen)


def _pairs(source: Path, base: Origin, parts: Mapping[str, Weights]) -> list[_Pair]:
    """The tensors of both models.  Raises UserError if their architectures differ."""
    different = f"{source} and {base} have different architectures"
    remedy = "name the model that the first was fine-tuned from: --base=MODEL"
    every = []
    for part, weights in parts.items():
        if not base.has(part):
            raise UserError(f"{different}: the second has no {part}; {remedy}")
        tuned, own = (_named(part, w) for w in (weights, base.weights(part)))
        wanted = architectures.shapes(part, base.config(part))
        for name in (*wanted, *(tuned if part == "unet" else ())):
            shapes = [w[name].shape if name in w else None for w in (tuned, own)]
            if shapes[0] != shapes[1] or None in shapes:
                there, here = ("missing" if s is None else s for s in shapes)
                raise UserError(
                    f"{different}: {name} of the {part} is {there} in the first and {here} in the "
                    f"second; {remedy}"
                )
        layers = _layers(part, base)
        every += [
            _Pair(part=part, name=n, tuned=tuned[n], own=own[n], module=layers.get(n))
            for n in wanted
        ]
    return every


def _named(part: str, weights: Weights) -> Weights:
    return {canonical(part, name): lazy for name, lazy in weights.items()}


def _layers(part: str, base: Origin) -> dict[str, str]:
    """The weights that a LoRA may change: their names -> the modules'."""
    paths = adapters.module_names(loras.empty(base)[part])
    return {canonical(part, f"{path}.weight"): path for path in paths if _IN_BLOCKS.search(path)}


def _extracted(
    source: Path,
    base: Origin,
    pairs: list[_Pair],
    rank: int,
    dtype: torch.dtype | None,
    seen: _Seen,
) -> adapters.Adapters:
    """The adapters of all layers that differ, in `dtype` (None: in that of the fine-tuned weight).
    Raises UserError if there are none, or a value is not finite."""
    held: adapters.Adapters = {}
    layers = sum(pair.module is not None for pair in pairs)
    with console.Aside("extracting", layers, "layers") as bar:
        for pair in sorted(pairs, key=lambda pair: -pair.side):  # so that the ETA does not rise
            change = _change(source, base, pair, seen)
            if pair.module is None:
                seen.count_other(change)
                continue
            if change is not None:
                adapter = _adapter(pair, change, rank, dtype, seen)
                held.setdefault(pair.part, {})[pair.module] = adapter
            bar.advance(1)
    if held:
        return held
    raise UserError(f"nothing to extract: {source} and {base} " + _why_nothing(seen.others))


def _adapter(
    pair: _Pair, change: Tensor, rank: int, dtype: torch.dtype | None, seen: _Seen
) -> Lora:
    closest, squares = low_rank.closest(change, rank)
    final = dtype or pair.tuned.dtype
    adapter = replace(
        closest,
        down=stream.rounded(f"the LoRA's down matrix of {pair}", closest.down, final),
        up=stream.rounded(f"the LoRA's up matrix of {pair}", closest.up, final),
    )
    lost = float((adapter.delta() - change).square().sum())
    seen.kept.note(float(change.square().sum()), lost, squares)
    return adapter


def _why_nothing(others: int) -> str:
    if others:
        only = plural(others, "tensor")
        return f"differ only in {only} that no LoRA changes ({_UNHELD}); share the whole model"
    return "have the same weights; name the model that the first was fine-tuned from: --base=MODEL"


def _change(source: Path, base: Origin, pair: _Pair, seen: _Seen) -> Tensor | None:
    """A tensor's change in fp32; None if it has none but that by rounding to another dtype."""
    tuned, own = pair.tuned.read(), pair.own.read()
    for tensor, where in ((tuned, source), (own, base)):
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {pair} has values that are not finite; it is damaged")
    if _equal(tuned, own):
        return None
    before = own.float()
    seen.rounding += float((own.to(tuned.dtype).float() - before).square().sum())
    return tuned.float() - before


def _tell_what_is_missing(
    base: Origin, parts: Mapping[str, Weights], scheduler: dict[str, Any]
) -> None:
    """Say what else differs: the noise schedule, and the VAE."""
    if schedulers.noise(scheduler) != schedulers.noise(base.config("scheduler")):
        log.warning(
            "the LoRA needs another noise schedule than %s has: load it with the scheduler of the "
            "fine-tuned model (--merge into this base sets it if it predicts v or a flow)",
            base,
        )
    if "vae" not in parts or not base.has("vae"):
        return
    tuned, own = (_named("vae", weights) for weights in (parts["vae"], base.weights("vae")))
    same = tuned.keys() == own.keys() and all(
        _equal(tuned[name].read(), lazy.read()) for name, lazy in own.items()
    )
    if not same:
        log.warning("the models have different VAEs, which no LoRA can hold; use that of SOURCE")


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same, or were before one was rounded to its dtype."""
    return torch.equal(one.to(two.dtype), two) or torch.equal(two.to(one.dtype), one)


def _report(target: Path, held: adapters.Adapters, rank: int, seen: _Seen) -> None:
    """Say which share of the change the LoRA keeps."""
    kept = seen.kept
    kept.report(rank)
    if (rounding := kept.share(seen.rounding)) > _NOTED:
        log.info(
            "rounding the base to the fine-tuned model's dtype alone would be %.0f%% of the "
            "change; hardly any rank keeps that",
            100 * rounding,
        )
    log.info(
        "%s: with rank %d in %s, it keeps %.1f%% of the change (of the sum of squares); %.1f%% are "
        "lost to the rank, and %.1f%% are in what no LoRA changes: %s",
        target,
        rank,
        plural(len(adapters.all_of(held)), "layer"),
        100 * kept.kept,
        100 * kept.share(kept.lost),
        100 * kept.share(kept.beside),
        _UNHELD,
    )
