"""`method=`: which weights are trained, and how the result is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trainer.config.fields import HUGE, TINY, Interval, interval, one_of, within
from trainer.config.model import DTYPES

TRAINABLE_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(kw_only=True)
class EmaConfig:
    """A moving average of the trained weights, saved in checkpoints; eval/ema_loss is its loss."""

    decay: float = within(0, 1)  #: of the average, per optimizer step
    warmup: bool  #: average over fewer steps at first: decay at most (1 + step) / (10 + step)
    every: int = within(1)  #: steps between updates, each of which counts for all of them
    dtype: str = one_of("bfloat16", "float32")  #: bfloat16 uses stochastic rounding
    #: same: the weights' device; cpu: no GPU memory, but a transfer at every update.
    device: str = one_of("same", "cpu")
    sample: str = one_of("average", "last")  #: which weights draw samples
    export: str = one_of("average", "last")  #: which weights are the run's result


@dataclass(kw_only=True)
class MetadataConfig:
    """What the written .safetensors files say, as modelspec.title and so on; null: nothing."""

    title: str | None  #: null: the file's name
    author: str | None  #: who made it
    description: str | None  #: of what it is for
    license: str | None  #: under which it may be used
    tags: str | None  #: separated by commas
    trigger_phrase: str | None  #: that a prompt must contain
    usage_hint: str | None  #: how to use it, such as a strength
    thumbnail: str | None  #: a picture's path, or a data URL (data:image/jpeg;base64,...)


@dataclass(kw_only=True)
class MethodConfig:
    """What all methods share."""

    title: ClassVar[str]  # in messages
    # Of an optimizer's default learning rate, which was found with a small model: what to try first
    # with a large one.
    share_of_rate: ClassVar[float]

    name: str
    #: Parts to train: unet, text_encoder, text_encoder_2.  A trained text encoder encodes its
    #: captions in every step.
    train: list[str]
    #: Gradient clipping (`trainer/training/clipping.py`): global, by the norm of all gradients;
    #: exact, the same with the fused backward, at the cost of a second pass; lagged, by the norm of
    #: the previous step; rms, each tensor by its share of the bound; none.
    clip: str = one_of("global", "exact", "lagged", "rms", "none")
    max_grad_norm: float = within(TINY)  #: the bound on the gradients' norm
    #: Options per parameter name: [{pattern: attn2, lr_scale: 0.1}, {pattern: conv_in, trainable:
    #: false}], with lr, lr_scale, trainable, and any option of the optimizer.  The first rule whose
    #: pattern (a regular expression) is found in the name applies: trainer/training/groups.py.
    rules: list[dict[str, Any]]
    export: list[str]  #: formats of the result
    export_dtype: str | None = one_of(*DTYPES)  #: of the written weights; null: as trained
    #: Steps, or epochs (1epoch), between intermediate results; 0: only write the final result.
    export_every: Interval = interval()
    keep_exports: int = within(0)  #: of the intermediate results, the newest; 0: all
    metadata: MetadataConfig  #: of the result, for programs that list models
    ema: EmaConfig | None  #: chosen with ema=bf16 or ema=fp32


@dataclass(kw_only=True)
class FullConfig(MethodConfig):
    """Train every weight."""

    title = "full fine-tune"
    share_of_rate = 0.01
    name: str = "full"
    #: Formats of the result: diffusers (a folder), single_file (for A1111 and ComfyUI).
    export: list[str] = one_of("diffusers", "single_file")


@dataclass(kw_only=True)
class RankConfig:
    """The rank of some adapters: 'method.ranks=[{pattern: conv, rank: 8, alpha: 4}]'."""

    pattern: str  #: a regular expression, searched for in module names: unet.conv_in
    rank: int = within(1)  #: of these adapters
    alpha: float | None = within(TINY, HUGE, default=None)  #: null: method.alpha


def rank_of(ranks: Sequence[RankConfig], name: str) -> RankConfig | None:
    """The first of these whose pattern is found in a module's name (unet.conv_in), if any."""
    return next((one for one in ranks if re.search(one.pattern, name)), None)


@dataclass(kw_only=True)
class AdapterConfig(MethodConfig):
    """Train adapters (PEFT), and nothing else."""

    share_of_rate = 0.1

    rank: int = within(1)  #: of adapters
    alpha: float = within(TINY, HUGE)  #: the adapter's output is scaled by alpha / rank
    #: Ranks per module name; the first one whose pattern is found applies.
    ranks: list[RankConfig]
    #: Modules of the UNet to adapt: regular expressions that match the end of their names: to_q, or
    #: down_blocks.*attn1.to_q, or conv[12].
    targets: list[str]
    text_targets: list[str]  #: modules of the text encoders to adapt
    #: A file of such adapters to start from, with this rank, alpha and these targets; null: start
    #: from zero.
    start_from: str | None
    #: Formats of the result: kohya (for A1111 and ComfyUI), diffusers.
    export: list[str] = one_of("kohya", "diffusers")
    #: Write into the result how often each tag occurs in the captions, which A1111 and others show
    #: (ss_tag_frequency).  It discloses the captions.
    tag_frequency: bool


@dataclass(kw_only=True)
class LoraConfig(AdapterConfig):
    """Train low-rank adapters."""

    title = "LoRA"
    name: str = "lora"
    rslora: bool  #: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732)
    #: Train magnitude and direction separately (DoRA: Liu et al. 2024, arXiv 2402.09353).
    dora: bool
    dropout: float = within(0, 0.99)  #: share of an adapter's inputs that a training step sets to 0


@dataclass(kw_only=True)
class LokrConfig(AdapterConfig):
    """Train Kronecker products, kron(w1, w2) (LyCORIS: Yeh et al. 2024, arXiv 2309.14859)."""

    title = "LoKr"
    name: str = "lokr"
    #: Of w2.  With at least half of its longer side (10000, say) all of w2 is trained, and alpha
    #: has no effect.
    rank: int = within(1)
    #: The sides of w1, as far as they divide the weight's; w2 has the rest, so a smaller factor
    #: trains more.  null: nearly as large as w2.  (LyCORIS only loads files whose w1 is the smaller
    #: one: up to 16 for SDXL.  Others read all.)
    factor: int | None = within(1)
    decompose_both: bool  #: w1 has the rank, too, if that is below half of its longer side
    #: Formats of the result: kohya (LyCORIS's names, for A1111 and ComfyUI); diffusers reads none.
    export: list[str] = one_of("kohya")


@dataclass(kw_only=True)
class LohaConfig(AdapterConfig):
    """Train Hadamard products: two low-rank matrices, multiplied element by element (LyCORIS: Yeh
    et al. 2024, arXiv 2309.14859)."""

    title = "LoHa"
    name: str = "loha"
    #: Formats of the result: kohya (LyCORIS's names, for A1111 and ComfyUI); diffusers reads none.
    export: list[str] = one_of("kohya")
