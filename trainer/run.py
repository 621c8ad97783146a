"""One run: assemble, then one linear loop of named phases.

Of several processes (`trainer.system.processes`) the main one has the run; the others follow its
steps.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from trainer.checks import remarks
from trainer.config import Config, keys_of
from trainer.errors import UserError
from trainer.phases import endings, evaluation, intervals, recovery, saving, stepping
from trainer.phases.assembly import assemble
from trainer.phases.state import State
from trainer.phases.summary import of_failed, summary_of
from trainer.reporting import measure, metrics, report
from trainer.storage import checkpoint, record, resuming, run_folder
from trainer.system import console, memory, processes, retry, signals
from trainer.training import optimizers

log = logging.getLogger(__name__)

_THREADS = torch.get_num_threads()  # as torch chose


def run(
    config: Config, folder: Path, overrides: Sequence[str] = (), apart: Sequence[str] = ()
) -> float:
    """Train as configured, writing everything to `folder`; returns the final loss of the
    exported weights, of held-out pictures where there are some.

    overrides: the command line's, which a resumed run has again.  apart: those that distinguish a
    sweep's run from its others.
    """
    run_folder.refuse_occupied(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    with console.logging_to(folder / "train.log"), signals.stop_signals() as stop:
        for remark in remarks.of_config(config, overrides):
            log.warning("%s", remark)
        state = begin(config, folder, stop, overrides)
        writer = metrics.Metrics(folder, state.config, state.step, apart)
        try:
            train(state, writer)
            return finish(state, writer)
        except Exception as error:
            failure = endings.resumable(state, error) if isinstance(error, OSError) else error
            if not writer.is_closed:
                _conclude_failed(state, writer, failure)
            if failure is not error:
                raise failure from error
            raise


def follow(config: Config, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Make the steps of a run as a process other than its main one.  Writes nothing to `folder`."""
    with signals.stop_signals() as stop:
        state = begin(config, folder, stop, overrides)
        state.losses_before = processes.from_main(None)
        while not (state.is_last or _is_to_stop(state)):
            stepping.take(state)
            if not recovery.goes_on(state):  # which ends the main process as well
                return


def begin(
    config: Config, folder: Path, stop: Sequence[int] = (), overrides: Sequence[str] = ()
) -> State:
    """Prepare the first step, or the next of a resumed run; then record it in the folder.  A run
    that is refused before that has only opened train.log there.

    The checkpoint resumed from, as large as the model, is freed on return.
    """
    retry.reset()
    torch.set_num_threads(config.runtime.threads or _THREADS)
    resumed = resuming.to_resume(config, keys_of(overrides))
    if resumed:  # whose session may have gone on to evaluate, export and draw
        clock, ended = resumed.counters["clock"], report.costs_of(folder, resumed.step)
        clock["wall_seconds"] = max(clock["wall_seconds"], ended.get("wall_seconds", 0.0))
    with (
        memory.explained(config),
        processes.main_first(config.data.cache is not None),
    ):
        state = assemble(config, folder, resumed, stop, overrides)
    if not processes.is_main():
        return state
    if resumed:
        checkpoint.set_aside_newer(state.checkpoints, resumed.step)
        run_folder.carry_before(resuming.find(config.resume or "")[-1], folder)
    record.write(folder, asdict(config), state.device)  # as it was asked for, to be known by
    if resumed and state.step == resumed.config["schedule"]["steps"]:
        saving.keep_old_result(state)
    return state


def train(state: State, writer: metrics.Metrics) -> None:
    """The loop: from `state.step` to the end of the schedule, or until a signal asks to stop."""
    config = state.config
    if state.step == 0:
        before = evaluation.evaluate(state, writer)
        endings.refuse_ruined(state, before.get("loss", 0.0))
        state.losses_before = before
        evaluation.sample(state, writer)
    if state.is_last:
        endings.nothing_to_train(state)
    processes.from_main(state.losses_before)  # by which all judge the run
    for remark in remarks.of_divergence(config, state.losses_are_relative):
        log.warning("%s", remark)
    progress = console.Progress(state.step, config.schedule.steps)

    for step in range(state.step, config.schedule.steps):
        if _is_to_stop(state):
            saving.save(state)
            saving.rotate(state)
            writer.draw_curves()
            endings.stopped(state)

        # Batch, gradients, judgement, update.
        reports = (step + 1) % config.log.every == 0 or step + 1 == config.schedule.steps
        values = stepping.take(state, measures=reports)
        progress.advance()

        # A run that diverges or only skips steps goes back, or ends; good steps prove the
        # checkpoint before them.
        if not recovery.goes_on(state):
            endings.give_up(state)
        saving.rotate_if_proven(state)

        # Report, evaluate, sample, save.
        if reports:
            _report(state, writer, progress, values)
        _between_steps(state, writer)
    progress.close()


def _is_to_stop(state: State) -> bool:
    """Whether a signal asks to stop; all processes answer alike, whichever has received it."""
    number = int(processes.largest(state.stop[0] if state.stop else 0))
    if number and not state.stop:
        state.stop = [number]
    return bool(number)


def _between_steps(state: State, writer: metrics.Metrics) -> None:
    """Evaluate, sample, save and export: whatever is due after this step."""
    is_due = partial(state.intervals.is_due, step=state.step)
    if is_due(intervals.EVALUATING):
        with saving.kept_if_unreadable(state):
            evaluation.evaluate(state, writer)
    if is_due(intervals.DRAWING):
        evaluation.sample(state, writer)
    if is_due(intervals.EVALUATING) or is_due(intervals.SAVING):
        writer.draw_curves()
    with saving.tolerated():
        if is_due(intervals.SAVING) or (state.owes_checkpoint and not state.is_last):
            saving.save_or_owe(state)
    with saving.tolerated():
        if is_due(intervals.EXPORTING):
            saving.export(state)


def finish(state: State, writer: metrics.Metrics) -> float:
    """Save, evaluate, export and draw; then log where everything is and what it cost.

    Neither a checkpoint that cannot be saved nor a loss that is not finite prevents the export, and
    an export that fails does not prevent the summary; the first UserError is raised at the end.
    """
    failure, exported = None, list[Path]()
    try:
        saving.save(state)
    except UserError as error:
        failure = endings.resumable(state, error)
        log.error("%s", failure)
    after = evaluation.evaluate(state, writer)
    saving.rotate(state, is_good=math.isfinite(after.get("loss", math.nan)))
    if state.stop and failure:
        raise failure
    if state.stop:
        endings.stopped(state)
    if not math.isfinite(after.get("loss", 0.0)):
        failure = endings.unusable(state, after["loss"])
    try:
        exported = saving.export(state)
    except UserError as error:
        failure = failure or endings.resumable(state, error)
        log.error("%s", error)
    picture = evaluation.sample(state, writer)
    state.peaks.end("rest")
    summary = summary_of(state, after)
    if not state.clock.has_stepped:
        summary.update(report.costs_of(state.folder, state.step))
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
        "checkpoints": state.checkpoints,
    }
    log.info("\n%s", report.closing_lines(summary, {k: v for k, v in places.items() if v}))
    if failure:
        raise failure
    if state.stop:
        endings.stopped_at_the_end(state)
    return measure.objective(summary)


def _conclude_failed(state: State, writer: metrics.Metrics, error: Exception) -> None:
    """Leave what is known of a run that failed.  Nothing that goes wrong here hides the error."""
    try:
        known = report.of_failure(state.folder, of_failed(state), error)
        report.write_summary(state.folder, known)
        writer.close(known)
    except Exception as second:  # of a GPU that answers nothing more, of a full disk: any kind
        log.warning("could not write the summary of this run: %s", second)


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
            "train/rollbacks": state.guard.rollbacks,
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
