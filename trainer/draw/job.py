"""From a request to the pictures: everything is checked before anything slow begins."""

import logging

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.checks import machine
from trainer.draw import painting, rows, sources, wanted
from trainer.draw.painting import ModelRows, Painter
from trainer.draw.request import Request
from trainer.draw.rows import Row
from trainer.draw.sheet import Sheet
from trainer.errors import UserError, reason
from trainer.models import execution
from trainer.models.model import Model
from trainer.system import memory, signals
from trainer.wording import plural

log = logging.getLogger(__name__)


def draw(request: Request) -> None:
    """Draw what is requested.  Raises UserError for what cannot be drawn; ends the process, with
    what is drawn so far on the disk, if it is asked to stop."""
    machine.check_device("--device", request.device)
    device = execution.use_device(request.device)
    found = sources.found(request.sources, request.all_results)
    every = rows.of_sources(found, request, device.type)
    groups = _by_model(every, device)
    for group in groups:
        painting.check(group)
    prompts = wanted.prompts_of(request, found, groups[0].model)
    titles, lines = [row.title for row in every], [prompt.line for prompt in prompts]
    originals = wanted.originals(found, prompts)
    sheet = Sheet(request.out, request.folder, titles, lines, originals)
    batch_size = request.batch_size or wanted.batch_size(found)
    with logging_redirect_tqdm(), signals.stop_signals("these pictures") as stop:
        painter = Painter(prompts=prompts, batch_size=batch_size, device=device, stop=stop)
        try:
            painter.draw(groups, sheet)
        except signals.Stopped:
            log.info("stopped; %s", sheet)
            signals.end(stop[0])
        except Exception as error:
            if not memory.ran_out(error):
                raise
            raise UserError(
                "out of memory; try --dtype=bfloat16, --quantization=int8 or nf4, --batch-size=1, "
                f"a smaller --resolution, or --device=cpu ({reason(error)})"
            ) from error
    log.info("%s in %s", plural(len(every), "row"), sheet)


def _by_model(every: list[Row], device: torch.device) -> list[ModelRows]:
    """The rows of each model, in the order of their first ones."""
    groups: list[ModelRows] = []
    for row in every:
        same = next((group for group in groups if group.rows[0].model == row.model), None)
        if same:
            same.rows.append(row)
        else:
            groups.append(ModelRows(model=Model(row.model, device, option=row.option), rows=[row]))
    return groups
