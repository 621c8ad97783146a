"""A run between two steps: everything that a step reads or changes."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.config import AdapterConfig, Config
from trainer.models.model import Model
from trainer.objective import encoding, losses
from trainer.objective.noise_schedule import NoiseSchedule
from trainer.phases.intervals import Intervals
from trainer.reporting import watch
from trainer.reporting.clock import Clock, OptimizerClock
from trainer.sampling.sampler import Sampler
from trainer.system import memory
from trainer.training import method, switching
from trainer.training.ema import Ema
from trainer.training.gradients import Backward
from trainer.training.guard import Guard


class Counter(Protocol):
    """What counts over all sessions of a run."""

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(kw_only=True)
class State:
    """Everything that a step changes or reads; `step` counts the steps done."""

    config: Config
    folder: Path
    model: Model
    noise_schedule: NoiseSchedule
    data: encoding.Encoded
    data_fingerprint: str
    model_sketch: str  # of the model that training began with
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    guard: Guard
    device: torch.device
    step: int
    micro_batches: int  # the number of the next one
    backward: Backward
    losses_before: dict[str, float]  # of the evaluation before the first step
    intervals: Intervals
    clock: Clock
    optimizer_clock: OptimizerClock
    watch: watch.Watch
    overrides: Sequence[str]  # the command line's
    ema: Ema | None
    peaks: memory.Peaks
    planned_bytes: int | None  # the planned peak of a step; None for a small model
    stop: Sequence[int] = ()  # holds a signal once the run is asked to stop
    owes_checkpoint: bool = False  # since one was due after a skipped step, or since a rollback
    unproven: int | None = None  # the newest checkpoint's step, until enough good ones followed

    def evaluated(self) -> AbstractContextManager[None]:
        """A block in which the model has the weights that its optimizer is to be evaluated with."""
        return switching.evaluated(self.optimizer, method.trained_parameters(self.model).values())

    def averaged(self, wanted: bool = True) -> AbstractContextManager[None]:
        """A block in which the model has the averaged weights, if any, if they are wanted."""
        return self.ema.in_place() if self.ema and wanted else nullcontext()

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.folder / "checkpoints"

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.config.schedule.steps

    @property
    def is_new(self) -> bool:
        """Whether the model is untrained.  With an adapter to start from it is not, and the
        prediction type that the adapter was trained for is unknown."""
        return self.step == 0 and not self.starts_from_adapter

    @property
    def starts_from_adapter(self) -> bool:
        """Whether the run starts from another run's adapter."""
        method = self.config.method
        return isinstance(method, AdapterConfig) and method.start_from is not None

    @property
    def exports_average(self) -> bool:
        """Whether the result has the averaged weights."""
        return self.ema is not None and self.ema.config.export == "average"

    @property
    def losses_are_relative(self) -> bool:
        """Whether a step's squared error is judged by what evaluation found at its timesteps
        before the first step: it knows all quarters of them."""
        return losses.cover_all_timesteps(self.losses_before)

    @property
    def eval_loss_before(self) -> float:
        """NaN if it is unknown, or not comparable any more."""
        return self.losses_before.get("loss", math.nan)

    @property
    def counters(self) -> dict[str, Counter]:
        """By their names in a checkpoint."""
        return {
            "guard": self.guard,
            "clock": self.clock,
            "watch": self.watch,
            "peaks": self.peaks,
            "clip": self.backward.clip,
        }

    @property
    def needed_proof(self) -> int:
        """How many good steps must follow a checkpoint before older ones may be deleted.  A
        divergence that is acted on is found that late, and needs one from before it."""
        return 1 if self.config.runtime.on_divergence == "warn" else watch.WINDOW

    @property
    def epochs(self) -> float:
        """The number of epochs done."""
        return float(self.micro_batches / self.data.dataset.plan.batches_per_epoch)
