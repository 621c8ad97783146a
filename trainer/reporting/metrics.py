"""A run's metrics and pictures: always as files in its folder, and in trackers if configured."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config import Config
from trainer.reporting import curves, trackers
from trainer.reporting.summary import Summary
from trainer.storage.steps import step_name
from trainer.system import disk

log = logging.getLogger(__name__)


class Metrics:
    """Writes `metrics.jsonl`, `curves.png` and `samples/*.png`, then to the run's trackers."""

    def __init__(
        self, folder: Path, config: Config, start_step: int, apart: Sequence[str] = ()
    ) -> None:
        """Open the files, without rows that will be written again: those after `start_step`, a
        finished run's last evaluation, and all rows if a run starts from the beginning.

        apart: the overrides that distinguish a sweep's run from its others.
        """
        self.folder, self.is_closed = folder, False
        self.path, self.curves = folder / "metrics.jsonl", folder / "curves.png"
        kept = [row for row in read(self.path) if start_step > 0 and row["step"] <= start_step]
        if start_step == config.schedule.steps:
            kept = [row for row in kept if row["step"] < start_step or "eval/loss" not in row]
        disk.replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._trackers = trackers.Trackers(folder, config, start_step, apart)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": step, **values}.  Keys look like `train/loss`; NaN becomes null."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **as_json(values)}) + "\n")
        except OSError as error:  # a full disk must not end the training
            log.warning("could not write the metrics of step %d: %s", step, error)
        self._trackers.tell(lambda tracker: tracker.write(step, values))

    def write_pictures(self, step: int, grid: Image.Image, drawn: trackers.Drawn) -> Path:
        """Save a grid of the pictures drawn at this step as `samples/step-NNNNNN.png`; returns its
        path."""
        path = self.folder / "samples" / f"{step_name(step)}.png"
        path.parent.mkdir(exist_ok=True)
        disk.replace_picture(path, grid)
        self._trackers.tell(lambda tracker: tracker.write_pictures(step, grid, drawn))
        return path

    def draw_curves(self) -> None:
        """Draw what has been written so far: `curves.png`, once there are two points."""
        try:
            picture = curves.draw(read(self.path))
            if picture:
                disk.replace_picture(self.curves, picture)
        except OSError as error:  # a full disk must not end the training
            log.warning("could not draw curves.png: %s", error)

    def close(self, summary: Summary) -> None:
        """Draw the curves; give trackers the run's summary, and finish them."""
        self.is_closed = True
        self.draw_curves()
        self._trackers.tell(lambda tracker: tracker.close(summary))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that a crash or a full disk cut short are left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with null for NaN and infinity, which it lacks."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
