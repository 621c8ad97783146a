"""sweep.md and its pictures, made from the folders of runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL.Image import Image

from trainer.sweep import curves, sheet
from trainer.sweep.folders import Found
from trainer.sweep.head import head
from trainer.sweep.table import sweep_table, verdict_of
from trainer.system import disk

TABLE = "sweep.md"
PICTURES = {"curves.png": curves.draw, "sweep.png": sheet.sheet}
FILES = (TABLE, *PICTURES)


def write(folder: Path, found: Found, missing: Sequence[str]) -> None:
    """Write the table and the pictures of these runs (at least one) to a folder.  missing: runs of
    the sweep that have not ended."""
    pictures = [name for name, draw in PICTURES.items() if _wrote(folder / name, draw, found)]
    parts = [text(folder, found, missing), *(f"![]({name})" for name in pictures)]
    disk.replace_text(folder / TABLE, "\n\n".join(parts) + "\n")


def text(folder: Path, found: Found, missing: Sequence[str]) -> str:
    """sweep.md without its pictures."""
    runs = [summary for _, summary in found]
    parts = [head(folder.resolve().name, runs, missing), verdict_of(runs), sweep_table(runs)]
    return "\n\n".join(filter(None, parts))


def _wrote(path: Path, draw: Callable[[Found], Image | None], found: Found) -> bool:
    """Draw and save a picture; -> whether it exists now.  A failure does not stop the sweep."""
    try:
        if picture := draw(found):
            picture.save(path)
        return picture is not None
    except OSError as error:
        print(f"could not write {path} ({error})")
        return False
