"""Writing a whole model: a diffusers folder, or a single file."""

import logging
from typing import Any

from trainer.config import FullConfig, words_of
from trainer.errors import UserError
from trainer.export.request import Request
from trainer.formats import writing
from trainer.formats.origin import Architecture, Origin

log = logging.getLogger(__name__)


def check_weights(base: Origin, purpose: str) -> None:
    """Refuse a --base that has no weights.  purpose: what they are needed for."""
    if isinstance(base, Architecture):
        raise UserError(
            f"--base={base.path.name} is an architecture without weights; name the model {purpose}:"
            " --base=MODEL"
        )


def write(
    request: Request,
    model: Origin,
    parts: dict[str, writing.PartSource] | None = None,
    scheduler: dict[str, Any] | None = None,
    more_metadata: dict[str, str] | None = None,
) -> None:
    """Write a model.

    parts, scheduler: replace its own.  more_metadata: for a single file; a folder has none.
    """
    forms = words_of(FullConfig, "export")
    if request.form and request.form not in forms:
        use = " or ".join(forms)
        raise UserError(f"--format={request.form} is for LoRAs, and {model} is a model: use {use}")
    target, parts = request.target, parts or {}
    by_suffix = "single_file" if target.suffix == ".safetensors" else "diffusers"
    form = request.form or by_suffix
    log.info("%s -> %s (%s)", model, target, form)
    if form == "diffusers":
        writing.save_folder(target, model, parts, scheduler, request.dtype)
        return
    request.check_file()
    writing.save_single_file(target, model, parts, scheduler, request.dtype, more_metadata)
