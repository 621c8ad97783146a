"""Options that would save memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optim
from trainer.config import AdapterConfig, Config, FullConfig, finds_rate

_STORAGES = ("fp32", "bf16", "8bit", "factored")  # of an optimizer's state, the largest first
_LEAST_RESOLUTION = 512  # lower ones are not suggested
_SMALL_STATE = ("adafactor8bit", "adafactor8bit_apollo", "lomo")


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Options to set, and what they do."""

    overrides: tuple[str, ...]
    what: str
    in_steps: bool = True  # whether a training step needs less, not only the encoding before it

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)}, {self.what}"


def of(config: Config) -> Iterator[Remedy]:
    """Memory-saving options not in use, cheapest first: no effect on results, then slower, then
    different training."""
    runtime, method, data = config.runtime, config.method, config.data
    is_family = config.optim.name in optim.FAMILY
    if is_family and not runtime.fused_backward and runtime.accumulation == 1:
        clip = ["method.clip=exact"] if method.clip == "global" else []
        overrides = ("runtime.fused_backward=true", *clip)
        yield Remedy(overrides=overrides, what="which frees gradients as they are used")
    if config.model.dtype == "float32":
        yield Remedy(overrides=("model.dtype=bfloat16",), what="which halves the weights")
    if method.ema is not None and method.ema.device != "cpu":
        yield Remedy(
            overrides=("method.ema.device=cpu",), what="which keeps the average in host memory"
        )
    if not runtime.gradient_checkpointing:
        yield Remedy(
            overrides=("runtime.gradient_checkpointing=true",),
            what="which recomputes activations",
        )
    if isinstance(method, AdapterConfig):
        if config.model.quantization == "none":
            yield Remedy(
                overrides=("model.quantization=int8",), what="which keeps frozen weights in 8 bits"
            )
        if config.model.quantization == "int8":
            yield Remedy(
                overrides=("model.quantization=nf4",), what="which keeps frozen weights in 4 bits"
            )
    if config.model.text_dtype == "float32" and not set(method.train) - {"unet"}:
        yield Remedy(
            overrides=("model.text_dtype=bfloat16",),
            what="which halves the text encoders",
            in_steps=False,
        )
    if (size := data.batch_size) > 1:
        parts = next(n for n in range(2, size + 1) if size % n == 0)
        accumulation = runtime.accumulation * parts
        yield Remedy(
            overrides=(f"data.batch_size={size // parts}", f"runtime.accumulation={accumulation}"),
            what="which processes fewer pictures at a time",
        )
    if smaller := _smaller(config.optim.name):
        is_factored = _stored(smaller)[0] == "factored"
        rate = ", and another best rate" if is_factored and not finds_rate(smaller) else ""
        yield Remedy(overrides=(f"optim={smaller}",), what=f"which has a smaller state{rate}")
    if isinstance(method, AdapterConfig) and method.rank > 16:
        yield Remedy(overrides=("method.rank=16",), what="which trains fewer weights")
    if config.optim.name not in _SMALL_STATE:
        yield Remedy(overrides=("optim=adafactor8bit",), what="whose state is tiny")
    if isinstance(method, FullConfig):
        yield Remedy(overrides=("method=lora",), what="which trains few weights")
    step = data.bucket_step
    side = data.resolution * 3 // 4 // step * step
    if not data.resolutions and side >= _LEAST_RESOLUTION:
        yield Remedy(
            overrides=(f"data.resolution={side}",), what="which trains at a lower resolution"
        )


def _smaller(name: str) -> str | None:
    """The optimizer of the family that differs only by how its state is stored, in fewer bits; of
    several that with the most."""
    if name not in optim.FAMILY:
        return None
    storage, others = _stored(name)
    for smaller in _STORAGES[_STORAGES.index(storage) + 1 :]:
        for other in optim.FAMILY:
            if _stored(other) == (smaller, others):
                return other
    return None


def _stored(name: str) -> tuple[str, Any]:
    """How an optimizer's state is stored, and everything else about it."""
    options = {option: default for option, (_, default) in optim.options_of(name).items()}
    return options.pop("storage", _STORAGES[-1]), (optim.FAMILY[name].rule, options)
