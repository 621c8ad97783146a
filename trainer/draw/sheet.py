"""What is drawn, on the disk: the grid, and a folder of single pictures for each row."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from trainer.sampling import pictures
from trainer.system import disk

_TILE = 512  # pixels: the largest side of a picture in the grid
_NAME = 120  # bytes of a title in a folder's name, which most systems limit to 255


class Sheet:
    """A grid that is written anew with each row: whenever it ends, what is drawn is there."""

    def __init__(
        self,
        out: Path,
        folder: Path,
        titles: Sequence[str],
        captions: list[str],
        originals: list[Image.Image],
    ) -> None:
        """titles: of all rows, from the top down.  originals: the captions' own pictures, which are
        shown above; none if they are prompts."""
        self._out, self._folder, self._titles, self._captions = out, folder, titles, captions
        self._above = {"original": originals} if originals else {}
        self._rows: dict[str, list[Image.Image | None]] = {}

    def __str__(self) -> str:
        """What there is, for a message."""
        if not self._rows:
            return "nothing was drawn"
        return f"{self._out}, and the single pictures in {self._folder}"

    def add(self, title: str, drawn: Mapping[int, Image.Image]) -> None:
        """Write a row's single pictures, and the grid.  drawn: by the caption's place; the places
        of others stay blank."""
        row = [drawn.get(place) for place in range(len(self._captions))]
        pictures.save(self._folder / self._folder_name(title), row, self._captions)
        self._rows[title] = row
        rows = {title: self._rows[title] for title in self._titles if title in self._rows}
        grid = pictures.grid({**self._above, **rows}, self._captions, _TILE)
        disk.replace_picture(self._out, grid)

    def _folder_name(self, title: str) -> str:
        """02-emoji-step-40: with the row's number, as names may differ in other signs only."""
        words = re.sub(r"[^\w.]+", "-", title).strip("-")
        short = words.encode()[:_NAME].decode(errors="ignore")
        return f"{self._titles.index(title) + 1:02d}-{short}"
