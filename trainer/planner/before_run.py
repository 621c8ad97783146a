"""A run's message about memory, before it loads anything."""

import logging

import torch

from trainer.config import Config
from trainer.errors import UserError, reason
from trainer.models.model import Model
from trainer.planner.page import verdict
from trainer.planner.plan import make
from trainer.planner.room import room_of
from trainer.system import memory

log = logging.getLogger(__name__)


def announce(config: Config, model: Model, device: torch.device) -> int | None:
    """Log whether a run of a large model fits; -> the planned peak of its steps in bytes.

    None for a small model, where planning would only delay the start, and for one that cannot be
    rehearsed, which may be trained nevertheless.
    """
    unet = model.empty("unet", config.model.dtype)
    if sum(p.nbytes for p in unet.parameters()) < memory.LARGE_BYTES:
        return None
    try:
        plan = make(config, model, device.type)
    except UserError:
        raise
    except Exception as error:  # fake tensors may fail in unusual modules
        log.warning("memory: no plan, because the model cannot be simulated (%s)", reason(error))
        return None
    room = room_of(device)
    if plan.fits(room):
        log.info("memory: %s", verdict(plan, room))
    else:
        message = "memory: %s; `python -m trainer.planner` with these options suggests others"
        log.warning(message, verdict(plan, room))
    return plan.training_bytes
