"""sweep.md and its pictures, made from the summaries and folders of runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from trainer.sweep import curves, markdown, sheet
from trainer.sweep.runs import RunSummary
from trainer.sweep.table import sweep_table, verdict_of
from trainer.system import disk
from trainer.wording import plural

TABLE = "sweep.md"
PICTURES = {"curves.png": curves.draw, "sweep.png": sheet.sheet}
FILES = (TABLE, *PICTURES)
_NAMED = 8  # missing runs that are named; the rest is counted


def write(folder: Path, runs: Sequence[RunSummary], missing: Sequence[str]) -> None:
    """Write the table and the pictures of these runs (at least one) to a folder.  missing: runs of
    the sweep that have not ended."""
    pictures = [name for name, draw in PICTURES.items() if _wrote(folder / name, draw, runs)]
    parts = [text(folder, runs, missing), *(f"![]({name})" for name in pictures)]
    disk.replace_text(folder / TABLE, "\n\n".join(parts) + "\n")


def text(folder: Path, runs: Sequence[RunSummary], missing: Sequence[str]) -> str:
    """sweep.md without its pictures."""
    parts = [head(folder.resolve().name, runs, missing), verdict_of(runs), sweep_table(runs)]
    return "\n\n".join(filter(None, parts))


def printed(runs: Sequence[RunSummary], missing: Sequence[str]) -> str:
    """What a terminal shows of it: the tables, then the verdict, so that it is in view."""
    return "\n\n".join(filter(None, [sweep_table(runs), verdict_of(runs), not_ended(missing)]))


def head(name: str, runs: Sequence[RunSummary], missing: Sequence[str] = ()) -> str:
    """A title, what was run, on what and when, the options that all runs share, and the runs that
    have not ended: so that the tables can be understood on their own."""
    failed = sum("error" in run for run in runs)
    facts = [
        plural(len(runs), "run") + (f", {failed} of them failed" if failed else ""),
        _distinct([run for run in runs if "error" not in run] or runs, "steps", "{} steps"),
        _distinct(runs, "model", "model {}"),
        _distinct(runs, "method", "method {}"),
        _distinct(runs, "device", "on {}"),
        _dates(runs),
    ]
    shared = set.intersection(*(set(run["overrides"]) for run in runs))
    common = [o for o in runs[0]["overrides"] if o in shared]
    options = f"Shared options: `{' '.join(common)}`" if common else ""
    parts = [f"# {name}", "; ".join(filter(None, facts)) + ".", options, not_ended(missing)]
    return "\n\n".join(filter(None, parts))


def not_ended(missing: Sequence[str]) -> str:
    """Which runs of a sweep have not ended; "" if all have."""
    if not missing:
        return ""
    named = markdown.first([f"`{run}`" for run in missing], _NAMED)
    return (
        f"Not ended, {len(missing)} of the planned runs: {named}.  The command of the sweep, "
        "repeated with its hydra.sweep.dir=, runs them."
    )


def _distinct(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """The distinct values of a key."""
    values = sorted({run[key] for run in runs if run.get(key) is not None})
    return form.format(", ".join(map(str, values))) if values else ""


def _dates(runs: Sequence[RunSummary]) -> str:
    """When the first and the last run ended."""
    ended = sorted(run["ended"] for run in runs if "ended" in run)
    if not ended:
        return ""
    first, last = (time[:16].replace("T", " ") for time in (ended[0], ended[-1]))
    return f"ended {first}" if first == last else f"ended from {first} to {last}"


def _wrote(
    path: Path, draw: Callable[[Sequence[RunSummary]], Image | None], runs: Sequence[RunSummary]
) -> bool:
    """Draw and save a picture; -> whether it exists now.  A failure does not stop the sweep."""
    try:
        if picture := draw(runs):
            picture.save(path)
        return picture is not None
    except OSError as error:
        print(f"could not write {path} ({error})")
        return False
