"""A run between two steps: everything that a step reads or changes."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from trainer import data, planner
from trainer.checks import remarks
from trainer.config import Config
from trainer.drawing import prompts, sampling
from trainer.models import execution
from trainer.models.model import Model
from trainer.objective import conditioning, losses, noise
from trainer.phases.intervals import Intervals
from trainer.reporting.clock import Clock, OptimizerClock
from trainer.reporting.watch import Watch
from trainer.storage import checkpoint, result, resuming
from trainer.system import memory
from trainer.training import method, optimizers, schedule
from trainer.training.ema import Ema
from trainer.training.guard import Guard

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class State:
    """Everything that a step changes or reads; `step` counts the steps done."""

    config: Config
    folder: Path
    model: Model
    noise_schedule: DDPMScheduler
    data: conditioning.Encoded
    fingerprint: str  # of the data
    base: str  # fingerprint of the model that training began with
    sampler: sampling.Sampler
    optimizer: torch.optim.Optimizer
    guard: Guard
    device: torch.device
    step: int
    micro_batches: int  # the number of the next one
    counters: checkpoint.Counters
    intervals: Intervals
    clock: Clock
    optimizer_clock: OptimizerClock
    watch: Watch
    overrides: Sequence[str]  # the command line's
    ema: Ema | None
    peaks: memory.Peaks
    planned_bytes: int | None  # the planned peak of a step; None for a small model
    stop: Sequence[int] = ()  # holds a signal once the run is asked to stop
    owes_checkpoint: bool = False  # whether one was due after a step that was skipped
    is_proven: bool = True  # whether a whole step has followed the newest checkpoint

    def averaged(self, wanted: bool = True) -> AbstractContextManager[None]:
        """A block in which the model has the averaged weights, if any, if they are wanted."""
        return self.ema.in_place() if self.ema and wanted else nullcontext()

    @property
    def is_new(self) -> bool:
        """Whether the model is untrained.  With an adapter to start from it is not, and the
        prediction type that the adapter was trained for is unknown."""
        return self.step == 0 and not self.starts_from_adapter

    @property
    def starts_from_adapter(self) -> bool:
        """Whether the run starts from another run's adapter."""
        return getattr(self.config.method, "start_from", None) is not None

    @property
    def exports_average(self) -> bool:
        """Whether the result has the averaged weights."""
        return self.ema is not None and self.ema.config.export == "average"

    @property
    def loss_before(self) -> float:
        """The loss before the first step, if training losses are comparable with it, otherwise
        NaN."""
        is_one = losses.is_bounded_by_evaluation(self.config)
        return self.counters.eval_loss_before if is_one else math.nan

    @property
    def epochs(self) -> float:
        """The number of epochs done."""
        return float(self.micro_batches / self.data.dataset.plan.batches_per_epoch)


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
    counters = resumed.counters if resumed else checkpoint.Counters()
    clock = Clock(counters)
    peaks = memory.Peaks(device, counters.peak_training_bytes, counters.peak_bytes)
    dataset = data.load(config.data, stop)
    config = _settled(config, dataset, (resumed.step, counters.epochs) if resumed else (0, 0.0))
    if resumed:
        resuming.check_length(resumed, config.schedule)
    model = Model(config.model, device)
    for remark in remarks.of_resolution(config, model.resolution):
        log.warning("%s", remark)
    fingerprint, base = dataset.fingerprint, model.sketch()
    if resumed:
        resuming.check_content(resumed, base, fingerprint, config.runtime.allow_config_change)
        resuming.drop_other_measure(config, fingerprint, base, resumed)
    result.check(config.method, model)
    model.scheduler = noise.scheduler_config(config.noise, model.scheduler)
    noise_schedule = noise.training_schedule(model.scheduler, config.noise)
    # A checkpoint already contains the adapter.
    start_from = None if resumed else getattr(config.method, "start_from", None)
    method.check(config.method, model, start_from)
    planned = planner.announce(config, model, device)
    model.keep_text_encoders(config.method.train)
    drawn = prompts.of_config(config.log, config.data.largest_resolution)
    drawn_texts = [text for prompt in drawn for text in prompt.texts]
    unwanted = filter(None, [config.log.negative_prompt])
    encoded = conditioning.encode(model, dataset, [*drawn_texts, *unwanted], stop)

    model.load_unet()
    memory.return_freed_blocks(sum(p.nbytes for p in model.unet.parameters()))
    optimizer = _trainable(config, model, device, start_from)
    if resumed:
        _put_back(model, optimizer, resumed)
    return State(
        config=config,
        folder=folder,
        model=model,
        noise_schedule=noise_schedule,
        data=encoded,
        fingerprint=fingerprint,
        base=base,
        sampler=sampling.Sampler(
            model=model,
            data=encoded,
            config=config.log,
            batch_size=config.data.batch_size,
            stop=stop,
        ),
        optimizer=optimizer,
        guard=Guard(
            config.runtime.max_skipped_steps, counters.skipped_steps, counters.last_whole_step
        ),
        device=device,
        step=resumed.step if resumed else 0,
        # With a changed batch size or number of pictures: the number at the same point of an epoch.
        micro_batches=round(counters.epochs * float(dataset.plan.batches_per_epoch)),
        counters=counters,
        intervals=Intervals(config, dataset.plan.batches_per_epoch),
        clock=clock,
        optimizer_clock=OptimizerClock(device, config.runtime.fused_backward),
        watch=Watch(**counters.watch),
        overrides=overrides,
        ema=_average(config, model, resumed),
        peaks=peaks,
        planned_bytes=planned,
        stop=stop,
    )


def _settled(config: Config, dataset: data.Dataset, done: tuple[int, float]) -> Config:
    """The configuration with schedule.steps resolved from the data and schedule.epochs.  done: the
    steps and epochs already done."""
    steps_per_epoch = dataset.plan.batches_per_epoch / config.runtime.accumulation
    known = schedule.settled(config.schedule, float(steps_per_epoch), done)
    if known.epochs is not None:
        log.info("schedule.epochs=%g: %d steps", known.epochs, known.steps)
    for remark in remarks.of_schedule(known):
        log.warning("%s", remark)
    return replace(config, schedule=known)


def _trainable(
    config: Config, model: Model, device: torch.device, start_from: str | None
) -> torch.optim.Optimizer:
    """Prepare the model for training; returns its optimizer."""
    method.attach(config.method, model, config.seed, start_from)
    log.info("%s, %s, on %s:", config.optim.name, config.method.name, device)
    parts = torch.nn.ModuleDict(model.trained_parts)
    optimizer = optimizers.build(config.optim, parts, config.seed, config.method.rules)
    for remark in remarks.of_rate(config, sum(p.numel() for p in parts.parameters())):
        log.warning("%s", remark)
    execution.prepare(config, model.trained_parts, device)
    return optimizer


def _put_back(
    model: Model, optimizer: torch.optim.Optimizer, resumed: checkpoint.Checkpoint
) -> None:
    """Restore weights and optimizer from a checkpoint, and free its tensors."""
    method.restore(model, resumed.weights)
    resumed.weights.clear()  # as large as the model, and in its place now
    optimizers.restore(optimizer, resumed.optimizer)
    resumed.optimizer.clear()
    log.info("resumed after step %d", resumed.step)


def _average(config: Config, model: Model, resumed: checkpoint.Checkpoint | None) -> Ema | None:
    if config.method.ema is None:
        return None
    saved, step = (resumed.average, resumed.step) if resumed else ({}, 0)
    return Ema(config.method.ema, method.trained_parameters(model), config.seed, saved, step)
