"""sweep.png: what each run draws in the end, below each other, for the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer import pictures
from trainer.measure import EVAL, HOLDOUT
from trainer.sweep.runs import Comparison, Summary, lr_of

_ROWS = 40
_WORDS = {EVAL: "eval", HOLDOUT: "held out"}


def sheet(runs: Sequence[tuple[Path, Summary]]) -> Image.Image | None:
    """One row a run, the best first, above them the pictures that captions of the data belong to
    and what the model drew before; one column a prompt, as many as a band has.  Of more than 40
    runs one of each group has a row, of more groups the best 40.  Runs that drew other prompts than
    the best, or nothing, are left out; None where none is left.

    runs: folders and summaries.
    """
    folders = {id(summary): folder for folder, summary in runs}
    comparison = Comparison([summary for _, summary in runs])
    captions: list[str] = []
    rows: dict[str, list[Image.Image]] = {}
    for summary in _shown(comparison):
        folder = folders[id(summary)]
        drawn = folder / "samples" / f"step-{summary.get('steps', 0):06d}"
        if not captions and (captions := pictures.captions(drawn)[: pictures.COLUMNS]):
            for title, name in (("original", pictures.ORIGINALS), ("before", f"step-{0:06d}")):
                found = pictures.load(folder / "samples" / name, captions)
                rows |= {title: found} if found else {}
        if captions and (found := pictures.load(drawn, captions)):
            rows[_title(summary, comparison)] = found
    return pictures.grid(rows, captions) if captions else None


def _shown(comparison: Comparison) -> list[Summary]:
    """The runs that have a row: of many seeds the best one of each group."""
    ended = [run for run in comparison.runs if "error" not in run]
    if len(ended) > _ROWS:
        ended = [group.good[0] for group in comparison.groups if group.good]
    return ended[:_ROWS]


def _title(run: Summary, comparison: Comparison) -> str:
    """What differs, the rate and the loss, a line each."""
    lines = comparison.name_of(run).split(" ")
    rate = lr_of(run)
    if rate is not None and not any(line.startswith("optim.lr=") for line in lines):
        lines.append(f"lr {rate:g}")
    return "\n".join([*lines, f"{_WORDS[comparison.measure]} {comparison.loss(run):.4f}"])
