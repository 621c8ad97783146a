"""A part's folder in diffusers layout: which files hold its weights."""

import json
import logging
from pathlib import Path

from trainer.errors import UserError
from trainer.formats.names import canonical
from trainer.formats.weights import Weights, of_file

log = logging.getLogger(__name__)

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def weights_name(part: str) -> str:
    """The file name of a part's weights."""
    return f"{_STEMS.get(part, 'model')}.safetensors"


def variant_option(option: str) -> str:
    """The option that selects a variant of the model named by `option`."""
    return "model.variant" if option.startswith("model.") else "--variant"


def find_weights(
    folder: Path, part: str, variant: str | None, option: str = "model.path"
) -> tuple[Weights, list[Path]]:
    """A part's tensors by name, and the files that hold them.

    option: the option that named the model; `folder` is one part of it, or with `model.vae` all.

    The files of `variant` (such as fp16) are preferred to the plain ones.  Raises UserError if
    there are no files, or one is damaged.
    """
    files = _files(folder, part, variant)
    if variant and not files:
        files = _files(folder, part, None)
        message = "%s has no %s variant of the %s; reading its plain files"
        log.info(message, folder.parent, variant, part)
    if not files:
        others = sorted(path.name for path in folder.glob("*.*.safetensors"))
        is_alone = option == "model.vae"
        remedy = "fetch or copy it again"
        if others and is_alone:
            remedy = f"name the file: model.vae={folder / others[0]}"
        elif others:
            remedy = f"set {variant_option(option)}={others[0].split('.')[1]}"
        where = folder if is_alone else folder.parent
        missing = f"{'' if is_alone else f'{part}/'}{weights_name(part)}"
        raise UserError(f"{option}={where}: {missing} is missing; {remedy}")
    weights: Weights = {}
    for path in files:
        weights |= of_file(path)[0]
    return {canonical(part, name): lazy for name, lazy in weights.items()}, files


def _files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The part's file, or the shards that its index lists; [] if there is neither."""
    stem = _STEMS.get(part, "model")
    pickled = "pytorch_model" if stem == "model" else stem
    kind = f".{variant}" if variant else ""
    for name, ending in ((stem, "safetensors"), (pickled, "bin")):
        whole = folder / f"{name}{kind}.{ending}"
        if whole.is_file():
            return [whole]
        for index in (f"{name}.{ending}.index{kind}.json", f"{name}{kind}.{ending}.index.json"):
            if (folder / index).is_file():
                return _listed(folder / index)
    return []


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index} lists {name}, which is missing; fetch or copy it again")
    return [index.parent / name for name in names]
