"""Options without effect in this run: those that only have one with others."""

from collections.abc import Callable, Iterator
from typing import Any

from trainer.config import (
    AdapterConfig,
    Config,
    FullConfig,
    Interval,
    choices_of,
    epochs_of,
    values_of,
    words_of,
)
from trainer.sampling import prompts


def _no_tags_move(config: Config) -> bool:
    return not (config.data.shuffle_tags or config.data.tag_dropout)


def _is_never(every: Interval) -> bool:
    return str(every) == "0" or epochs_of(every) == 0


def _nothing_drawn(config: Config) -> bool:
    return not (config.log.prompts or config.log.sample_count)


def _never_guided(config: Config) -> bool:
    drawn = prompts.of_config(config.log, config.data.largest_resolution)
    return config.log.guidance_scale <= 1 and not any(prompt.is_guided for prompt in drawn)


def _other_prompts(config: Config) -> bool:
    path = config.log.prompts_file
    return path is not None and prompts.read(path) != config.log.prompts


_PICTURES = "pictures: log.prompts or log.sample_count"

# Options that only have an effect with others: (options, when they have none, what they need).
_IDLE: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (("loss.gamma",), lambda c: c.loss.weighting != "min_snr", "loss.weighting=min_snr"),
    (("loss.unmasked_weight",), lambda c: c.data.mask == "none", "data.mask"),
    (
        ("noise.logit_mean", "noise.logit_std"),
        lambda c: c.noise.timesteps != "logit_normal",
        "noise.timesteps=logit_normal",
    ),
    (
        ("data.shuffle_tags", "data.tag_dropout"),
        lambda c: c.data.caption_dropout == 1,
        "data.caption_dropout below 1",
    ),
    (
        ("data.keep_tokens", "data.caption_variants"),
        _no_tags_move,
        "data.shuffle_tags and data.tag_dropout",
    ),
    (
        ("data.tag_separator",),
        lambda c: (
            _no_tags_move(c)
            and not c.data.keep_separator
            and not (isinstance(c.method, AdapterConfig) and c.method.tag_frequency)
        ),
        "data.shuffle_tags and data.tag_dropout",
    ),
    (
        ("method.export_every", "method.export_dtype", "method.tag_frequency"),
        lambda c: not c.method.export,
        "a format in method.export",
    ),
    (
        ("method.keep_exports",),
        lambda c: _is_never(c.method.export_every),
        "method.export_every",
    ),
    (
        ("runtime.keep_checkpoints",),
        lambda c: _is_never(c.runtime.save_every),
        "runtime.save_every",
    ),
    (
        ("runtime.max_rollbacks",),
        lambda c: c.runtime.on_divergence != "rollback",
        "runtime.on_divergence=rollback",
    ),
    (
        ("runtime.on_divergence",),
        lambda c: c.runtime.on_divergence == "rollback" and _is_never(c.runtime.save_every),
        "checkpoints to go back to (runtime.save_every)",
    ),
    (
        ("data.upscale", "data.bucket_step", "data.max_aspect"),
        lambda c: not c.data.buckets,
        "data.buckets=true",
    ),
    (
        ("data.short_batches",),
        lambda c: c.data.batch_size == 1 or (not c.data.buckets and len(c.data.resolutions) < 2),
        "data.batch_size above 1 and several buckets (data.buckets=true, data.resolutions)",
    ),
    (("method.targets",), lambda c: "unet" not in c.method.train, "unet in method.train"),
    (("method.max_grad_norm",), lambda c: c.method.clip == "none", "a method.clip other than none"),
    (
        ("method.text_targets",),
        lambda c: c.method.train == ["unet"],
        "text encoders in method.train",
    ),
    (("data.resolution",), lambda c: bool(c.data.resolutions), "data.resolutions=[]"),
    (("log.negative_prompt",), _never_guided, "log.guidance_scale above 1"),
    (("log.prompts_file",), _other_prompts, "log.prompts unset"),
    (("schedule.steps",), lambda c: c.schedule.epochs is not None, "schedule.epochs=null"),
    (
        ("log.sample_count",),
        lambda c: bool(c.log.prompts),
        "log.prompts and log.prompts_file unset",
    ),
    (
        ("log.sample_every", "log.sample_steps", "log.guidance_scale"),
        _nothing_drawn,
        _PICTURES,
    ),
)


def remarks(config: Config, given: frozenset[str]) -> Iterator[str]:
    """One for each option that was set and has no effect.  given: the command line's keys."""
    for keys, is_idle, owner in _IDLE:
        if is_idle(config):
            for key in keys:
                yield from of_option(config, key, given, owner)
    ema = config.method.ema
    if ema and ema.sample == "last" and _nothing_drawn(config):
        yield f"method.ema.sample=last has no effect here: it is only used with {_PICTURES}"
    is_full = isinstance(config.method, FullConfig)  # whose other format is a folder
    formats = ("single_file",) if is_full else words_of(config.method, "export")
    if not set(formats) & set(config.method.export):
        words = (key for key, word in vars(config.method.metadata).items() if word is not None)
        for key in words:
            yield (
                f"method.metadata.{key} has no effect here: it is written into .safetensors files "
                f"only, method.export=[{','.join(formats)}]"
            )
    if isinstance(config.method, FullConfig) and config.model.compute == config.model.dtype:
        dtype = config.model.dtype
        yield (
            f"model.compute={dtype} has no effect with model.dtype={dtype}, whose matrix products "
            "use that dtype anyway"
        )
    fused = config.runtime.fused_backward
    if not fused and getattr(config.optim, "on_nonfinite", "skip") == "raise":
        yield (
            "optim.on_nonfinite=raise has no effect here: a step whose gradient is not finite is "
            "skipped before the optimizer sees it (runtime.max_skipped_steps)"
        )
    if config.optim.lr == 0 and not config.method.rules:
        yield "optim.lr=0 changes no weight"


def of_option(config: Config, key: str, given: frozenset[str], owner: str) -> Iterator[str]:
    """A remark on an option that needs `owner`, and does not have it, if it was set."""
    if _is_meant(config, key, given):
        yield f"{key}={_value(config, key)} has no effect here: it is only used with {owner}"


def _is_meant(config: Config, key: str, given: frozenset[str]) -> bool:
    """Whether an option was set, on the command line or to a value that no default has."""
    value = _value(config, key)
    return value is not None and (key in given or value not in _defaults(config, key))


def _value(config: Config, key: str) -> Any:
    group, _, option = key.partition(".")
    return getattr(getattr(config, group), option, None)


def _defaults(config: Config, key: str) -> list[Any]:
    """The option's values in the files of conf/ that may have been chosen."""
    group, _, option = key.partition(".")
    chosen = getattr(getattr(config, group), "name", None)
    of_group = [values_of(group, name) for name in ([chosen] if chosen else choices_of(group))]
    presets = [values_of("experiment", name).get(group, {}) for name in choices_of("experiment")]
    return [values.get(option) for values in (*of_group, *presets)]
