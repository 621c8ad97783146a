"""Where a run's time goes: its steps, and what is done between them."""

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.checkpoint import Counters
from trainer.config import Config


@dataclass(kw_only=True)
class Pace:
    """How fast some steps were."""

    steps: int = 0
    seconds: float = 0.0
    pictures: int = 0

    def add(self, seconds: float, pictures: int) -> None:
        """Take in one more step."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.pictures += pictures

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def images_per_second(self) -> float:
        return self.pictures / self.seconds


class Clock:
    """Counts time and pictures into a run's counters, which other sessions have begun.

    The first step of a session, and each that has a batch of a shape that is new in it, counts as
    time but is no measure of speed: it compiles, allocates and tries kernels.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._began = time.monotonic() - counters.wall_seconds
        self._seen: set[Hashable] = set()
        self._since = Pace()  # the last `lately`
        self._asides: dict[str, Pace] = {}

    @property
    def wall_seconds(self) -> float:
        """Of all sessions, with everything between the steps."""
        return time.monotonic() - self._began

    @property
    def has_stepped(self) -> bool:
        """Whether a step was made in this session."""
        return bool(self._seen)

    def step(self, seconds: float, batches: Sequence[Hashable], pictures: int) -> None:
        """Count a step that took so long; `batches` are the shapes of what it trained on."""
        counters = self._counters
        counters.seconds += seconds
        counters.pictures += pictures
        self._since.add(seconds, pictures)
        if self._seen.issuperset(batches):
            counters.steady_steps += 1
            counters.steady_seconds += seconds
            counters.steady_pictures += pictures
        self._seen.update(batches)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Measure what is done between steps."""
        started = time.monotonic()
        yield
        self._asides.setdefault(what, Pace()).add(time.monotonic() - started, 0)

    def lately(self) -> Pace:
        """The pace since this was asked the last time."""
        since, self._since = self._since, Pace()
        return since

    def pace(self, steps: int) -> Pace:
        """That of the steps which measure speed, of all sessions; of all `steps` so far where there
        are no others."""
        c = self._counters
        if not c.steady_steps:
            return Pace(steps=steps, seconds=c.seconds, pictures=c.pictures)
        return Pace(steps=c.steady_steps, seconds=c.steady_seconds, pictures=c.steady_pictures)

    def left(self, done: int, config: Config) -> float:
        """The seconds until the run ends, after `done` steps: as steps took until now, and as what
        is done between them did."""
        costs = {what: pace.seconds_per_step for what, pace in self._asides.items()}
        between = sum(costs.get(what, 0.0) * n for what, n in asides_left(config, done).items())
        return (config.schedule.steps - done) * self.pace(done).seconds_per_step + between


def asides_left(config: Config, done: int) -> dict[str, int]:
    """How many evaluations, drawings and saves are still to come after `done` steps, those at the
    end of the run included."""
    last = config.schedule.steps - 1  # what is due after the last step is done at the end
    every = {
        "evaluating": config.log.eval_every,
        "drawing": config.log.sample_every,
        "saving": config.runtime.save_every,
    }
    return {k: 1 + (last // n - min(done, last) // n if n else 0) for k, n in every.items()}
