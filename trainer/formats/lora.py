"""LoRA files: written from PEFT's modules and verified, and read under a model's own names."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.formats import diffusers_lora, kinds, kohya, metadata, stream
from trainer.formats.adapters import Adapter, Adapters, OtherModel, of_models
from trainer.formats.proof import NotProved
from trainer.formats.weights import of_file, of_tensors
from trainer.system import disk

log = logging.getLogger(__name__)


def save_lora(
    target: Path,
    kind: str,
    models: Mapping[str, nn.Module],
    base: str,
    dtype: torch.dtype | None = None,
    more_metadata: Mapping[str, str] | None = None,
    adapters: Adapters | None = None,
) -> Path:
    """Write the adapters of `models` to the .safetensors file `target`.

    kind: `kohya` or `diffusers`.  models: those of unet, text_encoder and text_encoder_2 that have
    adapters.  base: `sdxl` or `sd15`, the model they were trained on (`Origin.kind`; anything if
    kind is `diffusers`).  dtype: of the matrices (None: as trained); alphas are fp32.  adapters:
    written instead of those in the models.
    Raises UserError if it cannot be written, or does not read back as trained.
    """
    adapters = of_models(models) if adapters is None else adapters
    adapters = {part: found for part, found in adapters.items() if found}
    if not adapters:
        raise UserError(f"{target}: none of {', '.join(models)} has an adapter to write")
    if kind == "kohya":
        if base not in kohya.PREFIXES:
            raise UserError(
                f"{target}: kohya's format is for SDXL and Stable Diffusion 1.x; use diffusers'"
            )
        unet: Any = models.get("unet")
        tensors = kohya.encode(adapters, base, None if unet is None else unet.config)
        described: dict[str, str] = {}
    else:
        tensors, described = diffusers_lora.encode(adapters)
    described |= metadata.lora(base, adapters, target.stem) | dict(more_metadata or {})
    kept = (".alpha",)  # must stay exact, whatever the matrices' type
    dtypes = {
        name: tensor.dtype if dtype is None or name.endswith(kept) else dtype
        for name, tensor in tensors.items()
    }
    with disk.whole_file(target) as temporary:
        stream.write(temporary, of_tensors(tensors), described, dtypes)
        count, rounding = _prove(read(temporary, models), adapters, dtype, target)
    changed = f" (rounded to {str(dtype).removeprefix('torch.')}: {rounding:.1e})" if dtype else ""
    log.info("%s: %d adapters read back, all equal to what was trained%s", target, count, changed)
    return target


def read(path: Path, models: Mapping[str, nn.Module]) -> Adapters:
    """The adapters of a LoRA file, in kohya's or diffusers' format, by the models' module names.

    Raises UserError for a damaged file, another kind of adapter, or modules that the models lack.
    """
    weights, described = of_file(path)
    where = str(path)
    if not kinds.is_lora(weights):
        raise UserError(f"{path} is not a LoRA: it has {next(iter(weights), 'no tensor')}")
    if kohya.is_own(weights):
        found = kohya.decode(weights, models, where)
    else:
        found = diffusers_lora.decode(weights, described, models, where)
    for part, every in found.items():
        for module, adapter in every.items():
            _must_fit(f"{where}: {part}.{module}", adapter, models[part].get_submodule(module))
    return found


def _must_fit(where: str, adapter: Adapter, module: nn.Module) -> None:
    if adapter.rank != adapter.up.shape[1]:
        raise UserError(f"{where} has rank {adapter.rank} down and {adapter.up.shape[1]} up")
    weight = getattr(module, "base_layer", module).get_parameter("weight")
    shape = (adapter.up.shape[0], *adapter.down.shape[1:])
    # A matrix may be written as a 1x1 convolution.
    if adapter.up.shape[0] != weight.shape[0] or math.prod(shape) != weight.numel():
        raise OtherModel(
            f"{where} is for a weight of {shape}, and here it is {tuple(weight.shape)}; the LoRA "
            "is for another model"
        )


def _prove(
    written: Adapters, trained: Adapters, dtype: torch.dtype | None, target: Path
) -> tuple[int, float]:
    """Compare the weight change of each written adapter with that of the trained one.

    Returns their number, and the largest relative change caused by rounding to `dtype`.  Raises
    NotProved for the first module with any other difference.
    """
    count, rounding = 0, 0.0
    for part in sorted(written.keys() | trained.keys()):
        here, there = written.get(part, {}), trained.get(part, {})
        for path in sorted(here.keys() | there.keys()):
            if path not in here or path not in there:
                lost = "is missing in" if path in there else "should not be in"
                raise NotProved(
                    f"{target}, read back: {part}.{path} {lost} it; the file is discarded"
                )
            rounded = _rounded(there[path], dtype)
            if why := _difference(here[path], rounded):
                raise NotProved(f"{target}, read back: {part}.{path} {why}; the file is discarded")
            if dtype is not None:
                rounding = max(rounding, _relative(rounded.delta(), there[path].delta()))
            count += 1
    return count, rounding


def _rounded(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    magnitude = adapter.magnitude
    return replace(
        adapter,
        down=adapter.down.to("cpu", dtype),
        up=adapter.up.to("cpu", dtype),
        magnitude=None if magnitude is None else magnitude.to("cpu", dtype),
    )


def _difference(written: Adapter, wanted: Adapter) -> str | None:
    error = _relative(written.delta(), wanted.delta())
    if error > 1e-6:  # alpha is fp32 in the file
        return f"has another effect (relative error {error:.1e})"
    here, there = written.magnitude, wanted.magnitude
    if here is None or there is None:
        return None if here is there else "has lost its DoRA scale, or gained one"
    return None if torch.equal(here, there) else "has another DoRA scale"


def _relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; 0 if they are equal, inf if the ratio is not finite."""
    if torch.equal(found, wanted.to(found.device)):
        return 0.0
    error = float((found - wanted.to(found.device)).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf
