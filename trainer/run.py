"""One run: assemble, then one linear loop of named phases."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from trainer import (
    batches,
    checkpoint,
    console,
    curvature,
    evaluation,
    gradients,
    intervals,
    losses,
    measure,
    memory,
    method,
    metrics,
    optimizers,
    patience,
    record,
    remarks,
    report,
    result,
    run_folder,
    signals,
)
from trainer.config import Config, file_name, keys_of
from trainer.errors import UserError, reason
from trainer.guard import broken
from trainer.probe import UpdateProbe
from trainer.schedule import lr_scale
from trainer.state import State, assemble, rotate, save
from trainer.summary import of_failed, summary_of

log = logging.getLogger(__name__)

_THREADS = torch.get_num_threads()  # as torch chose


def run(config: Config, folder: Path, overrides: Sequence[str] = ()) -> float:
    """Train as configured, writing everything to `folder`; returns the final loss of the
    exported weights, of held-out pictures where there are some.

    `overrides` are the command line's: they distinguish the runs of a sweep's table, and a resumed
    run has them again.
    """
    run_folder.refuse_occupied(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with console.logging_to(folder / "train.log"), signals.stop_signals() as stop:
        for remark in remarks.of_config(config, overrides):
            log.warning("%s", remark)
        state = begin(config, folder, stop, overrides)
        writer = metrics.Metrics(folder, state.config, start_step=state.step)
        try:
            train(state, writer)
            return finish(state, writer)
        except Exception as error:
            if not writer.is_closed:
                _conclude_failed(state, writer, error)
            raise


def begin(
    config: Config, folder: Path, stop: Sequence[int] = (), overrides: Sequence[str] = ()
) -> State:
    """Prepare the first step, or the next of a resumed run; then record it in the folder.  A run
    that is refused before that has only opened train.log there.

    The checkpoint resumed from, as large as the model, is freed on return.
    """
    patience.renew()
    torch.set_num_threads(config.runtime.threads or _THREADS)
    resumed = checkpoint.to_resume(config, keys_of(overrides))
    with memory.explained(config, "before the first step"):
        state = assemble(config, folder, resumed, stop, overrides)
    if resumed:
        checkpoint.set_aside_newer(folder / "checkpoints", resumed.step)
        run_folder.carry_before(checkpoint.find(config.resume or "")[-1], folder)
    record.write(folder, asdict(config), state.device)  # as it was asked for, to be known by
    return state


def train(state: State, writer: metrics.Metrics) -> None:
    """The loop: from `state.step` to the end of the schedule, or until a signal asks to stop."""
    config, optimizer = state.config, state.optimizer
    parameters = list(method.trained_parameters(state.model).values())
    backward = gradients.make(config, parameters, optimizer, state.counters.grad_norm)
    if state.step == 0:
        found = evaluation.evaluate(state, writer)
        _refuse_ruined(state, found.get("loss", 0.0))
        state.counters.eval_loss_before = found.get("loss", math.nan)
        state.counters.holdout_loss_before = found.get("holdout_loss", math.nan)
        evaluation.sample(state, writer)
    if state.step == config.schedule.steps:
        _nothing_to_train(state)
    progress = console.Progress(state.step, config.schedule.steps)

    for step in range(state.step, config.schedule.steps):
        if state.stop:
            save(state)
            rotate(state)
            writer.draw_curves()
            _stopped(state)
        state.peaks.end("rest")
        started, first = time.monotonic(), state.micro_batches
        members = members_of(state, first)
        reports = (step + 1) % config.log.every == 0 or step + 1 == config.schedule.steps

        # Estimate the curvature, where the optimizer wants it; then the loss and its gradients (the
        # fused backward steps the optimizer inside).  Batches, noise and timesteps are drawn from
        # counters: they depend on the step alone.
        lr = optimizers.set_lr(optimizer, lr_scale(config.schedule, step))
        probe = UpdateProbe(parameters) if reports else None
        # What an estimate has changed is no state between two steps.
        keeping = nullcontext() if curvature.is_due(optimizer) else _keeping(state)
        with memory.explained(config, f"in step {step + 1}"), keeping:
            predict = partial(weighted_prediction, state, first)
            curvature.estimate(optimizer, backward, predict, config.seed, step)
            outcome = backward.of_step(partial(loss_of, state, first), shares(members))
            state.counters.grad_norm = backward.clip.last_norm

            # Judge the step: unless loss and gradients are finite, leave everything as it was.
            if state.guard.accepts(step + 1, outcome.loss, outcome.grad_norm, outcome.begun):
                with state.optimizer_clock.measuring():
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if state.ema:
                state.ema.update(step + 1)
        state.watch.step(outcome.loss, outcome.grad_norm, state.loss_before)
        state.step, state.micro_batches = step + 1, first + len(members)
        if reports and state.device.type == "cuda":
            torch.cuda.synchronize(state.device)  # what a step queued belongs to its seconds
        shapes = [(state.data.dataset.samples[rows[0]].bucket, len(rows)) for rows in members]
        state.clock.step(time.monotonic() - started, shapes, sum(map(len, members)))
        state.peaks.end("training")
        progress.advance()
        if state.guard.in_a_row:
            _refuse_broken(state)
            if wrong := state.guard.complaint():
                _give_up(state, wrong)
        if not (state.is_proven or state.guard.in_a_row):
            state.is_proven = True
            rotate(state)

        if probe:
            values = state.watch.lately() | {"lr": lr, "grad_norm": outcome.grad_norm}
            _report(state, writer, progress, values | {"update_ratio": probe.ratio()})
        _between_steps(state, writer)
    progress.close()


@contextmanager
def _keeping(state: State) -> Iterator[None]:
    """Within it, a batch that cannot be read ends the run with a checkpoint of the last step, since
    which neither weights nor optimizer have changed."""
    try:
        yield
    except UserError as error:
        if not state.step or state.guard.in_a_row:
            raise
        try:
            saved = save(state)
        except UserError as second:
            log.error("%s", second)
            raise error from None
        raise UserError(f"{error} (resume={saved})") from error


def _between_steps(state: State, writer: metrics.Metrics) -> None:
    """Evaluate, sample, save and export: whatever is due after this step."""
    is_due = partial(state.intervals.is_due, step=state.step)
    if is_due(intervals.EVALUATING):
        with _keeping(state):
            evaluation.evaluate(state, writer)
    if is_due(intervals.DRAWING):
        evaluation.sample(state, writer)
    if is_due(intervals.EVALUATING) or is_due(intervals.SAVING):
        writer.draw_curves()
    with _going_on():
        is_last = state.step == state.config.schedule.steps  # which is saved at the end
        if is_due(intervals.SAVING) or (state.owes_checkpoint and not is_last):
            _save_whole(state)
    with _going_on():
        if is_due(intervals.EXPORTING):
            _export(state)


@contextmanager
def _going_on() -> Iterator[None]:
    """Within it, what cannot be written does not end the run."""
    try:
        yield
    except UserError as error:
        log.warning("%s; training continues", error)


def _save_whole(state: State) -> None:
    """Save now or, after a skipped step, after the next good one."""
    was_owed, state.owes_checkpoint = state.owes_checkpoint, state.guard.in_a_row > 0
    if not state.owes_checkpoint:
        save(state)
        rotate(state)
    elif not was_owed:
        log.warning(
            "no checkpoint at step %d, which was skipped; one will be saved after the next good "
            "step",
            state.step,
        )


def draw(state: State, number: int) -> batches.Batch:
    """Training micro-batch `number`, counted over the whole run, with its noise and timesteps."""
    config = state.config
    inputs = state.data.gather(state.data.dataset.batch(config.seed, number))
    return batches.noised(inputs, state.noise_schedule, config.noise, config.seed, number)


def members_of(state: State, first: int) -> list[list[int]]:
    """The samples of each of a step's micro-batches, from number `first` on."""
    numbers = range(first, first + state.config.runtime.accumulation)
    return [state.data.dataset.plan.batch(state.config.seed, number) for number in numbers]


def shares(members: list[list[int]]) -> list[float]:
    """Each micro-batch's share of a step's samples: every sample counts alike, those of a short
    batch too."""
    sizes = list(map(len, members))
    return [size / sum(sizes) for size in sizes]


def loss_of(state: State, first: int, place: int) -> Tensor:
    """The loss of the run's micro-batch number `first + place`; `place` counts within the step."""
    batch = draw(state, first + place)
    prediction = batches.predict(state.model.unet, batch)
    return losses.loss(state.config.loss, state.noise_schedule, prediction, batch)


def weighted_prediction(state: State, number: int) -> tuple[Tensor, Tensor | None]:
    """The prediction for training micro-batch `number`, and how often each element's squared error
    counts in the loss."""
    batch = draw(state, number)
    factor = losses.factor(state.config.loss, state.noise_schedule, batch)
    return batches.predict(state.model.unet, batch), factor


def finish(state: State, writer: metrics.Metrics) -> float:
    """Save, evaluate, export and draw; then log where everything is and what it cost.

    Neither a checkpoint that cannot be saved nor a loss that is not finite prevents the export, and
    an export that fails does not prevent the summary; the first UserError is raised at the end.
    """
    failure, exported = None, list[Path]()
    try:
        save(state)
    except UserError as error:
        failure = error
        log.error("%s", error)
    after = evaluation.evaluate(state, writer)
    rotate(state, is_good=math.isfinite(after.get("loss", math.nan)))
    if state.stop:
        _stopped(state)
    if not math.isfinite(after.get("loss", 0.0)):
        failure = UserError(
            f"the trained model's loss is {after['loss']}, so it is unusable. Lower optim.lr, or "
            "look at train/loss in metrics.jsonl for the step where it went wrong. "
            f"{_way_back(state)}"
        )
    try:
        exported = _export(state)
    except UserError as error:
        failure = failure or error
        log.error("%s", error)
    picture = evaluation.sample(state, writer)
    state.peaks.end("rest")
    summary = summary_of(state, after)
    if not state.clock.has_stepped:
        summary |= report.costs_of(state.folder, state.step)
    if failure:
        summary = report.of_failure(state.folder, summary, failure, has_result=bool(exported))
    report.write_summary(state.folder, summary)
    writer.close(summary)
    for remark in remarks.of_outcome(summary):
        log.warning("%s", remark)
    places = {
        "pictures": picture,
        "result": ", ".join(map(str, exported)),
        "metrics": writer.path,
        "curves": writer.curves if writer.curves.exists() else None,
        "checkpoints": state.folder / "checkpoints",
    }
    log.info("\n%s", report.closing_lines(summary, {k: v for k, v in places.items() if v}))
    if failure:
        raise failure
    return measure.objective(summary)


def _conclude_failed(state: State, writer: metrics.Metrics, error: Exception) -> None:
    """Leave what is known of a run that failed.  Nothing that goes wrong here hides the error."""
    try:
        known = report.of_failure(state.folder, of_failed(state), error)
        report.write_summary(state.folder, known)
        writer.close(known)
    except Exception as second:  # of a GPU that answers nothing more, of a full disk: any kind
        log.warning("could not write the summary of this run: %s", second)


def _export(state: State) -> list[Path]:
    """Write the result as it is now; -> its files and folders.  Before the end of the run, it goes
    to a folder of its own, and its name has the step."""
    name, folder = file_name(state.config.name), state.folder
    if state.step < state.config.schedule.steps:
        step = f"step-{state.step:06d}"
        name, folder = f"{name}-{step}", folder / "results" / step
    pictures = state.data.dataset.num_pictures
    try:
        with state.clock.aside("exporting"), state.averaged(state.exports_average):
            return result.export(state.config, name, state.model, folder, state.step, pictures)
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise UserError(
            "out of memory while writing the result; python -m trainer.export can write it from a "
            f"checkpoint ({reason(error)})"
        ) from error


def _refuse_ruined(state: State, loss: float) -> None:
    """Raise UserError for a model whose loss is not finite before anything is trained: no step
    would change that."""
    if math.isfinite(loss):
        return
    names = broken(dict(torch.nn.ModuleDict(state.model.trained_parts).named_parameters()))
    why = f"its {names[0]} is not finite" if names else "it overflows"
    raise UserError(
        f"model.path={state.model.origin}: eval/loss is {loss} before the first step, because "
        f"{why}; use another copy of the model, or model.dtype=float32"
    )


def _nothing_to_train(state: State) -> None:
    """Say that a resumed run is at its end: what follows is written anew."""
    log.info(
        "already at step %d of %d: nothing to train; evaluating, exporting and drawing again (to "
        "train longer set %s=... runtime.allow_config_change=true)",
        state.step,
        state.config.schedule.steps,
        "schedule.steps" if state.config.schedule.epochs is None else "schedule.epochs",
    )


def _stopped(state: State) -> NoReturn:
    """End a saved run, as the signal asks."""
    log.info("stopped; resume with: python -m trainer resume=%s", state.folder)
    signals.end(state.stop[0])


def _refuse_broken(state: State) -> None:
    """Raise UserError after a skipped step for trained weights that are not finite: every later
    step would be skipped too."""
    names = broken(method.trained_parameters(state.model))
    if not names:
        return
    others = f" and {len(names) - 1} others are" if len(names) > 1 else " is"
    since = f" since step {state.guard.last_update}" if state.guard.last_update else ""
    raise UserError(
        f"{names[0]}{others} not finite{since}, so no later step can succeed; lower optim.lr. "
        f"{_way_back(state)}"
    )


def _give_up(state: State, wrong: UserError) -> NoReturn:
    """Raise the error of a run that only skips, and say what to resume from.  If any earlier step
    was whole, save first what it left, unless that is done, beside the older checkpoints, which may
    be better."""
    newest = checkpoint.completed(state.folder / "checkpoints")[-1:]
    saved = newest[0] if newest else None
    is_saved = saved is not None and checkpoint.step_of(saved) >= state.guard.last_update
    if state.guard.skipped < state.step and not is_saved:
        try:
            saved = save(state)
        except UserError as error:
            log.error("%s", error)
    raise UserError(f"{wrong}. {_way_back(state, saved)}")


def _way_back(state: State, saved: Path | None = None) -> str:
    """Which checkpoint to go on from.  saved: that of the weights as they are, if it is there."""
    last = state.guard.last_whole
    was = f"The last good step was {last}" if last else "No step succeeded"
    if best := checkpoint.proven(state.folder / "checkpoints", last):
        return (
            f"{was}; resume from the checkpoint before it: resume={best} (another optim.lr also "
            "needs runtime.allow_config_change=true)"
        )
    if saved:
        return f"{was}; the state is saved: resume={saved}"
    return f"{was}, and there is no checkpoint from before it: start again"


def _report(
    state: State, writer: metrics.Metrics, progress: console.Progress, values: dict[str, float]
) -> None:
    pace = state.clock.lately()
    writer.write(
        state.step,
        {f"train/{key}": value for key, value in values.items()}
        | {
            "train/epoch": state.epochs,
            "train/skipped_steps": state.guard.skipped,
            "train/loss_spikes": state.watch.loss_spikes,
            "perf/seconds_per_step": pace.seconds_per_step,
            "perf/images_per_second": pace.images_per_second,
            "memory/peak_bytes": state.peaks.training,
            "memory/optimizer_state_bytes": optimizers.state_bytes(state.optimizer),
        }
        | {f"perf/{key}": value for key, value in state.optimizer_clock.lately().items()}
        | optimizers.found_rate(state.optimizer),
    )
    steps, asides = state.config.schedule.steps, state.intervals.left(state.step)
    seconds_left = state.clock.left(state.step, steps, asides)
    progress.show(state.step, values["loss"], pace.images_per_second, seconds_left)
    before = state.loss_before
    if (loss := state.watch.found_divergence(before)) is not None:
        log.warning(
            "step %d: the mean train/loss of the last steps is %.4g, and eval/loss was %.4g before "
            "the first: the run diverges; stop it, and lower optim.lr=%g",
            *(state.step, loss, before, state.config.optim.lr),
        )
