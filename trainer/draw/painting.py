"""Drawing the rows: for each model all prompts are encoded first, then its UNet is loaded once, and
its LoRAs come and go beside the weights."""

import gc
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.data import Store
from trainer.draw.rows import Row
from trainer.draw.sheet import Sheet
from trainer.errors import UserError
from trainer.export import loras
from trainer.formats import adapters, lora, schedulers
from trainer.formats.adapters import Adapters
from trainer.formats.weights import of_file
from trainer.models import execution
from trainer.models.model import Model
from trainer.models.text import Encoder
from trainer.objective import encoding
from trainer.objective.encoding import Read
from trainer.sampling.drawer import Drawer
from trainer.sampling.prompts import Prompt
from trainer.system import console, signals

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelRows:
    """The rows of one model, without LoRAs or with some."""

    model: Model
    rows: list[Row]
    schedulers: list[dict[str, Any]] = field(default_factory=list)  # of the rows, once checked


@dataclass(kw_only=True)
class Painter:
    """Draws the same prompts for every row."""

    prompts: list[Prompt]
    batch_size: int  # pictures drawn at a time
    device: torch.device
    stop: Sequence[int]  # holds a signal once this process is asked to stop

    def draw(self, groups: Sequence[ModelRows], sheet: Sheet) -> None:
        """Draw all rows, model by model.  Raises `signals.Stopped`, once the pictures drawn so far
        are in the sheet, and UserError for a file that is damaged."""
        total = sum(len(group.rows) for group in groups) * len(self.prompts)
        with console.Aside("drawing", total, "pictures") as aside:
            for group in groups:
                self._draw_group(group, sheet, aside)

    def _draw_group(self, group: ModelRows, sheet: Sheet, aside: console.Aside) -> None:
        model = group.model
        reads = self._encoded(group)
        signals.leave_if(self.stop)
        model.load_unet()
        if model.config.compute == "bfloat16":
            execution.autocast(model.unet, self.device.type)
        for row, read, model.scheduler in zip(group.rows, reads, group.schedulers, strict=True):
            log.info("drawing: %s", _in_line(row))
            self._draw_row(row, model, read, sheet, aside)
        del model.unet  # before another one is loaded
        gc.collect()

    def _draw_row(
        self, row: Row, model: Model, read: Read, sheet: Sheet, aside: console.Aside
    ) -> None:
        drawer = Drawer(
            model=model,
            read=read,
            prompts=self.prompts,
            batch_size=self.batch_size,
            stop=self.stop,
        )
        latents: dict[int, Tensor] = {}  # by the prompt's place
        try:
            held = _adapters(row, model).get("unet", {})
            with adapters.attached(model.unet, held, row.scale):
                for place, latent in drawer.denoised():
                    latents[place] = latent
                    aside.advance(1)
        finally:  # also when it is stopped
            if not all(latent.isfinite().all() for latent in latents.values()):
                log.warning(
                    "%s: not all of its numbers are finite, so its pictures are blank; a --scale "
                    "closer to 0, or --dtype=float32, may help",
                    _in_line(row),
                )
            if latents:
                drawn = drawer.decode([*latents.values()])
                sheet.add(row.title, dict(zip(latents, drawn, strict=True)))

    def _encoded(self, group: ModelRows) -> list[Read]:
        """The prompts' texts for each row, as its text encoders read them."""
        model = group.model
        texts = list(dict.fromkeys(text for prompt in self.prompts for text in prompt.texts))
        cut, room = encoding.cut_captions(model, texts)
        for text in cut:
            log.warning("a prompt is truncated at %d tokens: %s", room, text)
        encoder = model.load_text_encoders()
        found: dict[str, Read] = {}  # by LoRA and scale, where it adapts text encoders
        reads = []
        for row in group.rows:
            held = _adapters(row, model)
            adapted = {part: held[part] for part in encoder.encoders if part in held}
            key = f"{row.scale} {row.lora}" if adapted else ""
            if key not in found:
                found[key] = self._read(texts, encoder, adapted, row)
            reads.append(found[key])
        return reads

    def _read(self, texts: list[str], encoder: Encoder, adapted: Adapters, row: Row) -> Read:
        """These texts as the row's adapted text encoders read them."""
        with ExitStack() as stack:
            for part, own in adapted.items():
                module = encoder.encoders[part]
                stack.enter_context(adapters.attached(module, own, row.scale))
            store = Store(None, "float32")
            try:
                return encoding.read_texts(texts, store, "", lambda: encoder, self.stop)
            except UserError as error:
                raise UserError(f"{_in_line(row)}: {error}") from error


def check(group: ModelRows) -> None:
    """Raise UserError for a LoRA that the model cannot have, or a scheduler that none can be drawn
    with, before anything is loaded."""
    model = group.model
    by_file = {row.lora: row for row in group.rows if row.lora}
    sketch = model.sketch() if any(row.sketch for row in by_file.values()) else None
    for row in by_file.values():
        try:
            for of_part in _adapters(row, model).values():
                adapters.peft_config(of_part)
        except adapters.OtherModel as error:
            raise UserError(f"{error}; --base=MODEL names its own") from error
        if row.sketch and row.sketch != sketch:
            raise UserError(
                f"the model at {model.config.path} is not the one that the run of {row.lora} "
                "started from; give the location of the original, or another: --base=MODEL"
            )
    for row in group.rows:
        model.scheduler = _scheduler(row, model)
        model.sampling_schedule()
        group.schedulers.append(model.scheduler)


def _in_line(row: Row) -> str:
    """The row's title, for a message."""
    return row.title.replace("\n", ", ")


def _adapters(row: Row, model: Model) -> Adapters:
    """Of a row's LoRA, by part."""
    return lora.read(row.lora, loras.empty(model.origin)) if row.lora else {}


def _scheduler(row: Row, model: Model) -> dict[str, Any]:
    """What the row samples with: the model's scheduler, or the one that its LoRA was trained with,
    which a run writes next to it."""
    own = model.origin.config("scheduler")
    if not row.lora or row.scale == 0:
        return own
    beside = row.lora.parent / "scheduler/scheduler_config.json"
    if not beside.is_file():
        return schedulers.with_lora(row.lora, of_file(row.lora)[1], own)
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{beside} cannot be read: {error}") from error
