"""LoRA files: which model one belongs to, and writing it in the other format, or merged into it."""

import logging
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import nn

from trainer.errors import UserError
from trainer.export import merging, resizing
from trainer.export.kept import Kept
from trainer.export.request import Request
from trainer.formats import adapters, architectures, lora, metadata, origin
from trainer.formats.metadata import BASE_VERSION
from trainer.formats.weights import of_file
from trainer.storage.claim import config_in

log = logging.getLogger(__name__)


def convert(path: Path, request: Request) -> None:
    """Write the LoRA of this file, by default in the format that it does not have, or, resized, in
    the one that it has."""
    base = _base_of(path, request)
    held = lora.read(path, empty(base))
    weights, described = of_file(path)
    # A smaller LoRA is for the same program, and diffusers reads no other adapters.
    is_kohya = lora.format_of(weights) == "kohya"
    gives_kohya = is_kohya == (request.rank is not None) or not adapters.are_loras(held)
    default_form = "kohya" if gives_kohya else "diffusers"
    write(path, request, default_form, base, held, metadata.carried(described))


def write(
    source: Path,
    request: Request,
    default_form: str,
    base: origin.Origin,
    held: adapters.Adapters,
    more_metadata: dict[str, str],
) -> None:
    """Write adapters of the model `base`, with --rank resized, or with --merge that model with them
    in it.
    more_metadata: added to the file's own."""
    if request.merge:
        merging.write(source, request, base, held, more_metadata)
        return
    kind = adapters.title(held)
    form = form_of(request, default_form, base, held, f"{source} is a {kind}")
    target, models = request.target, empty(base)
    log.info("%s -> %s (a %s in %s format)", source, target, kind, form)
    if request.rank is not None:
        kept = Kept()
        small = resizing.resized(source, held, request.rank, kept)
        told = metadata.without_rank(more_metadata)
        lora.save_lora(target, form, models, base.kind, request.dtype, told, adapters=small)
        resizing.report(target, held, request.rank, kept)
        return
    lora.save_lora(target, form, models, base.kind, request.dtype, more_metadata, adapters=held)
    if request.base and request.base not in architectures.PUBLISHED:
        message = "%s holds the %s alone; --merge writes it merged into %s"
        log.info(message, target, kind, request.base)


def form_of(
    request: Request, default: str, base: origin.Origin, held: adapters.Adapters, what: str
) -> str:
    """The format of the LoRA to write.  what: a phrase that says that it is one.  Raises UserError
    if it is no LoRA's, or cannot hold these adapters of this base."""
    form = request.form or default
    if form not in lora.FORMATS:
        use = " or ".join(lora.FORMATS)
        raise UserError(f"--format={form} is for models, and {what}: use {use}")
    request.check_file()
    lora.FORMATS[form].refuse(request.target, base.kind, held)
    return form


def _base_of(path: Path, request: Request) -> origin.Origin:
    """The base model of a LoRA."""
    base, variant = request.base, request.variant
    if base is None:
        assert not request.merge  # which needs a model with weights
        version = of_file(path)[1].get("ss_base_model_version", "")
        named = [kind for kind, known in BASE_VERSION.items() if version.startswith(known)]
        fits = [kind for kind in named or BASE_VERSION if _fits(path, kind)]
        if len(fits) == 1:
            base = fits[0]
        elif run := run_of(path):
            model = config_in(run)["model"]
            base, variant = str(model["path"]), variant or model.get("variant")
            log.info("base model: %s (from the run's config.yaml)", base)
        else:
            raise UserError(
                f"{path} fits {' and '.join(fits) or 'neither SDXL nor Stable Diffusion 1.5'}; "
                "name its base model: --base=MODEL"
            )
    return base_model(base, variant, request.merge)


def base_model(base: str, variant: str | None = None, with_weights: bool = False) -> origin.Origin:
    """The model that --base names: sdxl and sd15 are the published ones.  From a hub, weights are
    downloaded only `with_weights`."""
    is_published = base in architectures.PUBLISHED
    path = str(architectures.folder(base)) if is_published else base
    return origin.at(path, variant, "--base", with_weights)


def run_of(path: Path) -> Path | None:
    """The folder of the run that wrote a LoRA or a model, if its configuration names the model that
    it started from; None for what is in no run."""
    above = path.resolve().parents
    if above[0].name == "lora":
        above = above[1:]
    for folder in (above[0], *above[2:3]):  # RUN, or RUN of RUN/results/STEP
        with suppress(KeyError, TypeError, AttributeError):  # no run's, or of another version
            if config_in(folder)["model"]["path"]:
                return folder
    return None


def _fits(path: Path, kind: str) -> bool:
    try:
        lora.read(path, empty(base_model(kind)))
    except adapters.OtherModel:
        return False
    return True


@cache  # takes a second for SDXL
def empty(base: origin.Origin) -> dict[str, nn.Module]:
    """The parts of a model that a LoRA may adapt, without weights."""
    return {
        part: architectures.empty(part, base.config(part))
        for part in architectures.WEIGHT_PARTS
        if base.has(part) and part != "vae"
    }
