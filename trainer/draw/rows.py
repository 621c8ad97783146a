"""The rows of a grid: for each source the model that it draws with, and its own base model."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import ModelConfig, of_saved, values_of
from trainer.draw.request import Request
from trainer.draw.sources import Source, first_run
from trainer.errors import UserError
from trainer.formats import kinds
from trainer.formats.hub import why_missing
from trainer.formats.weights import of_file
from trainer.storage import checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model, and perhaps a LoRA on it."""

    title: str
    model: ModelConfig
    option: str = "SOURCE"  # that named the model, for errors
    lora: Path | None = None
    scale: float = 1.0  # of the LoRA
    sketch: str | None = None  # of the model that must be there


def of_sources(sources: Sequence[Source], request: Request, device_type: str) -> list[Row]:
    """The rows in the order of the sources, each base model before the first source that needs it,
    unless it is a source itself.

    Raises UserError for a LoRA without a base model, and for options without a LoRA.
    """
    _refuse_idle(sources, request)
    usual = _usual(sources, request, device_type)
    models = [_model(source, usual, request) for source in sources]
    given = [own for own, source in zip(models, sources, strict=True) if not source.is_lora]
    rows: list[Row] = []
    for source, own in zip(sources, models, strict=True):
        base = own if source.is_lora else _before(source, usual, request)
        known = [*given, *(row.model for row in rows)]
        if request.with_base and base and base not in known:
            name = Path(base.path).name.removesuffix(".safetensors")
            option = "--base" if request.base else "model.path"
            rows.append(Row(title=f"{name}\n(base)", model=base, option=option))
        rows += _of_source(source, own, request)
    return _numbered(rows)


def _of_source(source: Source, model: ModelConfig, request: Request) -> list[Row]:
    if not source.is_lora:
        return [Row(title=source.title, model=model)]
    option = "--base" if request.base else "model.path"
    row = Row(
        title=source.title,
        model=model,
        option=option,
        lora=Path(source.place),
        sketch=None if request.base else _sketch(source),
    )
    if request.scales is None:
        return [row]
    return [
        replace(row, title=f"{row.title}\nscale {scale:g}", scale=scale) for scale in request.scales
    ]


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """The rows, with numbers where titles are the same: of models that differ in options, say."""
    titles = [row.title for row in rows]
    counts = [titles[:place].count(title) for place, title in enumerate(titles)]
    return [
        replace(row, title=f"{row.title}\n({count + 1})") if count else row
        for row, count in zip(rows, counts, strict=True)
    ]


def _sketch(source: Source) -> str | None:
    """Of the model that a run started from, as its checkpoints tell; None if unknown."""
    every = checkpoint.found_in(source.run) if source.run else []
    return checkpoint.model_of(every[-1]) if every else None


def _refuse_idle(sources: Sequence[Source], request: Request) -> None:
    if not any(source.is_lora for source in sources):
        if request.scales is not None:
            raise UserError("--scale is the strength of a LoRA, and there is none; leave it out")
        if request.base and not first_run(sources):
            raise UserError("--base is the model of LoRAs, and there is none; leave it out")


def _usual(sources: Sequence[Source], request: Request, device_type: str) -> dict[str, Any]:
    """The options of a model that is no run's.  Its precision is that of the first run, so that
    rows can be compared, or else bf16, and fp32 on a CPU."""
    usual = values_of("model", "sdxl") | ({"dtype": "float32"} if device_type == "cpu" else {})
    run = first_run(sources)
    if run:
        known = run.config["model"]
        usual |= {key: known[key] for key in ("dtype", "compute") if key in known}
    return usual


def _model(source: Source, usual: dict[str, Any], request: Request) -> ModelConfig:
    """The model that a source draws with: itself, or a LoRA's base model."""
    if source.is_lora:
        return _base(source, usual, request)
    known = source.config.get("model", {}) | {"quantization": "none", "vae": None}
    variant = None if source.run else request.variant
    return _configured(usual, known, request, source.place, variant)


def _base(source: Source, usual: dict[str, Any], request: Request) -> ModelConfig:
    """The base model of a run's result, or of a LoRA file."""
    known = source.config.get("model", {})
    if request.base:
        return _configured(usual, known, request, request.base, request.variant)
    if not known:
        kind = kinds.adapters_in(of_file(Path(source.place))[0])
        raise UserError(
            f"{source.place} is a {kind}, and draws with the model that it belongs to: --base=MODEL"
        )
    if why_missing("model.path", str(known["path"])):
        raise UserError(
            f"the model that {source.run} started from is no longer at {known['path']}; give its "
            "new location: --base=MODEL"
        )
    variant = request.variant or known.get("variant")
    return _configured(usual, known, request, str(known["path"]), variant)


def _before(source: Source, usual: dict[str, Any], request: Request) -> ModelConfig | None:
    """The model that a run started from which trained all of it; None if there is no run, or it is
    gone, as it is only for comparison."""
    if not source.run or not request.with_base:
        return None
    try:
        return _base(source, usual, request)
    except UserError as error:
        log.warning("no row of the base model: %s", error)
        return None


def _configured(
    usual: dict[str, Any],
    known: dict[str, Any],
    request: Request,
    path: str,
    variant: str | None,
) -> ModelConfig:
    """A model's configuration: the usual one, changed by what is known of its run, and by the
    request."""
    if (local := Path(path).expanduser()).exists():  # so that a model is the same by any path
        path = os.path.abspath(local)
    options = known | {"path": path, "variant": variant}
    if request.dtype:
        options |= {"dtype": request.dtype, "compute": "same"}
    if request.quantization:
        options["quantization"] = request.quantization
    return of_saved("model", ModelConfig, options, usual)
