"""LoRA files: written from PEFT's modules and verified, and read under a model's own names."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.formats import diffusers_lora, kinds, kohya, metadata, stream
from trainer.formats.adapter import Adapter
from trainer.formats.adapters import Adapters, OtherModel, kind_of, of_models
from trainer.formats.proof import NotProved
from trainer.formats.weights import Weights, of_file, of_tensors
from trainer.system import disk
from trainer.wording import plural

log = logging.getLogger(__name__)

_OTHER_KINDS = {  # other adapters (LyCORIS etc.), by how their tensors' names end
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "lora_mid.weight": "a Tucker-decomposed LoCon",
    "diff": "a full difference",
    "diff_b": "a difference of biases",
    "w_norm": "a norm's weight",
    "a1.weight": "GLoRA",
}


class Format(Protocol):
    """A format of LoRA files: the modules `kohya` and `diffusers_lora`, which explain each."""

    def stem(self, run: str) -> str: ...
    def refuse(self, target: Path, base: str, adapters: Adapters) -> None: ...
    def encode(
        self, adapters: Adapters, base: str, unet_config: Mapping[str, Any] | None
    ) -> dict[str, Tensor]: ...
    def described(self, adapters: Adapters) -> dict[str, str]: ...
    def modules(self, models: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]: ...
    def part_of(self, module: str) -> str | None: ...
    def split(self, name: str) -> tuple[str, str | None]: ...


FORMATS: dict[str, Format] = {"kohya": kohya, "diffusers": diffusers_lora}


def save_lora(
    target: Path,
    form: str,
    models: Mapping[str, nn.Module],
    base: str,
    dtype: torch.dtype | None = None,
    more_metadata: Mapping[str, str] | None = None,
    adapters: Adapters | None = None,
) -> Path:
    """Write the adapters of `models` to the .safetensors file `target`.

    form: one of FORMATS.  models: those of unet, text_encoder and text_encoder_2 that have
    adapters.  base: `sdxl` or `sd15`, the model they were trained on (`Origin.kind`; anything if
    form is `diffusers`).  dtype: of the matrices (None: as trained); alphas are fp32.  adapters:
    written instead of those in the models.
    Raises UserError if it cannot be written, or does not read back as trained.
    """
    adapters = of_models(models) if adapters is None else adapters
    adapters = {part: by_path for part, by_path in adapters.items() if by_path}
    if not adapters:
        raise UserError(f"{target}: none of {', '.join(models)} has an adapter to write")
    writer, unet = FORMATS[form], cast(Any, models.get("unet"))
    writer.refuse(target, base, adapters)
    tensors = writer.encode(adapters, base, None if unet is None else unet.config)
    described = writer.described(adapters) | metadata.lora(base, adapters, target.stem)
    described |= dict(more_metadata or {})
    kept = (".alpha",)  # must stay exact, whatever the matrices' type
    dtypes = {
        name: tensor.dtype if dtype is None or name.endswith(kept) else dtype
        for name, tensor in tensors.items()
    }
    with disk.whole_file(target) as temporary:
        stream.write(temporary, of_tensors(tensors), described, dtypes)
        count, rounding = _prove(read(temporary, models), adapters, dtype, target)
    changed = f" (rounded to {str(dtype).removeprefix('torch.')}: {rounding:.1e})" if dtype else ""
    read_back = plural(count, "adapter")
    log.info("%s: %s read back, all equal%s", target, read_back, changed)
    return target


def format_of(weights: Weights) -> str:
    """The format of a LoRA file."""
    return "kohya" if kohya.is_own(weights) else "diffusers"


def read(path: Path, models: Mapping[str, nn.Module]) -> Adapters:
    """The adapters of a LoRA file, in kohya's or diffusers' format, by the models' module names.

    Raises UserError for a damaged file, another kind of adapter, or modules that the models lack.
    """
    weights, described = of_file(path)
    where = str(path)
    if not kinds.adapters_in(weights):
        raise UserError(f"{path} is not a LoRA: it has {next(iter(weights), 'no tensor')}")
    form = format_of(weights)
    # Kohya's alphas are tensors; without one, it is the rank.
    alphas = diffusers_lora.Alphas(described if form == "diffusers" else {}, where)
    adapters = _decode(FORMATS[form], weights, alphas, models, where)
    for part, by_path in adapters.items():
        for module, adapter in by_path.items():
            _must_fit(f"{where}: {part}.{module}", adapter, models[part].get_submodule(module))
    return adapters


def _decode(
    reader: Format,
    weights: Weights,
    alphas: diffusers_lora.Alphas,
    models: Mapping[str, nn.Module],
    where: str,
) -> Adapters:
    """A file's tensors -> adapters of the models' modules.  Raises UserError for a module that the
    models lack, or a tensor that is not part of a LoRA."""
    modules = reader.modules(models)
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, lazy in weights.items():
        module, tensor = reader.split(name)
        if tensor is None:
            endings = (other for end, other in _OTHER_KINDS.items() if name.endswith(f".{end}"))
            raise UserError(
                f"{where}: {name} is of {next(endings, 'an unknown kind')}; only LoRA, DoRA, LoKr "
                "and LoHa can be read"
            )
        if module not in modules:
            part = reader.part_of(module)
            raise OtherModel(
                f"{where}: {module} belongs to the {part}, which this model lacks or method.train "
                "leaves out"
                if part and part not in models
                else f"{where}: {module} matches no module of this model; the "
                f"{kinds.adapters_in(weights)} is for another model"
            )
        grouped.setdefault(module, {})[tensor] = lazy.read()
    adapters: Adapters = {}
    for module, tensors in grouped.items():
        part, path = modules[module]
        adapter = _adapter(f"{where}: {module}", tensors, alphas, part, path)
        adapters.setdefault(part, {})[path] = adapter
    return adapters


def _adapter(
    where: str, tensors: dict[str, Tensor], alphas: diffusers_lora.Alphas, part: str, path: str
) -> Adapter:
    alpha, scale = tensors.pop("alpha", None), tensors.pop("dora_scale", None)
    if scale is not None:
        tensors["magnitude"] = scale
    kind = kind_of(tensors)
    adapter = kind.of(where, tensors, None if alpha is None else float(alpha))
    if scale is not None and not scale.shape[0] == scale.numel() == adapter.shape[0]:
        raise UserError(
            f"{where}.dora_scale is {tuple(scale.shape)}: it scales the weight's columns, and "
            "DoRA here scales its rows; it cannot be read"
        )
    return replace(adapter, alpha=alphas.of(part, path, adapter.rank)) if alpha is None else adapter


def _must_fit(where: str, adapter: Adapter, module: nn.Module) -> None:
    layer: Any = getattr(module, "base_layer", module)
    weight: Tensor = layer.weight  # not a parameter if it is quantized
    # A matrix may be written as a 1x1 convolution.
    if adapter.shape[0] != weight.shape[0] or math.prod(adapter.shape) != weight.numel():
        raise OtherModel(
            f"{where} is for a weight of {adapter.shape}, and here it is {tuple(weight.shape)}; "
            f"the {adapter.method.title} is for another model"
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
            rounded = there[path].to(dtype)
            if why := _difference(here[path], rounded):
                raise NotProved(f"{target}, read back: {part}.{path} {why}; the file is discarded")
            if dtype is not None:
                rounding = max(rounding, _relative(rounded.delta(), there[path].delta()))
            count += 1
    return count, rounding


def _difference(written: Adapter, wanted: Adapter) -> str | None:
    error = _relative(written.delta(), wanted.delta())
    if error > 1e-6:  # alpha is fp32 in the file
        return f"has another effect (relative error {error:.1e})"
    here, there = (adapter.tensors().get("magnitude") for adapter in (written, wanted))
    if here is None or there is None:
        return None if here is there else "has lost its DoRA scale, or gained one"
    return None if torch.equal(here, there) else "has another DoRA scale"


def _relative(actual: Tensor, wanted: Tensor) -> float:
    """|actual - wanted| / |wanted|; 0 if they are equal, inf if the ratio is not finite."""
    if torch.equal(actual, wanted.to(actual.device)):
        return 0.0
    error = float((actual - wanted.to(actual.device)).norm() / wanted.norm())
    return error if math.isfinite(error) else math.inf
