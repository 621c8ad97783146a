"""Merging: a LoRA's change added to the weights of a model, which is then written as a whole.

One tensor at a time: a weight is read, changed in fp32 and rounded to its final dtype when it is
written, and again when the written file is compared with it.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.export import models
from trainer.export.request import Request
from trainer.formats import schedulers, stream, writing
from trainer.formats.adapter import Adapter
from trainer.formats.adapters import Adapters, all_of, title
from trainer.formats.names import canonical
from trainer.formats.origin import Origin
from trainer.formats.weights import Lazy, Weights
from trainer.wording import plural

log = logging.getLogger(__name__)

_COARSE = 0.1  # share of what is added that rounding changes, from which on there is a warning


@dataclass(kw_only=True)
class _Rounding:
    """What rounding does to the merged weights, over all that were read."""

    added: float = 0.0  # the sum of squares of what is added to the weights
    changed: float = 0.0  # the sum of squares of what rounding then changes

    def note(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one weight.  before: the model's; exact, rounded: the merged one."""
        self.added += float((exact - before.float()).square().sum())
        self.changed += float((rounded.float() - exact).square().sum())

    @property
    def share(self) -> float:
        """The size of the rounding error, relative to what is added."""
        return (self.changed / self.added) ** 0.5 if self.added else 0.0


def write(
    source: Path, request: Request, base: Origin, held: Adapters, described: dict[str, str]
) -> None:
    """Write `base` with these adapters merged into it.  described: the LoRA's own metadata."""
    models.check_weights(base, "to merge SOURCE into")
    scale = 1.0 if request.scale is None else request.scale
    rounding = _Rounding()
    parts: dict[str, writing.PartSource] = {
        part: _merged(part, base.weights(part), adapters, scale, request.dtype, rounding)
        for part, adapters in held.items()
    }
    names = ", ".join(_name(path) for path in (str(request.base), str(source)))
    own = schedulers.usable(base.config("scheduler"))
    scheduler = schedulers.with_lora(source, described, own)
    models.write(request, base, parts, scheduler, {"modelspec.merged_from": names})
    count = len(all_of(held))
    message = "%s: with %s of %s merged, scale %g (rounding changes %.1e of what is added)"
    log.info(message, request.target, plural(count, "adapter"), source, scale, rounding.share)
    if rounding.share > _COARSE:
        log.warning(
            "rounding changes %.0f%% of what the %s adds; --dtype=float32, or float16 instead of "
            "bfloat16, keeps more of it",
            100 * rounding.share,
            title(held),
        )


def _name(path: str) -> str:
    """The last part of a path or a hub repository's name, without a file's suffix."""
    return Path(path).name.removesuffix(".safetensors")


def _merged(
    part: str,
    weights: Weights,
    adapters: dict[str, Adapter],
    scale: float,
    dtype: torch.dtype | None,
    rounding: _Rounding,
) -> Weights:
    """A part's tensors, those with an adapter changed when they are read.

    dtype: of the changed ones, which are rounded once; None: that of the model.
    """
    changed: Weights = {}
    for path, adapter in adapters.items():
        name = canonical(part, f"{path}.weight")
        own = weights[name]
        final = dtype or own.dtype
        read = partial(_read, f"{part}.{name}", own, adapter, scale, final, rounding)
        changed[name] = Lazy(shape=own.shape, dtype=final, read=read)
    return weights | changed


def _read(
    name: str,
    own: Lazy,
    adapter: Adapter,
    scale: float,
    dtype: torch.dtype,
    rounding: _Rounding,
) -> Tensor:
    """A merged weight in `dtype`.  Raises UserError if it is not finite."""
    before = own.read()
    exact = adapter.merged(before, scale)
    if not exact.isfinite().all():
        raise UserError(
            f"{name} is not finite with SOURCE merged into it; one of the two is damaged"
        )
    result = stream.rounded(name, exact, dtype)
    rounding.note(before, exact, result)
    return result
