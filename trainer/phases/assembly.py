"""The beginning of a run: everything is checked, encoded, loaded and restored."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer import data, planner
from trainer.checks import remarks
from trainer.config import AdapterConfig, Config
from trainer.models import execution, quantization
from trainer.models.model import Model
from trainer.objective import encoding
from trainer.objective.noise_schedule import training_schedule
from trainer.objective.trained_scheduler import scheduler_config
from trainer.phases.intervals import Intervals
from trainer.phases.state import State
from trainer.reporting.clock import Clock, OptimizerClock
from trainer.reporting.watch import Watch
from trainer.sampling import prompts, sampler
from trainer.storage import checkpoint, result, resuming
from trainer.system import memory, processes
from trainer.training import gradients, method, optimizers, schedule
from trainer.training.ema import Ema
from trainer.training.guard import Guard, slowed
from trainer.wording import plural

log = logging.getLogger(__name__)


def assemble(
    config: Config,
    folder: Path,
    resumed: checkpoint.Checkpoint | None,
    stop: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> State:
    """Load the model and the data, encode the data, build the optimizer, and restore `resumed`.
    Ends the process once `stop` holds a signal."""
    device = execution.device_of(config.runtime.device)
    clock, peaks = Clock(), memory.Peaks(device)  # from here on, encoding included
    dataset = data.load(config.data, stop)
    step, epochs = (resumed.step, resumed.epochs) if resumed else (0, 0.0)
    config = _settled(config, dataset, (step, epochs))
    model = Model(config.model, device)
    sketch, fingerprint = model.sketch(), dataset.fingerprint
    if resumed:
        _check_resumed(config, resumed, sketch, fingerprint)
    # Refuse what cannot work before hours of encoding.  A checkpoint already contains the adapter.
    start_from = None
    if isinstance(config.method, AdapterConfig) and not resumed:
        start_from = config.method.start_from
    _check_model(config, model, start_from, overrides)
    model.scheduler = scheduler_config(config.noise, model.scheduler)
    noise_schedule = training_schedule(model.scheduler, config.noise)
    planned = planner.announce(config, model, device)
    # The text encoders and the VAE are gone before the UNet is loaded: one part at a time.
    encoded = _encoded(config, model, dataset, stop)
    optimizer = _trainable(config, model, device, start_from, overrides)
    if resumed:
        put_back(model, optimizer, resumed)
        log.info("resumed after step %d", resumed.step)
    trained = [*method.trained_parameters(model).values()]
    state = State(
        config=config,
        folder=folder,
        model=model,
        noise_schedule=noise_schedule,
        data=encoded,
        data_fingerprint=fingerprint,
        model_sketch=sketch,
        sampler=sampler.of_run(model, encoded, config.log, config.data.batch_size, stop),
        optimizer=optimizer,
        guard=Guard(config.runtime.max_skipped_steps),
        device=device,
        step=step,
        # With a changed batch size or number of pictures: the number at the same point of an epoch.
        micro_batches=round(epochs * float(dataset.plan.batches_per_epoch)),
        backward=gradients.make(config, trained, optimizer),
        losses_before=resumed.losses_before if resumed else {},
        intervals=Intervals(config, dataset.plan.batches_per_epoch),
        clock=clock,
        optimizer_clock=OptimizerClock(device, config.runtime.fused_backward),
        watch=Watch(),
        overrides=overrides,
        ema=_average(config, model, resumed),
        peaks=peaks,
        planned_bytes=planned,
        stop=stop,
    )
    if resumed:
        for name, counter in state.counters.items():
            counter.load_state_dict(resumed.counters[name])
        if back := state.guard.rollbacks:
            message = "after %d of %d rollbacks: trains at %g times the schedule's learning rate"
            log.info(message, back, config.runtime.max_rollbacks, state.guard.lr_scale)
    return state


def _check_resumed(
    config: Config, resumed: checkpoint.Checkpoint, sketch: str, fingerprint: str
) -> None:
    """Refuse to resume with other data, another model or a shorter schedule, unless that may
    change, and say what changes.  sketch, fingerprint: of this run's model and data."""
    may_change = config.runtime.allow_config_change
    resuming.check_length(resumed, config.schedule, may_change)
    resuming.check_content(resumed, sketch, fingerprint, may_change)
    _log_other_rate(config, resumed)
    resuming.drop_other_measure(resumed, config, sketch, fingerprint)


def _log_other_rate(config: Config, resumed: checkpoint.Checkpoint) -> None:
    """Say so if the next step has another learning rate than the checkpoint's configuration gave
    it, as when a run whose rate had decayed becomes longer."""
    if resumed.step >= config.schedule.steps:
        return
    before = schedule.of_saved(resumed.config["schedule"])
    scale = slowed(resumed.counters["guard"].get("rollbacks", 0))
    was = resumed.config["optim"]["lr"] * schedule.lr_scale(before, resumed.step) * scale
    now = config.optim.lr * schedule.lr_scale(config.schedule, resumed.step) * scale
    if not math.isclose(was, now, rel_tol=1e-6):
        log.warning(
            "the learning rate goes on at %.4g, in a schedule of %d steps; the checkpoint's, of %d "
            "steps, had come to %.4g",
            *(now, config.schedule.steps, before.steps, was),
        )


def _check_model(
    config: Config, model: Model, start_from: str | None, overrides: Sequence[str]
) -> None:
    """Refuse what does not fit the model, before hours of encoding."""
    for remark in [
        *remarks.of_resolution(config, model.resolution),
        *remarks.of_time_ids(config, overrides, model.reads_time_ids),
    ]:
        log.warning("%s", remark)
    result.check(config.method, model)
    method.check(config.method, model, start_from)


def _encoded(
    config: Config, model: Model, dataset: data.Dataset, stop: Sequence[int]
) -> encoding.Encoded:
    """The encoded pictures, captions, and prompts to draw."""
    model.keep_text_encoders(config.method.train)
    drawn = prompts.of_config(config.log, config.data.largest_resolution)
    texts = [text for prompt in drawn for text in prompt.texts]
    unwanted = filter(None, [config.log.negative_prompt])
    return encoding.encode(model, dataset, [*texts, *unwanted], stop)


def _settled(config: Config, dataset: data.Dataset, done: tuple[int, float]) -> Config:
    """The configuration with schedule.steps resolved from the data and schedule.epochs.  done: the
    steps and epochs already done."""
    steps_per_epoch = dataset.plan.batches_per_epoch / config.runtime.micro_batches
    known = schedule.settled(config.schedule, float(steps_per_epoch), done)
    if known.epochs is not None:
        log.info("schedule.epochs=%g: %s", known.epochs, plural(known.steps, "step"))
    for remark in remarks.of_schedule(known):
        log.warning("%s", remark)
    return replace(config, schedule=known)


def _trainable(
    config: Config,
    model: Model,
    device: torch.device,
    start_from: str | None,
    overrides: Sequence[str],
) -> torch.optim.Optimizer:
    """Load the UNet and prepare it for training; returns the optimizer."""
    model.load_unet()
    weights = quantization.num_weights(model.unet)  # activations are as large if quantized
    memory.return_freed_blocks(weights * model.unet.dtype.itemsize)
    method.attach(config.method, model, config.seed, start_from)
    count, where = processes.world_size(), str(device)
    if count > 1:
        each = plural(config.runtime.accumulation, "micro-batch", "es")
        where = f"{count} processes, each {each}"
    log.info("%s, %s, on %s:", config.optim.name, config.method.name, where)
    parts = torch.nn.ModuleDict(model.trained_parts)
    optimizer = optimizers.build(config.optim, parts, config.seed, config.method.rules)
    for remark in [
        *remarks.of_rate(config, quantization.num_weights(parts)),
        *remarks.of_average(config, optimizer),
        *remarks.of_lokr(config, overrides, model.trained_parts),
    ]:
        log.warning("%s", remark)
    execution.prepare(config, model.trained_parts, device)
    return optimizer


def put_back(
    model: Model, optimizer: torch.optim.Optimizer, resumed: checkpoint.Checkpoint
) -> None:
    """Restore weights and optimizer from a checkpoint, and free its tensors."""
    method.restore(model, resumed.weights)
    resumed.weights.clear()  # as large as the model, and in its place now
    optimizers.restore(optimizer, resumed.optimizer)
    resumed.optimizer.clear()


def _average(config: Config, model: Model, resumed: checkpoint.Checkpoint | None) -> Ema | None:
    if config.method.ema is None or not processes.is_main():
        return None
    saved, step = (resumed.average, resumed.step) if resumed else ({}, 0)
    return Ema(config.method.ema, method.trained_parameters(model), config.seed, saved, step)
