"""sweep.png: what each run draws in the end, below each other, for the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer import pictures
from trainer.sweep.runs import Summary, common_overrides, lr_of, name_of, rank

_ROWS = 40


def sheet(runs: Sequence[tuple[Path, Summary]]) -> Image.Image | None:
    """One row a run, the best first, above them what the model drew before; one column a prompt, as
    many as a band has.  Runs that drew other prompts than the best, or nothing, are left out; None
    where none is left.

    runs: folders and summaries.
    """
    common = common_overrides(summary for _, summary in runs)
    captions: list[str] = []
    rows: dict[str, list[Image.Image]] = {}
    for folder, summary in sorted(runs, key=lambda run: rank(run[1])):
        drawn = folder / "samples" / f"step-{summary.get('steps', 0):06d}"
        if "error" in summary or len(rows) > _ROWS:
            continue
        if not captions and (captions := pictures.captions(drawn)[: pictures.COLUMNS]):
            before = pictures.load(folder / "samples" / f"step-{0:06d}", captions)
            rows |= {"before": before} if before else {}
        if captions and (found := pictures.load(drawn, captions)):
            rows[_title(summary, common)] = found
    return pictures.grid(rows, captions) if captions else None


def _title(run: Summary, common: set[str]) -> str:
    """What differs, the rate and the loss, a line each."""
    lines = name_of(run, common).split(" ")
    rate = lr_of(run)
    if rate is not None and not any(line.startswith("optim.lr=") for line in lines):
        lines.append(f"lr {rate:g}")
    return "\n".join([*lines, f"eval {rank(run):.4f}"])
