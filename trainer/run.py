"""One run: assemble, then one linear loop of named phases."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from trainer import (
    batches,
    checkpoint,
    conditioning,
    console,
    curvature,
    data,
    execution,
    gradients,
    losses,
    memory,
    method,
    metrics,
    noise,
    optimizers,
    pictures,
    record,
    report,
    result,
    sampling,
    signals,
)
from trainer.config import Config
from trainer.ema import Ema
from trainer.errors import UserError
from trainer.guard import Guard
from trainer.model import Model
from trainer.probe import UpdateProbe
from trainer.schedule import lr_scale

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
    sampler: sampling.Sampler
    optimizer: torch.optim.Optimizer
    guard: Guard
    device: torch.device
    step: int
    seconds: float  # spent in training steps, over all sessions of the run
    eval_loss_before: float  # before the first step
    grad_norm: float  # of the last step with a finite one
    ema: Ema | None

    def averaged(self, wanted: bool = True) -> AbstractContextManager[None]:
        """The model with averaged weights, where there are some and they are wanted."""
        return self.ema.in_place() if self.ema and wanted else nullcontext()


def run(config: Config, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Train as configured, writing everything to `folder`; returns the last eval loss.

    `overrides` are the command line's, by which a sweep's table tells its runs apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with console.logging_to(folder / "train.log"), signals.stop_signals() as stop:
        if not config.resume and checkpoint.completed(folder / "checkpoints"):
            raise UserError(f"{folder} holds a run; go on with resume={folder}, or name another")
        resumed = checkpoint.to_resume(config)
        record.write(folder, asdict(config), _device(config.runtime.device))
        with memory.explained(config, "before the first step"):
            state = assemble(config, folder, resumed, stop)
        writer = metrics.Metrics(folder, config, start_step=state.step)
        train(state, writer, stop)
        return finish(state, writer, overrides)


def assemble(
    config: Config,
    folder: Path,
    resumed: checkpoint.Checkpoint | None,
    stop: Sequence[int] = (),
) -> State:
    """Load the model and the data, encode the data, build the optimizer; then put back what a
    checkpoint holds, where one is given.  Ends the process once `stop` holds a signal."""
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    device = _device(config.runtime.device)
    memory.reset_peak(device)
    dataset = data.load(config.data, stop)
    model = Model(config.model, device)
    result.check(config.method, model)
    model.scheduler = noise.scheduler_config(config.noise, model.scheduler)
    schedule = noise.training_schedule(model.scheduler, config.noise)
    model.keep_text_encoders(config.method.train)
    encoded = conditioning.encode(model, dataset, config.log.prompts, stop)

    model.load_unet()
    memory.return_freed_blocks(sum(p.nbytes for p in model.unet.parameters()))
    method.attach(config.method, model, config.seed)
    log.info("%s, %s, on %s:", config.optim.name, config.method.name, device)
    optimizer = optimizers.build(
        config.optim, torch.nn.ModuleDict(model.trained_parts), config.seed, config.method.rules
    )
    execution.prepare(config, model.trained_parts, device)
    fingerprint = dataset.fingerprint
    if resumed:
        checkpoint.check_data(resumed, fingerprint, config.runtime.allow_config_change)
        method.restore(model, resumed.weights)
        optimizers.restore(optimizer, resumed.optimizer)
        log.info("resumed after step %d", resumed.step)
    counters = resumed.counters if resumed else checkpoint.Counters()
    average = None
    if config.method.ema:
        saved = resumed.average if resumed else {}
        named = method.trained_parameters(model)
        average = Ema(config.method.ema, named, config.seed, saved, resumed.step if resumed else 0)
    return State(
        config=config,
        folder=folder,
        model=model,
        schedule=schedule,
        data=encoded,
        fingerprint=fingerprint,
        sampler=sampling.Sampler(
            model=model,
            data=encoded,
            config=config.log,
            batch_size=config.data.batch_size,
        ),
        optimizer=optimizer,
        guard=Guard(config.runtime.max_skipped_steps, counters.skipped_steps),
        device=device,
        step=resumed.step if resumed else 0,
        seconds=counters.seconds,
        eval_loss_before=counters.eval_loss_before,
        grad_norm=counters.grad_norm,
        ema=average,
    )


def train(state: State, writer: metrics.Metrics, stop: list[int]) -> None:
    """The loop: from `state.step` to the end of the schedule, or until `stop` holds a signal."""
    config, unet = state.config, state.model.unet
    parameters = state.model.trained_parameters()
    taken = gradients.make(config, parameters, state.optimizer, state.grad_norm)
    count = config.runtime.accumulation
    if state.step == 0:
        state.eval_loss_before = evaluate(state, writer)["loss"]
        sample(state, writer)
    progress = console.Progress(state.step, config.schedule.steps)

    for step in range(state.step, config.schedule.steps):
        if stop:
            save(state)
            log.info("stopped; go on with: python -m trainer resume=%s", state.folder)
            raise SystemExit(128 + stop[0])
        started = time.monotonic()
        reports = (step + 1) % config.log.every == 0 or step + 1 == config.schedule.steps

        # Estimate the curvature, where the optimizer wants it; then the loss and its gradients (the
        # fused backward steps the optimizer inside).  Batches, noise and timesteps are drawn from
        # counters: they depend on the step alone.
        lr = optimizers.set_lr(state.optimizer, lr_scale(config.schedule, step))
        probe = UpdateProbe(parameters) if reports else None
        with memory.explained(config, f"in step {step + 1}"):
            if curvature.is_due(state.optimizer):
                batch = draw(state, step * count)
                curvature.estimate(
                    state.optimizer, unet, batch, config.loss, state.schedule, config.seed, step
                )
            micro_losses = partial(loss_of, state, step * count)
            outcome = taken.backward(micro_losses, shares(state, step * count))
            state.grad_norm = taken.clip.last_norm

            # Judge the step: unless loss and gradients are finite, leave everything as it was.
            if state.guard.accepts(step, outcome.loss, outcome.grad_norm, outcome.begun):
                state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema:
                state.ema.update(step + 1)
        state.step = step + 1
        state.seconds += time.monotonic() - started
        progress.advance()

        # Report, evaluate, sample, save.
        if probe:
            values = {"loss": outcome.loss, "lr": lr, "grad_norm": outcome.grad_norm}
            _report(state, writer, progress, values | {"update_ratio": probe.ratio()})
        if _due(config.log.eval_every, state):
            evaluate(state, writer)
        if _due(config.log.sample_every, state):
            sample(state, writer)
        if _due(config.runtime.save_every, state):
            try:
                save(state)
            except UserError as error:
                log.warning("%s; training goes on", error)
    progress.close()


def draw(state: State, number: int) -> batches.Batch:
    """The micro-batch of this number, of those that the run trains on."""
    config = state.config
    inputs = state.data.gather(state.data.dataset.batch(config.seed, number))
    return batches.noised(inputs, state.schedule, config.noise, config.seed, number)


def shares(state: State, first: int) -> list[float]:
    """How much of a step's samples each of its micro-batches is, from number `first` on: every
    sample counts alike, those of a short batch too."""
    numbers = range(first, first + state.config.runtime.accumulation)
    sizes = [len(state.data.dataset.plan.batch(state.config.seed, number)) for number in numbers]
    return [size / sum(sizes) for size in sizes]


def loss_of(state: State, first: int, place: int) -> Tensor:
    """The loss of a step's micro-batch at `place`; `first` is the number of that at 0."""
    batch = draw(state, first + place)
    prediction = batches.predict(state.model.unet, batch)
    return losses.loss(state.config.loss, state.schedule, prediction, batch)


def finish(state: State, writer: metrics.Metrics, overrides: Sequence[str] = ()) -> float:
    """Save, evaluate, draw and export; then say where everything is and what it cost.

    A last checkpoint that cannot be saved does not keep the trained model from being exported; the
    UserError is raised at the end.
    """
    unsaved = None
    try:
        save(state)
    except UserError as error:
        unsaved = error
        log.error("%s", error)
    after = evaluate(state, writer)
    picture = sample(state, writer)
    with state.averaged(state.ema is not None and state.ema.config.export == "average"):
        exported = result.export(
            state.config, state.model, state.folder, state.step, len(state.data.dataset.samples)
        )
    summary = {
        "name": state.config.name,
        "overrides": list(overrides),
        "seed": state.config.seed,
        "steps": state.step,
        "eval_loss_before": state.eval_loss_before,
        "eval_loss_after": after["loss"],
        "seconds": state.seconds,
        "seconds_per_step": state.seconds / state.step,
        "images_per_second": _pictures_seen(state) / state.seconds,
        "optimizer_state_bytes": optimizers.state_bytes(state.optimizer),
        "peak_memory_bytes": memory.peak_bytes(state.device),
        "skipped_steps": state.guard.skipped,
    }
    for key in ("holdout_loss", "ema_loss"):
        if key in after:
            summary[f"{key}_after"] = after[key]
    report.write_summary(state.folder, summary)
    writer.close(summary)
    places = {
        "pictures": picture,
        "result": ", ".join(map(str, exported)),
        "metrics": writer.path,
        "checkpoints": state.folder / "checkpoints",
    }
    log.info("\n%s", report.closing_lines(summary, {k: v for k, v in places.items() if v}))
    if unsaved:
        raise unsaved
    return after["loss"]


def evaluate(state: State, writer: metrics.Metrics) -> dict[str, float]:
    """The loss at the fixed eval points, written as eval/loss, and by quarters of the timesteps;
    that of the pictures that are held out beside it, as eval/holdout_loss; and those of averaged
    weights, as eval/ema_loss and eval/ema_holdout_loss."""
    found = _losses(state)
    if state.ema:
        with state.averaged():
            averaged = _losses(state)
        found |= {
            f"ema_{key}": averaged[key] for key in ("loss", "holdout_loss") if key in averaged
        }
    writer.write(state.step, {f"eval/{key}": value for key, value in found.items()})
    return found


def _losses(state: State) -> dict[str, float]:
    """The model's losses at the eval points, of the pictures that it trains on and of those that
    are held out."""
    dataset, found = state.data.dataset, {}
    for prefix, rows in (("", dataset.own), ("holdout_", dataset.held_out)):
        if rows:
            points = eval_batches(state, rows)
            losses_of = losses.evaluate(state.model.unet, state.schedule, points)
            found |= {prefix + key: value for key, value in losses_of.items()}
    return found


def eval_batches(state: State, rows: list[int]) -> Iterator[batches.Batch]:
    """The fixed eval points, of these rows.  They are made anew each time: what is read of a
    caption changes where text encoders are trained."""
    config, dataset = state.config, state.data.dataset
    return batches.eval_batches(
        rows,
        state.data.plain,
        state.schedule,
        config.log.eval_points,
        config.data.batch_size,
        size_of=lambda row: dataset.samples[row].bucket,
    )


def sample(state: State, writer: metrics.Metrics) -> Path | None:
    """Draw the fixed prompts; write each picture, and a grid of original, before and now.

    Returns the grid's path, or None where no pictures are wanted (log.sample_count=0).
    """
    sampler = state.sampler
    if not sampler.count:
        return None
    with state.averaged(state.ema is not None and state.ema.config.sample == "average"):
        drawn = sampler.draw()
    samples = state.folder / "samples"
    pictures.save(samples / f"step-{state.step:06d}", drawn)
    rows = {"original": sampler.originals()}
    if state.step:
        rows["before"] = pictures.load(samples / f"step-{0:06d}", sampler.count)
    is_last = state.step == state.config.schedule.steps
    rows["after" if is_last else f"step {state.step}"] = drawn
    grid = pictures.grid({k: row for k, row in rows.items() if row}, sampler.captions())
    return writer.write_picture(state.step, grid)


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


def _report(
    state: State, writer: metrics.Metrics, progress: console.Progress, values: dict[str, float]
) -> None:
    seconds_per_step = state.seconds / state.step
    images_per_second = _pictures_seen(state) / state.seconds
    epochs = _micro_batches(state) / state.data.dataset.plan.batches_per_epoch
    writer.write(
        state.step,
        {f"train/{key}": value for key, value in values.items()}
        | {
            "train/epoch": epochs,
            "train/skipped_steps": state.guard.skipped,
            "perf/seconds_per_step": seconds_per_step,
            "perf/images_per_second": images_per_second,
            "memory/peak_bytes": memory.peak_bytes(state.device),
            "memory/optimizer_state_bytes": optimizers.state_bytes(state.optimizer),
        }
        | optimizers.found_rate(state.optimizer),
    )
    seconds_left = (state.config.schedule.steps - state.step) * seconds_per_step
    progress.show(state.step, values["loss"], images_per_second, seconds_left)


def _pictures_seen(state: State) -> int:
    return state.data.dataset.plan.pictures_in(state.config.seed, _micro_batches(state))


def _micro_batches(state: State) -> int:
    """How many have been trained on."""
    return state.step * state.config.runtime.accumulation


def _due(every: int, state: State) -> bool:
    """Whether something that happens every `every` steps, but not after the last, happens now."""
    return every > 0 and state.step % every == 0 and state.step < state.config.schedule.steps


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
