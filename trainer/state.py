"""A run between two steps: everything that a step changes or reads, assembled and saved."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from trainer import (
    checkpoint,
    conditioning,
    data,
    execution,
    memory,
    method,
    noise,
    optimizers,
    remarks,
    result,
    sampling,
)
from trainer.config import Config
from trainer.ema import Ema
from trainer.guard import Guard
from trainer.model import Model

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class State:
    """Everything that a step changes or reads; `step` counts the steps done."""

    config: Config
    folder: Path
    model: Model
    schedule: DDPMScheduler
    data: conditioning.Encoded
    fingerprint: str  # of the data
    base: str  # a sketch of the model that training began with
    sampler: sampling.Sampler
    optimizer: torch.optim.Optimizer
    guard: Guard
    device: torch.device
    step: int
    seconds: float  # spent in training steps, over all sessions of the run
    eval_loss_before: float  # before the first step
    grad_norm: float  # of the last step with a finite one
    overrides: Sequence[str]  # the command line's
    ema: Ema | None
    peaks: memory.Peaks
    stop: Sequence[int] = ()  # holds a signal once the run is asked to stop

    def averaged(self, wanted: bool = True) -> AbstractContextManager[None]:
        """The model with averaged weights, where there are some and they are wanted."""
        return self.ema.in_place() if self.ema and wanted else nullcontext()

    @property
    def micro_batches(self) -> int:
        """How many have been trained on."""
        return self.step * self.config.runtime.accumulation

    @property
    def pictures_seen(self) -> int:
        """How many pictures have been trained on, each time counted."""
        return self.data.dataset.plan.pictures_in(self.config.seed, self.micro_batches)

    @property
    def epochs(self) -> float:
        return self.micro_batches / self.data.dataset.plan.batches_per_epoch


def assemble(
    config: Config,
    folder: Path,
    resumed: checkpoint.Checkpoint | None,
    stop: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> State:
    """Load the model and the data, encode the data, build the optimizer; then put back what a
    checkpoint holds, where one is given.  Ends the process once `stop` holds a signal."""
    device = execution.device_of(config.runtime.device)
    peaks = memory.Peaks(device)
    dataset = data.load(config.data, stop)
    model = Model(config.model, device)
    fingerprint, base = dataset.fingerprint, model.sketch()
    if resumed:
        checkpoint.check_content(resumed, base, fingerprint, config.runtime.allow_config_change)
    result.check(config.method, model)
    model.scheduler = noise.scheduler_config(config.noise, model.scheduler)
    schedule = noise.training_schedule(model.scheduler, config.noise)
    model.keep_text_encoders(config.method.train)
    method.check(config.method, model)
    encoded = conditioning.encode(model, dataset, config.log.prompts, stop)

    model.load_unet()
    memory.return_freed_blocks(sum(p.nbytes for p in model.unet.parameters()))
    optimizer = _trainable(config, model, device)
    if resumed:
        _put_back(model, optimizer, resumed)
    counters = resumed.counters if resumed else checkpoint.Counters()
    return State(
        config=config,
        folder=folder,
        model=model,
        schedule=schedule,
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
        guard=Guard(config.runtime.max_skipped_steps, counters.skipped_steps),
        device=device,
        step=resumed.step if resumed else 0,
        seconds=counters.seconds,
        eval_loss_before=counters.eval_loss_before,
        grad_norm=counters.grad_norm,
        overrides=overrides,
        ema=_average(config, model, resumed),
        peaks=peaks,
        stop=stop,
    )


def _trainable(config: Config, model: Model, device: torch.device) -> torch.optim.Optimizer:
    """Make the model what the method trains, executed as configured; -> its optimizer."""
    method.attach(config.method, model, config.seed)
    log.info("%s, %s, on %s:", config.optim.name, config.method.name, device)
    parts = torch.nn.ModuleDict(model.trained_parts)
    optimizer = optimizers.build(config.optim, parts, config.seed, config.method.rules)
    trained = sum(p.numel() for p in method.trained_parameters(model).values())
    for remark in remarks.of_rate(config, trained):
        log.warning("%s", remark)
    execution.prepare(config, model.trained_parts, device)
    return optimizer


def _put_back(
    model: Model, optimizer: torch.optim.Optimizer, resumed: checkpoint.Checkpoint
) -> None:
    """Weights and optimizer as a checkpoint has them, which gives them up."""
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


def save(state: State) -> None:
    """Write a checkpoint after this step."""
    checkpoint.save(
        state.folder / "checkpoints",
        checkpoint.Checkpoint(
            step=state.step,
            weights=method.trained_tensors(state.model),
            optimizer=state.optimizer.state_dict(),
            average=state.ema.state() if state.ema else {},
            config=asdict(state.config),
            overrides=list(state.overrides),
            model=state.base,
            data=state.fingerprint,
            counters=checkpoint.Counters(
                skipped_steps=state.guard.skipped,
                seconds=state.seconds,
                eval_loss_before=state.eval_loss_before,
                grad_norm=state.grad_norm,
            ),
        ),
        keep=state.config.runtime.keep_checkpoints,
    )
