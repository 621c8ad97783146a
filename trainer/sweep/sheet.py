"""sweep.png: the final samples of each run, one row per run, for the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer.reporting.measure import EVAL, HOLDOUT
from trainer.sampling import pictures
from trainer.storage.steps import step_name
from trainer.sweep.runs import Comparison, RunSummary, lr_of

_ROWS = 40
_WORDS = {EVAL: "eval", HOLDOUT: "held out"}


def sheet(runs: Sequence[RunSummary]) -> Image.Image | None:
    """One row per run, best first, below the original pictures (of captions from the data) and the
    samples before training; one column per prompt, up to `pictures.COLUMNS`.  More than 40 runs get
    one row per group, more groups only the best 40.  Runs that drew other prompts than the best, or
    nothing, are left out; None if none is left.
    """
    comparison = Comparison(runs)
    captions: list[str] = []
    rows: dict[str, list[Image.Image]] = {}
    for run in _shown(comparison):
        samples = Path(run["folder"]) / "samples"
        drawn = samples / step_name(run.get("steps", 0))
        if not captions and (captions := pictures.captions(drawn)[: pictures.COLUMNS]):
            for title, name in (("original", pictures.ORIGINALS), ("before", step_name(0))):
                found = pictures.load(samples / name, captions)
                rows |= {title: found} if found else {}
        if captions and (found := pictures.load(drawn, captions)):
            rows[_title(run, comparison)] = found
    return pictures.grid(rows, captions) if captions else None


def _shown(comparison: Comparison) -> list[RunSummary]:
    """The runs that get a row: if there are too many, the best of each group."""
    ended = [run for run in comparison.runs if "error" not in run]
    if len(ended) > _ROWS:
        ended = [group.good[0] for group in comparison.groups if group.good]
    return ended[:_ROWS]


def _title(run: RunSummary, comparison: Comparison) -> str:
    """The words of its name, the rate and the loss, one per line."""
    lines = comparison.name_of(run).split(" ")
    rate = lr_of(run)
    if rate is not None and not any(line.startswith("optim.lr=") for line in lines):
        lines.append(f"lr {rate:g}")
    return "\n".join([*lines, f"{_WORDS[comparison.measure]} {comparison.loss(run):.4f}"])
