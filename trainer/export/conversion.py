"""Conversion: identifying what a path holds, and writing it in another format."""

import logging
import math
from dataclasses import replace
from pathlib import Path

from trainer.errors import UserError
from trainer.export import checkpoints, extraction, loras, models
from trainer.export.request import Request
from trainer.formats import architectures, kinds, origin
from trainer.formats.hub import why_missing
from trainer.formats.weights import of_file
from trainer.models.model import Model
from trainer.reporting import report
from trainer.storage import checkpoint, result_files
from trainer.storage.steps import step_of

log = logging.getLogger(__name__)


def convert(request: Request) -> None:
    """Write the source as the target.

    Raises UserError for what cannot be read, written or verified.
    """
    request.check()
    named = Path(request.source).expanduser()
    path = _in_run(named)
    if (path / "checkpoint.json").is_file():
        checkpoints.convert(path, request)
    elif (lora := path / result_files.LORA_NAME).is_file():
        request.refuse_extract(f"{path} holds a LoRA")
        loras.convert(lora, _with_base(lora, request))
    elif path.is_file() and (kind := kinds.adapters_in(of_file(path)[0])):
        request.refuse_extract(f"{path} is a {kind}")
        if path != named and not request.merge:  # as for the run's checkpoints
            request = replace(request, form=request.form or "kohya")
        loras.convert(path, _with_base(path, request))
    else:
        if wrong := why_missing("SOURCE", request.source):
            raise UserError(wrong)
        request.refuse_merge(f"{path} is none")
        request.refuse_rank(f"{path} is a model")
        if request.base and not request.extract:
            raise UserError(f"--base={request.base} has no effect: {path} is a model, not a LoRA")
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise UserError(
                f"{path} is not a model, LoRA or run: it has no model_index.json, no "
                f"{result_files.LORA_NAME} and no checkpoint"
            )
        place = str(path) if path.exists() else request.source
        model = origin.at(place, request.variant, "SOURCE")
        if request.extract:
            _extract(path, model, request)
        else:
            models.write(request, model)


def _extract(path: Path, model: origin.Origin, request: Request) -> None:
    """Write what distinguishes this model from the one that it was fine-tuned from."""
    base = _base_of(path, request)
    parts = {part: model.weights(part) for part in architectures.WEIGHT_PARTS if model.has(part)}
    extraction.write(path, request, base, parts, model.config("scheduler"), {})


def _base_of(path: Path, request: Request) -> origin.Origin:
    """The model that --base names, or that the run of this model started from."""
    if request.base:
        return loras.base_model(request.base, request.variant, with_weights=True)
    if model := _original_of(path, request):
        log.info("fine-tuned from the model that the run started from: %s", model.config.path)
        return model.origin
    raise UserError("--extract needs the model that SOURCE was fine-tuned from: --base=MODEL")


def _with_base(lora: Path, request: Request) -> Request:
    """The request, with the model to merge this LoRA file into if it names none: the one that its
    run started from."""
    if not request.merge or request.base:
        return request
    if model := _original_of(lora, request):
        return checkpoints.with_original(model, request)
    raise UserError("--merge needs the model to merge SOURCE into: --base=MODEL")


def _original_of(path: Path, request: Request) -> Model | None:
    """The model that the run of this LoRA or model started from, which the run's checkpoints
    identify; None if there are none."""
    run = loras.run_of(path)
    every = checkpoint.found_in(run) if run else []
    return checkpoints.original(every[-1], request) if every else None


def _in_run(path: Path) -> Path:
    """What to convert for a run's folder: its model, its LoRA, or its last checkpoint."""
    if not path.is_dir() or (path / "model_index.json").is_file():
        return path
    every = checkpoint.found_in(path)
    result = result_files.found_in(path)
    if not result:
        return (every or [path])[-1]
    if every and step_of(every[-1]) > (step := _finished(path)):
        log.warning(
            "%s is from step %d, and the run has continued since; use %s for its last checkpoint",
            result,
            step,
            every[-1],
        )
    return result


def _finished(run: Path) -> float:
    """The step of a run's result; infinite if unknown."""
    step = report.result_step(report.read_summary(run))
    return math.inf if step is None else step
