"""How a run ends early, and which checkpoint its message says to resume from."""

import logging
import math
from pathlib import Path
from typing import NoReturn

import torch

from trainer.errors import UserError
from trainer.phases.saving import save
from trainer.phases.state import State
from trainer.storage import checkpoint, resuming
from trainer.storage.steps import completed, step_of
from trainer.system import processes, signals
from trainer.training import method
from trainer.training.guard import broken
from trainer.wording import plural

log = logging.getLogger(__name__)


def refuse_ruined(state: State, loss: float) -> None:
    """Raise UserError if the loss of the untrained model is not finite, which no step would
    change."""
    if math.isfinite(loss):
        return
    names = broken(dict(torch.nn.ModuleDict(state.model.trained_parts).named_parameters()))
    why = f"its {names[0]} is not finite" if names else "it overflows"
    raise UserError(
        f"model.path={state.model.origin}: eval/loss is {loss} before the first step, because "
        f"{why}; use another copy of the model, or model.dtype=float32"
    )


def nothing_to_train(state: State) -> None:
    """Say that a resumed run is already at its last step."""
    log.info(
        "already at step %d of %d: nothing to train; evaluating, exporting and drawing again",
        state.step,
        state.config.schedule.steps,
    )


def stopped(state: State) -> NoReturn:
    """End the process of a run that was saved, with the exit status of the signal."""
    resume = resuming.as_argument(state.folder)
    log.info("stopped; resume with: %s %s", processes.command(), resume)
    signals.end(state.stop[0])


def stopped_at_the_end(state: State) -> NoReturn:
    """End the process of a run that was asked to stop when nothing was left but its results."""
    log.info("this run was complete; stopping as asked")
    signals.end(state.stop[0])


def unusable(state: State, loss: float) -> UserError:
    """The error of a run whose loss after the last step is not finite."""
    return UserError(
        f"the trained model's loss is {loss}, so it is unusable. Lower optim.lr, or look at "
        "train/loss in metrics.jsonl for the step where it went wrong. "
        f"{way_back(state)}"
    )


def resumable(state: State, error: Exception) -> UserError:
    """The error of a run that could not write a file, with the newest checkpoint, if it has any."""
    every, way = completed(state.checkpoints), ""
    if every and not _broken_weights(state):  # which the same steps would break again
        way = f"; resume from the run's newest checkpoint: {resuming.as_argument(every[-1])}"
    return UserError(f"{error}{way}")


def is_hopeless(state: State) -> bool:
    """Whether too many steps in a row were skipped, or trained weights are not finite, since then
    every later step is skipped too."""
    if not state.guard.in_a_row:
        return False
    return bool(broken(method.trained_parameters(state.model))) or state.guard.is_exhausted


def give_up(state: State) -> NoReturn:
    """Raise the error of a hopeless run, or of one that diverges, and say what to resume from.
    Finite weights of a hopeless run are saved first, unless they already are or no step succeeded;
    older checkpoints, which may be better, are kept."""
    guard, after = state.guard, _after_rollbacks(state)
    if state.watch.diverged and not is_hopeless(state):
        raise UserError(
            f"step {state.step}: {diverges(state)}; lower optim.lr={state.config.optim.lr:g}. "
            f"{way_back(state)}"
        )
    if weights := _broken_weights(state):
        raise UserError(
            f"{weights}{after}, so no later step can succeed; lower optim.lr. {way_back(state)}"
        )
    newest = completed(state.checkpoints)[-1:]
    saved = newest[0] if newest else None
    is_saved = saved is not None and step_of(saved) >= guard.last_update
    if guard.skipped < state.step and not is_saved:
        try:
            saved = save(state)
        except UserError as error:
            log.error("%s", error)
    raise UserError(
        f"{_only_skips(state)}{after}; lower optim.lr, or check the model's VAE and the data "
        f"(runtime.max_skipped_steps allows more). {way_back(state, saved)}"
    )


def why_hopeless(state: State) -> str:
    """What makes every later step fail: weights, or else steps, that are not finite."""
    return _broken_weights(state) or _only_skips(state)


def _broken_weights(state: State) -> str | None:
    """Which trained weights are not finite, and since when; None if all are."""
    names = broken(method.trained_parameters(state.model))
    if not names:
        return None
    others = f" and {plural(len(names) - 1, 'other')} are" if len(names) > 1 else " is"
    last = state.guard.last_update
    return f"{names[0]}{others} not finite{f' since step {last}' if last else ''}"


def _only_skips(state: State) -> str:
    """How many of its last steps were skipped, and why."""
    count = state.guard.in_a_row
    return f"{count} step{'s in a row' * (count > 1)} without a finite loss and gradient"


def diverges(state: State) -> str:
    """What shows that the run diverges, and how often it went back before."""
    after = _after_rollbacks(state)
    return f"{state.watch.divergence()}: the run diverges{' again' * bool(after)}{after}"


def _after_rollbacks(state: State) -> str:
    count = state.guard.rollbacks
    return f", after {plural(count, 'rollback')}" if count else ""


def way_back(state: State, saved: Path | None = None) -> str:
    """Which checkpoint to resume from.  saved: the checkpoint of the current weights, if any."""
    last = state.guard.last_whole
    was = f"The last good step was {last}" if last else "No step succeeded"
    if (onset := state.watch.onset) is not None:
        well = f"It went well up to about step {onset - 1}"
        was, last = well if onset > 1 else "It never went well", min(last, onset)
    if best := checkpoint.newest(state.checkpoints, last - 1):
        return (
            f"{was}; resume from the checkpoint before it: resume={best} (another optim.lr also "
            "needs runtime.allow_config_change=true)"
        )
    if saved:
        return f"{was}; the state is saved: resume={saved}"
    return f"{was}, and there is no checkpoint from before it: start again"
