"""The prompts to draw: those that are given, or else those of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.buckets import Size
from trainer.draw.request import Request
from trainer.draw.sources import Source, first_run
from trainer.errors import UserError
from trainer.models.model import Model
from trainer.sampling import pictures, prompts
from trainer.sampling.prompts import Prompt, Usual
from trainer.storage.steps import completed

# As in the presets of large models.
_GUIDANCE, _STEPS = 5.0, 25


def prompts_of(request: Request, sources: Sequence[Source], model: Model) -> list[Prompt]:
    """The given prompts, or else what the first of the runs drew.  Raises UserError if there are
    none, one is wrong, or no guidance uses the negative prompt.

    model: the first that draws, whose resolution counts if there is no run.
    """
    every = _prompts_of(request, sources, model)
    if request.negative and not any(prompt.is_guided for prompt in every):
        raise UserError("--negative only has an effect with guidance: --guidance=5")
    return every


def _prompts_of(request: Request, sources: Sequence[Source], model: Model) -> list[Prompt]:
    run = first_run(sources)
    config = run.config if run else {}
    usual = _usual(request, config.get("log", {}))
    lines = [*request.lines]
    if request.prompts_file:
        lines += prompts.read(request.prompts_file, "--prompts-file")
    if lines := lines or config.get("log", {}).get("prompts", []):
        return prompts.of_lines(lines, usual, _side(request, config.get("data", {}), model))
    drawn = _drawn(run.run) if run and run.run else []
    if not drawn:
        raise UserError(
            'nothing says what to draw, as no run here drew pictures; say it: --prompt "a cat"'
        )
    side = request.resolution
    return [
        prompts.of_caption(caption, place, usual, (side, side) if side else size)
        for place, (caption, size) in enumerate(drawn)
    ]


def originals(sources: Sequence[Source], wanted: Sequence[Prompt]) -> list[Image.Image]:
    """The pictures that the prompts are captions of; none if they are not what a run drew."""
    run = first_run(sources)
    if not run or not run.run:
        return []
    folder = run.run / "samples" / pictures.ORIGINALS
    return pictures.load(folder, [prompt.line for prompt in wanted])


def batch_size(sources: Sequence[Source]) -> int:
    """That of the first run, or 1."""
    run = first_run(sources)
    return int(run.config.get("data", {}).get("batch_size") or 1) if run else 1


def _usual(request: Request, log: dict[str, Any]) -> Usual:
    """What prompts have.  log: the options of a run."""
    negative, guidance, steps = request.negative, request.guidance, request.steps
    return Usual(
        negative=log.get("negative_prompt", "") if negative is None else negative,
        guidance_scale=log.get("guidance_scale", _GUIDANCE) if guidance is None else guidance,
        steps=log.get("sample_steps", _STEPS) if steps is None else steps,
        seed=request.seed,
        guidance_option="--guidance=5",
    )


def _side(request: Request, data: dict[str, Any], model: Model) -> int:
    """The side of a picture in pixels.  data: the options of a run."""
    trained = max(data.get("resolutions") or [data.get("resolution") or 0])
    side = request.resolution or trained or model.resolution
    if not side:
        raise UserError(f"{model.origin} does not say its resolution; give it: --resolution=1024")
    return side


def _drawn(run: Path) -> list[tuple[str, Size]]:
    """The captions of the pictures that a run drew last, and their sizes (height, width)."""
    folders = completed(run / "samples")
    if not folders:
        return []
    found = []
    for place, caption in enumerate(pictures.captions(folders[-1])):
        with Image.open(folders[-1] / f"{place:02d}.png") as picture:
            found.append((caption, (picture.height, picture.width)))
    return found
