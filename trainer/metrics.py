"""Numbers and pictures of a run: files in its folder always, Weights & Biases where asked for."""

import json
import logging
import math
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from trainer import disk
from trainer.config import Config, file_name
from trainer.run_folder import sweep_of

log = logging.getLogger(__name__)

_TAG = 64  # characters that W&B takes


class Metrics:
    """Writes `metrics.jsonl` and `samples/*.png`, then to W&B, which may fail."""

    def __init__(self, folder: Path, config: Config, start_step: int) -> None:
        """Open the files, without rows of steps after `start_step`, which a resumed run will write
        again, without a finished run's last evaluation, and without any where a run starts anew."""
        self.folder, self.is_closed = folder, False
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read(self.path) if start_step > 0 and row["step"] <= start_step]
        if start_step == config.schedule.steps:
            kept = [row for row in kept if row["step"] < start_step or "eval/loss" not in row]
        disk.replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb = _Wandb(folder, config) if config.log.wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: {"step": step, **values}.  Keys look like `train/loss`; NaN becomes null."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **as_json(values)}) + "\n")
        except OSError as error:  # a full disk must not end the training
            log.warning("metrics of step %d are lost: %s", step, error)
        if self._wandb:
            self._wandb.write(step, values)

    def write_picture(self, step: int, picture: Image.Image) -> Path:
        """Save `samples/step-NNNNNN.png`; returns its path."""
        path = self.folder / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        if self._wandb:
            self._wandb.write_picture(step, picture)
        return path

    def close(self, summary: dict[str, Any]) -> None:
        """Give W&B the run's summary and let it finish; one with an `error` has failed there
        too."""
        self.is_closed = True
        if self._wandb:
            self._wandb.close(summary)


class _Wandb:
    """A W&B run that goes silent, after one warning, when W&B is absent or fails.

    Logging never stops a training run, whatever W&B raises.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._failed = False
        self._run: Any = None
        self._try(lambda: self._start(folder, config))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._try(lambda: self._run.log(values, step=step))

    def write_picture(self, step: int, picture: Image.Image) -> None:
        self._try(lambda: self._run.log({"samples": _image(picture)}, step=step))

    def close(self, summary: dict[str, Any]) -> None:
        self._try(lambda: self._run.summary.update(summary))
        self._try(lambda: self._run.finish(exit_code=int("error" in summary)))

    def _start(self, folder: Path, config: Config) -> None:
        import wandb  # seconds to import, and not needed by most runs

        options = config.log.wandb
        assert options is not None
        mode: Any = options.mode  # one of the words that W&B knows, by the schema
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=mode,
            name=_wandb_name(folder, config),
            group=sweep.name if (sweep := sweep_of(folder)) else None,
            tags=[config.optim.name, config.method.name, Path(config.model.path).name[:_TAG]],
            id=_wandb_id(folder),
            resume="allow",
            dir=folder,
            config=asdict(config),
            reinit="finish_previous",
            settings=wandb.Settings(init_timeout=30, console="off"),
        )

    def _try(self, action: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            reason = f"{type(error).__name__}: {error}"
            log.warning("W&B is off for the rest of this run (%s); metrics.jsonl goes on", reason)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that a crash or a full disk cut short are left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """JSON with null for NaN and infinity, which it lacks."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _wandb_id(folder: Path) -> str:
    """A random id, kept in the run's folder so that a resumed run goes on under it."""
    path = folder / "wandb_id"
    if not path.exists():
        disk.replace_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")


def _wandb_name(folder: Path, config: Config) -> str:
    """The configuration's name, with what distinguishes the runs of a sweep, or of a day."""
    own = file_name(config.name)
    return folder.name if own in folder.name else f"{config.name} {folder.name}"


def _image(picture: Image.Image) -> Any:
    import wandb

    return wandb.Image(picture)
