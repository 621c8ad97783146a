"""Trackers that show a run's metrics and pictures, besides the files in its folder: Weights &
Biases, TensorBoard.

A tracker has `start`, `write`, `write_pictures` and `close`, and may raise anything:
`Trackers` makes sure that none ever stops a run.
"""

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL.Image import Image

from trainer.config import Config, WandbConfig, file_name, key_of
from trainer.reporting.summary import Summary
from trainer.storage.run_folder import sweep_of
from trainer.system import disk

log = logging.getLogger(__name__)

_TAG, _GROUP = 64, 128  # characters, at most, in a tag and in a group of W&B


Drawn = Sequence[tuple[str, Image]]  # captions and pictures


class Tracker(Protocol):
    title: str

    def start(
        self, folder: Path, config: Config, start_step: int, apart: Sequence[str]
    ) -> None: ...

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def write_pictures(self, step: int, grid: Image, drawn: Drawn) -> None: ...

    def close(self, summary: Summary) -> None: ...


class WandbTracker:
    title = "W&B"

    def start(self, folder: Path, config: Config, start_step: int, apart: Sequence[str]) -> None:
        """In a sweep the runs of one case, which differ only by the seed, form a group, over which
        W&B averages; `sweep` and `case` are also keys of the configuration."""
        assert config.log.wandb is not None
        tags = [config.optim.name, config.method.name, Path(config.model.path).name]
        known, name, group = asdict(config), _wandb_name(folder, config), None
        if sweep := sweep_of(folder):
            case = " ".join(override for override in apart if key_of(override) != "seed")
            name = " ".join(apart) or name
            group = f"{sweep.name} {case}".strip()[:_GROUP]
            known |= {"sweep": sweep.name, "case": case}
            tags.append(sweep.name)
        self._run = wandb_run(
            folder,
            config.log.wandb,
            name=name,
            group=group,
            tags=[tag[:_TAG] for tag in tags],
            config=known,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def write_pictures(self, step: int, grid: Image, drawn: Drawn) -> None:
        import wandb

        each = {  # not a list of them: W&B wants one size in a list
            f"sample/{number:02d}": wandb.Image(picture, caption=caption)
            for number, (caption, picture) in enumerate(drawn)
        }
        self._run.log({"samples": wandb.Image(grid)} | each, step=step)

    def close(self, summary: Summary) -> None:
        """Marks the run as failed if its summary has an `error`."""
        try:
            self._run.summary.update(summary)
        finally:
            self._run.finish(exit_code=int("error" in summary))


class TensorBoardTracker:
    title = "TensorBoard"

    def start(self, folder: Path, config: Config, start_step: int, apart: Sequence[str]) -> None:
        """Open an event file; steps after `start_step` in earlier ones will not be shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)
        text = yaml.safe_dump(asdict(config), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```", start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def write_pictures(self, step: int, grid: Image, drawn: Drawn) -> None:
        self._writer.add_image("samples", np.asarray(grid.convert("RGB")), step, None, "HWC")
        self._writer.flush()

    def close(self, summary: Summary) -> None:
        rows = "".join(f"| {key} | {value} |\n" for key, value in summary.items())
        self._writer.add_text("summary", f"| | |\n|---|---|\n{rows}", summary.get("steps"))
        self._writer.close()


class Trackers:
    """A run's trackers.  One that fails is not used any more; that is logged once."""

    def __init__(self, folder: Path, config: Config, start_step: int, apart: Sequence[str]) -> None:
        """Start the configured ones.  apart: as for `Metrics`."""
        self._working = list[Tracker]()
        if config.log.wandb:
            self._working.append(WandbTracker())
        if config.log.tensorboard:
            self._working.append(TensorBoardTracker())
        self.tell(lambda tracker: tracker.start(folder, config, start_step, apart))

    def tell(self, action: Callable[[Tracker], None]) -> None:
        for tracker in [*self._working]:
            try:
                action(tracker)
            except Exception as error:
                self._working.remove(tracker)
                log.warning(
                    "%s is off for the rest of this run (%s: %s); metrics.jsonl continues",
                    tracker.title,
                    type(error).__name__,
                    error,
                )


def wandb_run(folder: Path, options: WandbConfig, **more: Any) -> Any:
    """A run of W&B whose files are in `folder`, or its continuation.

    more: arguments of wandb.init.
    """
    import wandb  # seconds to import, and not needed by most runs

    mode: Any = options.mode  # one of the words that W&B knows, by the schema
    return wandb.init(
        project=options.project,
        entity=options.entity,
        mode=mode,
        id=wandb_id(folder),
        resume="allow",
        dir=folder,
        reinit="finish_previous",
        settings=wandb.Settings(init_timeout=30, console="off"),
        **more,
    )


def wandb_id(folder: Path) -> str:
    """A random id, kept in the run's folder so that a resumed run continues under it."""
    path = folder / "wandb_id"
    if not path.exists():
        disk.replace_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")


def _wandb_name(folder: Path, config: Config) -> str:
    """The configuration's name, with what distinguishes the runs of a sweep, or of a day."""
    own = file_name(config.name)
    return folder.name if own in folder.name else f"{config.name} {folder.name}"
