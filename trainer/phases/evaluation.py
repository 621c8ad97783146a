"""Monitoring a model during training: losses at fixed points, and pictures of fixed prompts.

Neither is compiled (`runtime.compile`): torch keeps only a few graphs per block, and graphs without
gradients would take the places of those for training steps.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import Image

from trainer.errors import UserError
from trainer.objective import batches, losses
from trainer.phases import intervals
from trainer.phases.state import State
from trainer.reporting import metrics
from trainer.sampling import pictures
from trainer.storage.steps import completed, step_name, step_of
from trainer.system import console, memory, signals

log = logging.getLogger(__name__)

_BETWEEN = 6  # rows of a grid between "before" and the last, at most


@torch.compiler.set_stance("force_eager")
def evaluate(state: State, writer: metrics.Metrics) -> dict[str, float]:
    """Write eval/loss, the mean loss at the fixed eval points, in total and by quarters of the
    timesteps; eval/holdout_loss of held-out pictures; and eval/ema_loss and eval/ema_holdout_loss
    of averaged weights.  Returns them without the prefix.

    If memory runs out, or the run is asked to stop, it returns {} and writes nothing; the run
    continues.
    """
    try:
        with (
            state.clock.aside(intervals.EVALUATING),
            state.model.evaluating(),
            state.evaluated(),
        ):
            values = _all_losses(state)
    except signals.Stopped:
        return {}
    except Exception as error:
        if not memory.ran_out(error):
            raise
        log.warning("no eval/loss at step %d (%s); the run continues", state.step, error)
        return {}
    writer.write(state.step, {f"eval/{key}": value for key, value in values.items()})
    log.info("eval/loss %.4f at step %d", values["loss"], state.step)
    return values


def _all_losses(state: State) -> dict[str, float]:
    """The losses of the model and, with method.ema, of its averaged weights."""
    times = (1 + bool(state.data.dataset.held_out)) * (1 + bool(state.ema))
    total = times * state.config.log.eval_points
    with console.Aside("evaluating", total, "points") as aside:
        values = _losses(state, aside)
        if state.ema:
            with state.averaged():
                averaged = _losses(state, aside)
            values |= {
                f"ema_{key}": averaged[key] for key in ("loss", "holdout_loss") if key in averaged
            }
    return values


def _losses(state: State, aside: console.Aside) -> dict[str, float]:
    """The model's losses at the eval points, of the pictures trained on and of those held out."""
    dataset = state.data.dataset
    values: dict[str, float] = {}

    def counted(rows: list[int]) -> Iterator[batches.Batch]:
        for batch in eval_batches(state, rows):
            yield batch
            aside.advance(len(batch.timesteps))

    for prefix, rows in (("", dataset.own), ("holdout_", dataset.held_out)):
        if rows:
            points = counted(rows)
            losses_of = losses.evaluate(state.model.unet, state.noise_schedule, points)
            values |= {prefix + key: value for key, value in losses_of.items()}
    return values


def eval_batches(state: State, rows: list[int]) -> Iterator[batches.Batch]:
    """The fixed eval points of these rows, made anew each time: encoded captions change while text
    encoders are trained."""
    config, dataset = state.config, state.data.dataset

    def gather(chosen: list[int]) -> batches.Inputs:
        signals.leave_if(state.stop)
        return state.data.plain(chosen)

    return batches.eval_batches(
        rows,
        gather,
        state.noise_schedule,
        config.log.eval_points,
        config.data.batch_size,
        size_of=lambda row: dataset.samples[row].bucket,
    )


@torch.compiler.set_stance("force_eager")
def sample(state: State, writer: metrics.Metrics) -> Path | None:
    """Draw the fixed prompts; write each picture, and a grid of original, before, between and now.

    Returns the grid's path.  Returns None, and the run continues, if no pictures are wanted
    (log.sample_count=0), memory or the disk ran out, a file is gone, or the run is asked to stop.
    """
    if not state.sampler.count:
        return None
    try:
        with state.clock.aside(intervals.DRAWING):
            is_average = state.ema is not None and state.ema.config.sample == "average"
            with state.evaluated(), state.averaged(is_average):
                latents = state.sampler.denoise(is_trained=not state.is_new)
            # Afterwards, since the UNet may have to make room, and not with two sets of weights.
            drawn = state.sampler.decode(latents)
        return _show(state, drawn, writer)
    except signals.Stopped:
        log.info("no pictures at step %d: stopped while drawing", state.step)
        return None
    except Exception as error:
        if not isinstance(error, UserError | OSError) and not memory.ran_out(error):
            raise
        log.warning("no pictures at step %d (%s); the run continues", state.step, error)
        return None


def _between(samples: Path, step: int, captions: list[str]) -> dict[str, list[Image]]:
    """Rows of pictures drawn after the first step and before this one; of many, evenly chosen
    ones."""
    drawn = [path for path in completed(samples) if 0 < step_of(path) < step]
    count = min(len(drawn), _BETWEEN)
    chosen = [drawn[(2 * i + 1) * len(drawn) // (2 * count)] for i in range(count)]
    return {f"step {step_of(p)}": pictures.load(p, captions) for p in chosen}


def _show(state: State, drawn: list[Image], writer: metrics.Metrics) -> Path:
    """Write the pictures drawn at this step, and the grid."""
    sampler, samples = state.sampler, state.folder / "samples"
    captions = sampler.captions()
    pictures.save(samples / step_name(state.step), drawn, captions)
    rows: dict[str, list[Image]] = {}
    try:
        rows["original"] = sampler.originals()
    except (UserError, OSError) as error:  # a file that is read again here
        log.warning("the grid of step %d has no originals: %s", state.step, error)
    if rows.get("original"):
        pictures.save(samples / pictures.ORIGINALS, rows["original"], captions)  # for a sweep
    if state.step:
        rows["before"] = pictures.load(samples / step_name(0), captions)
        if not rows["before"]:
            log.warning(
                "the grid of step %d has no 'before' row: the pictures of step 0 are missing, or "
                "were drawn for other prompts",
                state.step,
            )
        rows |= _between(samples, state.step, captions)
    rows["after" if state.is_last else f"step {state.step}"] = drawn
    grid = pictures.grid({k: row for k, row in rows.items() if row}, captions)
    return writer.write_pictures(state.step, grid, [*zip(captions, drawn, strict=True)])
