"""Where a run's time goes: its steps, and the work between them.

Speed is the median step time; one slow step would distort a mean.  In a long run it covers the last
steps, whose times are saved in checkpoints.  The remaining time is estimated by the mean.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import Any

import torch

_WINDOW = 500  # steps in a median
_LEAST = 8  # fewest steps for quartiles


@dataclass(kw_only=True)
class Pace:
    """How fast some steps were."""

    steps: int = 0
    seconds: float = 0.0
    pictures: int = 0

    def add(self, seconds: float, pictures: int) -> None:
        """Add one step."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.pictures += pictures

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def images_per_second(self) -> float:
        return self.pictures / self.seconds


class Clock:
    """Counts time and pictures over all sessions of a run.

    The first step of a session, and each with a batch shape new to it, counts as time but not for
    speed: it compiles, allocates and tries kernels.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.seconds, self.pictures = 0.0, 0  # in training steps; pictures with repetitions
        self._steady = Pace()  # of the steps that count for speed
        self._times: list[float] = []  # seconds of the last of these
        self._seen: set[Hashable] = set()
        self._since = Pace()  # the last `lately`
        self._asides: dict[str, Pace] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "wall_seconds": self.wall_seconds,
            "seconds": self.seconds,
            "pictures": self.pictures,
            "steady": asdict(self._steady),
            "times": self._times,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add this session to those of a checkpoint."""
        self._began -= state["wall_seconds"]
        self.seconds, self.pictures = state["seconds"], state["pictures"]
        self._steady, self._times = Pace(**state["steady"]), [*state["times"]]

    @property
    def wall_seconds(self) -> float:
        """Seconds of all sessions, including the work between steps."""
        return time.monotonic() - self._began

    @property
    def has_stepped(self) -> bool:
        """Whether a step was made in this session."""
        return bool(self._seen)

    def step(self, seconds: float, batches: Sequence[Hashable], pictures: int) -> None:
        """Count a step; `batches` are the shapes of its batches."""
        self.seconds += seconds
        self.pictures += pictures
        self._since.add(seconds, pictures)
        if self._seen.issuperset(batches):
            self._steady.add(seconds, pictures)
            self._times = [*self._times, round(seconds, 6)][-_WINDOW:]
        self._seen.update(batches)

    @contextmanager
    def aside(self, work: str) -> Iterator[None]:
        """Measure work between steps."""
        started = time.monotonic()
        yield
        self._asides.setdefault(work, Pace()).add(time.monotonic() - started, 0)

    def lately(self) -> Pace:
        """The pace since the last call."""
        since, self._since = self._since, Pace()
        return since

    def pace(self, steps: int) -> Pace:
        """The mean pace of the steps that count for speed, in all sessions; of all `steps` so far
        if there are none."""
        if not self._steady.steps:
            return Pace(steps=steps, seconds=self.seconds, pictures=self.pictures)
        return replace(self._steady)

    def usual_pace(self, steps: int) -> Pace:
        """The same, with the median of the latest such steps instead of the mean."""
        pace, times = self.pace(steps), self._times
        return replace(pace, seconds=median(times) * pace.steps) if times else pace

    def quartiles(self) -> list[float] | None:
        """The first and the third quartile of the times in the median; None if they are too few."""
        times = self._times
        if len(times) < _LEAST:
            return None
        first, _, third = quantiles(times, n=4, method="inclusive")
        return [first, third]

    def left(self, done: int, steps: int, asides: Mapping[str, int]) -> float:
        """Estimated seconds left after `done` steps, from the mean time of a step and of each kind
        of work between steps.  asides: how often each of these is still to be done."""
        costs = {work: pace.seconds_per_step for work, pace in self._asides.items()}
        between = sum(costs.get(work, 0.0) * n for work, n in asides.items())
        return (steps - done) * self.pace(done).seconds_per_step + between


class OptimizerClock:
    """Measures `optimizer.step()` in one session, except the first, which compiles and allocates.
    With a fused backward, which steps elsewhere, it measures nothing.

    On a GPU, events are queued around the step and read at a report, which waits for the GPU
    anyway.
    """

    def __init__(self, device: torch.device, is_fused: bool) -> None:
        self._on_gpu, self._is_fused = device.type == "cuda", is_fused
        self._is_warm = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._lately, self._all = Pace(), deque[float](maxlen=_WINDOW)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the optimizer's step in the block."""
        if self._is_fused or not self._is_warm:
            yield
            self._is_warm = True
        elif self._on_gpu:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
        else:
            started = time.perf_counter()
            yield
            self._add(time.perf_counter() - started)

    def lately(self) -> dict[str, float]:
        """Seconds per step since the last call, to be called after a GPU synchronisation; {} if no
        step was measured."""
        for begun, ended in self._events:
            self._add(begun.elapsed_time(ended) / 1000)
        self._events = []
        since, self._lately = self._lately, Pace()
        return {"optimizer_seconds_per_step": since.seconds_per_step} if since.steps else {}

    @property
    def seconds_per_step(self) -> float | None:
        """The median of the session's last steps, up to its last report."""
        return median(self._all) if self._all else None

    def _add(self, seconds: float) -> None:
        self._lately.add(seconds, 0)
        self._all.append(seconds)
