"""`method=`: which weights are trained, and how the result is written."""

from dataclasses import dataclass
from typing import Any

from trainer.config.fields import TINY, Interval, interval, one_of, within
from trainer.config.model import DTYPES

TRAINABLE_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(kw_only=True)
class EmaConfig:
    """An average of the trained weights, in checkpoints beside them; eval/ema_loss is its loss."""

    decay: float = within(0, 1)  # of the average, for every optimizer step
    warmup: bool  # begin with an average of fewer steps: decay at most (1 + step) / (10 + step)
    every: int = within(1)  # steps from one update to the next, which counts for all of them
    dtype: str = one_of("bfloat16", "float32")  # bfloat16 is written with stochastic rounding
    # same: as the weights; cpu: no memory of the GPU, and a transfer at every update.
    device: str = one_of("same", "cpu")
    sample: str = one_of("average", "last")  # whose pictures are drawn: the average's, or the last
    export: str = one_of("average", "last")  # which weights are the run's result


@dataclass(kw_only=True)
class MethodConfig:
    """What all methods share."""

    # Parts that are trained: unet, text_encoder, text_encoder_2.  The captions of a trained text
    # encoder are read anew in every step.
    train: list[str]
    # How gradients are clipped (`trainer/clipping.py`): global, by the norm of them all; exact, the
    # same with the fused backward, at the cost of a second pass; lagged, by the norm of the step
    # before; rms, each tensor by its share of the bound; none.
    clip: str = one_of("global", "exact", "lagged", "rms", "none")
    max_grad_norm: float = within(TINY)  # the bound on the gradients' norm
    # Options for some parameters, by their names: [{pattern: attn2, lr_scale: 0.1}, {pattern:
    # conv_in, trainable: false}], with lr, lr_scale, trainable, and any option of the optimizer.
    # The first whose pattern (a regular expression) is found in a name decides: trainer/groups.py.
    rules: list[dict[str, Any]]
    # Steps from one result to the next, or epochs (1epoch), all of which are kept; 0 writes that of
    # the end alone.
    export_every: Interval = interval()
    ema: EmaConfig | None  # chosen with ema=bf16 or ema=fp32


@dataclass(kw_only=True)
class FullConfig(MethodConfig):
    """Train every weight."""

    name: str = "full"
    # How the result is written: diffusers (a folder), single_file (what A1111 and ComfyUI read).
    export: list[str] = one_of("diffusers", "single_file")
    export_dtype: str | None = one_of(*DTYPES)  # of what is written; null: as trained


@dataclass(kw_only=True)
class RankConfig:
    """The rank of some adapters: 'method.ranks=[{pattern: conv, rank: 8, alpha: 4}]'."""

    pattern: str  # a regular expression that is searched for in modules' names: unet.conv_in
    rank: int = within(1)
    alpha: float | None = within(TINY, default=None)  # null: method.alpha


@dataclass(kw_only=True)
class LoraConfig(MethodConfig):
    """Train low-rank adapters (PEFT)."""

    name: str = "lora"
    rank: int = within(1)
    alpha: float = within(TINY)  # the adapter's output is scaled by alpha / rank
    # Ranks of some adapters by their modules' names; the first whose pattern is found counts.
    ranks: list[RankConfig]
    rslora: bool  # scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)
    # Train each output's magnitude apart from its direction (DoRA: Liu et al. 2024, 2402.09353).
    dora: bool
    # Modules that get an adapter, by the end of their names, as regular expressions: to_q, or
    # down_blocks.*attn1.to_q, or conv[12].  One list for the UNet, one for text encoders.
    targets: list[str]
    text_targets: list[str]
    # A LoRA file, of kohya's kind or diffusers', that training starts from: of this rank, alpha and
    # these targets.  Null starts from nothing.
    start_from: str | None
    # How the result is written: kohya (what A1111 and ComfyUI read), diffusers.
    export: list[str] = one_of("kohya", "diffusers")
    export_dtype: str | None = one_of(*DTYPES)  # of what is written; null: as trained
