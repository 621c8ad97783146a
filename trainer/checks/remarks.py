"""Warnings, which a run logs: about a configuration that works (options without effect, two that do
the same, a learning rate for small models only, pictures of another size than the model's), and
about a run that changed nothing or made the model worse."""

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

import optim
from trainer.checks import idle
from trainer.config import (
    Config,
    CosineRestartsConfig,
    DecayConfig,
    LokrConfig,
    OptimizerConfig,
    ScheduleConfig,
    finds_rate,
    keys_of,
    large_model_lr,
)
from trainer.formats import adapters
from trainer.reporting.measure import STILL, got_worse
from trainer.reporting.summary import Summary
from trainer.training.schedule import decay_steps
from trainer.training.switching import switches
from trainer.wording import counted

_UNCLIPPED = ("lomo",)  # their own configuration turns clipping off
_LARGE = 100_000_000  # trained parameters, from which on the default rate gets a remark
_FAR = 1.5  # ratio of resolutions, above which there is a remark


def of_config(config: Config, overrides: Sequence[str] = ()) -> list[str]:
    """The remarks that need no model, one line each.

    overrides: the command line's, which also show what was set to its default on purpose.
    """
    given = keys_of(overrides)
    return [
        *idle.remarks(config, given),
        *_of_clips(config, given),
        *_of_others(config),
        *of_data(config, overrides),
    ]


def of_average(config: Config, optimizer: object) -> list[str]:
    """A remark if a schedule lowers the rate of an optimizer that averages the weights instead."""
    if not isinstance(config.schedule, DecayConfig) or not switches(optimizer):
        return []
    return [
        f"optim={config.optim.name} averages the weights instead of lowering the learning rate "
        "(Schedule-Free); schedule=constant suits it better"
    ]


def of_rate(config: Config, size: int) -> list[str]:
    """Warn if the rate is the class's default, which is for small models, and the trained parts
    have as many parameters, `size`, as a large one."""
    name, method = config.optim.name, config.method
    if name not in optim.FAMILY or finds_rate(name) or size < _LARGE or method.rules:
        return []
    _, default = optim.options_of(name)["lr"]
    if config.optim.lr != default:
        return []
    start = large_model_lr(name, default, method.share_of_rate)
    return [
        f"optim.lr={default:g} is the default of optim={name}, which was found with a small model; "
        f"for a {method.title} of SDXL start near {start:g}"
    ]


def of_divergence(config: Config, is_judged: bool) -> Iterator[str]:
    """Warn if a divergence would not be noticed.  is_judged: whether there is an evaluation from
    before the first step, of all quarters of the timesteps, by which steps are judged."""
    policy = config.runtime.on_divergence
    if policy == "warn" or is_judged:
        return
    effect = {"stop": "has no effect", "rollback": "heeds only steps that are not finite"}[policy]
    yield (
        f"runtime.on_divergence={policy} {effect} here: there is no eval/loss from before the "
        "first step for all quarters of the timesteps "
        f"(log.eval_points={config.log.eval_points}; 4 or more have them, unless a resumed run "
        "measures something else)"
    )


def of_outcome(summary: Summary) -> list[str]:
    """Warn if a run has hardly changed the model, made it worse, or made it better only for the
    pictures it was trained on."""
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    if summary["prediction_before"] != summary["prediction"]:
        return []
    if got_worse(before, after):
        return [
            f"eval/loss was {before:.6g} and is {after:.6g}: the model is worse than before the "
            f"first step; lower optim.lr={summary['lr']:g}"
        ]
    if not abs(after - before) < STILL * before:
        return _of_holdout(summary)
    if summary.get("zero_gradient"):
        return [
            "every gradient was 0, so nothing was learned: all that counts is masked (data.mask, "
            "loss.unmasked_weight) or has no weight (data.sources, metadata), or every caption is "
            "dropped (data.caption_dropout) and only what reads them is trained"
        ]
    found = summary["rate_found"]
    rate = f"optim.lr={summary['lr']:g}" + (
        "" if found is None else f" times the {found:.2g} found"
    )
    return [
        f"eval/loss was {before:.6g} and is {after:.6g}: the model has hardly moved; {rate} is too "
        f"low, or {counted(summary['steps'], 'steps are')} too few"
    ]


def _of_holdout(summary: Summary) -> list[str]:
    """Warn if a model, which got better on its training pictures, got worse on held-out ones."""
    before = summary.get("holdout_loss_before", math.nan)
    after = summary.get("holdout_loss_after", math.nan)
    if not got_worse(before, after):
        return []
    return [
        f"eval/holdout_loss was {before:.6g} and is {after:.6g}, while eval/loss fell: the model "
        "memorises the pictures that it is trained on; make fewer steps (log.eval_every shows how "
        "many), lower optim.lr, or add pictures"
    ]


def of_resolution(config: Config, own: int | None) -> list[str]:
    """Warn if the pictures are much larger or smaller than those that the model was made for, with
    sides of `own` pixels (None: unknown)."""
    side = config.data.largest_resolution
    if own is None or max(side, own) <= _FAR * min(side, own):
        return []
    key = "data.resolutions" if config.data.resolutions else "data.resolution"
    return [
        f"{key}={config.data.resolutions or side}: the model was made for {own} x {own} pixels; "
        f"use data.resolution={own} unless it should learn another size"
    ]


def of_time_ids(config: Config, overrides: Sequence[str], is_read: bool) -> list[str]:
    """Warn about data.time_ids with a UNet that does not read them."""
    owner = "a UNet that is told sizes, such as SDXL's"
    return [] if is_read else [*idle.of_option(config, "data.time_ids", keys_of(overrides), owner)]


def of_lokr(
    config: Config, overrides: Sequence[str], models: Mapping[str, nn.Module]
) -> Iterator[str]:
    """Warn about options that none of a LoKr's adapters heeds, as their factors are whole.

    models: the trained parts, with their adapters.
    """
    if not isinstance(config.method, LokrConfig):
        return
    every = adapters.all_of(adapters.of_models(models))
    given, owner = keys_of(overrides), "a method.rank below half of the longer side of"
    if not any("lokr_w1_a" in adapter.tensors() for adapter in every):
        if config.method.decompose_both:
            yield from idle.of_option(config, "method.decompose_both", given, f"{owner} w1")
        if not any("lokr_w2_a" in adapter.tensors() for adapter in every):
            yield from idle.of_option(config, "method.alpha", given, f"{owner} w2")


def of_schedule(schedule: ScheduleConfig) -> Iterator[str]:
    """Warn if the decay has no room, once the run's length is known."""
    if not isinstance(schedule, DecayConfig) or schedule.steps == 1:
        return
    steps = decay_steps(schedule)
    if steps <= 1:
        yield (
            f"schedule={schedule.name} has no step left to decay in (schedule.{schedule.begins}, "
            "schedule.warmup_steps and schedule.steps): the rate stays at its peak, as with "
            "schedule=constant"
        )
    elif isinstance(schedule, CosineRestartsConfig) and steps < 2 * schedule.cycles:
        most = max(steps // 2, 1)
        yield (
            f"schedule.cycles={schedule.cycles} leaves fewer than two of the decay's {steps} steps "
            f"per cycle, so the rate does not fall within one; use {most}"
            f"{' or fewer' if most > 1 else ''}"
        )


def _of_clips(config: Config, given: frozenset[str]) -> Iterator[str]:
    """Warn about a clip that repeats, or undoes, what the optimizer does itself; and about having
    none, unless that was requested or the optimizer bounds its updates."""
    clip, own = config.method.clip, _clips_itself(config.optim)
    if clip not in ("none", "global"):  # the default does no harm if updates are bounded
        own = own or _bounds_itself(config.optim)
    is_unbounded = not (_clips_itself(config.optim) or _bounds_itself(config.optim))
    if clip == "none" and is_unbounded and "method.clip" not in given:
        if config.optim.name not in _UNCLIPPED:
            yield (
                f"no gradient is clipped, and optim={config.optim.name} does not bound its updates "
                "itself; method.clip=exact works with the fused backward"
            )
    elif clip != "none" and own:
        yield f"method.clip={clip}, and optim={config.optim.name} {own}; one of them is enough"


def _clips_itself(options: OptimizerConfig) -> str | None:
    """How the optimizer clips gradients, in words, if it does."""
    for option in ("max_grad_norm", "grad_clip"):
        if getattr(options, option, None) is not None:
            return f"clips them again by optim.{option}"
    return None


def _bounds_itself(options: OptimizerConfig) -> str | None:
    """Why the size of a gradient hardly matters to the optimizer, in words, if so."""
    cls = optim.FAMILY.get(options.name)
    return cls.bounds_updates(vars(options)) if cls else None


def of_data(config: Config, overrides: Sequence[str]) -> Iterator[str]:
    """Warn about the user's own pictures with the demo's options."""
    given = keys_of(overrides)
    if "data.path" in given and not given & {"data", "experiment"}:
        yield (
            "data.path is given, but data=emoji24 is chosen, which has the demo's options "
            f"({config.data.resolution} px, batches of {config.data.batch_size}); add data=folder"
        )


def _of_others(config: Config) -> Iterator[str]:
    runtime = config.runtime
    if runtime.accumulation > 1 and runtime.fused_backward:
        yield (
            f"runtime.accumulation={runtime.accumulation} keeps the gradients of all trained "
            "weights between micro-batches, in their dtype, which runtime.fused_backward=true "
            "alone would free; the last backward pass frees them"
        )
    if (
        config.model.quantization != "none"
        and runtime.compile != "none"
        and not runtime.gradient_checkpointing
    ):
        yield (
            f"runtime.compile={runtime.compile} keeps decoded weights for the backward pass, in "
            f"full, which model.quantization={config.model.quantization} alone would free; add "
            "runtime.gradient_checkpointing=true"
        )
    ema = config.method.ema
    if ema and ema.decay == 1 and not ema.warmup:
        yield "method.ema.decay=1 never changes the average from its initial weights"
    if ema and config.schedule.epochs is None and config.schedule.steps < ema.every:
        yield (
            f"method.ema.every={ema.every} never updates the average in "
            f"schedule.steps={config.schedule.steps}: it stays the initial weights"
        )
    if not config.method.export:
        yield (
            "method.export=[] writes no model; python -m trainer.export can write one from the "
            "run's last checkpoint"
        )
