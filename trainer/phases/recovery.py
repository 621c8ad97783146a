"""What happens to a run that diverges, or whose steps are not finite: `runtime.on_divergence`.

A rollback restores weights, optimizer and averages from a checkpoint from before the trouble, but
not the number of steps: the batches since then, of which one may be the cause, are not trained
again, and the run is as long as planned.  The learning rate is half of what it was.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.phases import assembly, endings
from trainer.phases.state import State
from trainer.storage import checkpoint
from trainer.storage.steps import completed, delete, step_of
from trainer.system import memory, processes

log = logging.getLogger(__name__)


def goes_on(state: State) -> bool:
    """Whether the run can go on after this step; it may go back to a checkpoint for that.  All
    processes find the same."""
    policy, step = state.config.runtime.on_divergence, state.step
    if endings.is_hopeless(state):
        last, why = state.guard.last_whole - 1, endings.why_hopeless(state)
        return policy == "rollback" and _went_back(state, last, why)
    found = state.watch.divergence() if state.losses_are_relative else None
    if not found or (policy == "warn" and state.watch.diverged):  # which has been said
        return True
    state.watch.onset = step - found.steps + 1
    if policy == "warn":
        log.warning(
            "step %d: %s; stop it, and lower optim.lr=%g (runtime.on_divergence=rollback goes back "
            "to a checkpoint by itself)",
            *(step, endings.diverges(state), state.config.optim.lr),
        )
        return True
    return policy == "rollback" and _went_back(
        state, step - found.steps, f"{found}: the run diverges"
    )


def _went_back(state: State, last: int, why: str) -> bool:
    """Go back to the newest checkpoint of at most step `last` before which the run went well, if
    there is one and it may.  why: what is logged."""
    allowed = state.config.runtime.max_rollbacks
    if state.guard.rollbacks >= allowed:
        return False
    folder = processes.from_main(_place_to_go_back_to(state, last) if processes.is_main() else None)
    if folder is None:
        return False
    with memory.explained(state.config, state.step):
        counters = _restore(state, folder)
    processes.meet()  # all have read it, so that the main one may delete it
    state.watch.go_back()
    state.backward.clip.load_state_dict(counters["clip"])
    state.guard.go_back(state.step)
    log.warning(
        "step %d: %s; weights and optimizer are those of %s again, and the next batches are "
        "trained at %g times the schedule's learning rate (rollback %d of %d)",
        *(state.step, why, folder.name, state.guard.lr_scale, state.guard.rollbacks, allowed),
    )
    if processes.is_main():
        delete(later for later in completed(state.checkpoints) if step_of(later) > step_of(folder))
    state.owes_checkpoint = True  # after whatever else is due, which resuming would not repeat
    return True


def _place_to_go_back_to(state: State, last: int) -> Path | None:
    """The newest checkpoint that `_went_back` may use; it was read to its end."""
    for folder in reversed(completed(state.checkpoints)):
        if step_of(folder) > last:
            continue
        try:
            then = checkpoint.verified(folder)["counters"]["watch"]
        except UserError as error:
            log.warning("%s; trying the previous one", error)
            continue
        if "relative" in then and state.watch.was_well(then["relative"]):  # old versions: not
            return folder
    return None


def _restore(state: State, folder: Path) -> Mapping[str, Any]:
    """Give weights, optimizer and averages their values in a checkpoint; returns its counters."""
    saved = checkpoint.load(folder)
    average = saved.average
    assembly.put_back(state.model, state.optimizer, saved)
    if state.ema:
        state.ema.put_back(average, state.step)
    return saved.counters
