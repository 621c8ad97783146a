"""One candidate's row: its steps between the reference's, its memory, its threads."""

import gc
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.candidates import Candidate, engine
from bench.clock import Clock, Stream
from bench.memory import peak_temporary, state_bytes
from bench.workload import Workload

SLOW = 5.0  # times the reference: from here on `slow_rounds` are enough
SCALING_BLOCKS = 12  # of steps on one thread, each followed by one of steps on all
SCALING_STEPS = 3  # that are timed in a block


@dataclass(kw_only=True)
class Row:
    """What was measured of one optimizer.  Times in seconds, memory in bytes."""

    name: str
    ours: bool
    engine: str  # who runs our loops; a peer's version
    rounds: int
    ratio: float  # median over rounds: step / mean of the reference's steps before and after it
    ratio_best: float  # fastest step / fastest reference step
    seconds: float  # median
    seconds_best: float
    reference_seconds: float  # median, of the reference's steps in these rounds
    state_bytes: int
    state_per_param: float
    ideal_per_param: float  # read gradient, read and write weight and state: once each
    bandwidth: float  # ideal bytes / median time, bytes per second
    stream_share: float  # of the bandwidth of the in-place stream in the same rounds
    temporary_bytes: int | None
    tiny_ratio: float | None = None  # as `ratio`, on the tiny tensors
    scaling: float | None = None  # median over pairs of blocks: one thread's time / all threads'


@dataclass(kw_only=True)
class Bench:
    """What all candidates of a run share."""

    slice: Workload
    tiny: Workload
    clock: Clock
    stream: Stream
    threads: int
    rounds: int
    slow_rounds: int

    def row(self, candidate: Candidate) -> Row:
        """Measure a candidate; its state is gone afterwards."""
        work = self.slice
        optimizer = candidate.build(work.params)
        work.settle(optimizer)
        steps, references, streams = self._rounds(optimizer, work)
        median = statistics.median(steps)
        stream = self.stream.bytes / statistics.median(streams)
        kept = state_bytes(optimizer)
        ideal = 3 * work.element_size + 2 * kept / work.num_params
        row = Row(
            name=candidate.name,
            ours=candidate.ours,
            engine=engine(optimizer) if candidate.ours else candidate.version,
            rounds=len(steps),
            ratio=_ratio(steps, references),
            ratio_best=min(steps) / min(references),
            seconds=median,
            seconds_best=min(steps),
            reference_seconds=statistics.median(references),
            state_bytes=kept,
            state_per_param=kept / work.num_params,
            ideal_per_param=ideal,
            bandwidth=ideal * work.num_params / median,
            stream_share=ideal * work.num_params / median / stream,
            temporary_bytes=peak_temporary(optimizer.step, self.clock.device),
        )
        del optimizer
        gc.collect()
        row.tiny_ratio = self._tiny_ratio(candidate)
        on_threads = self.threads > 1 and self.clock.device.type == "cpu"
        if on_threads and (candidate.ours or candidate.name == "torch/adamw-fused"):
            row.scaling = self._scaling(candidate)
        gc.collect()
        return row

    def _rounds(
        self, optimizer: torch.optim.Optimizer, work: Workload
    ) -> tuple[list[float], list[float], list[float]]:
        """Seconds of the candidate's steps (n), the reference's around them (n + 1), the stream's
        (n)."""
        steps: list[float] = []
        streams: list[float] = []
        references = [self._seconds(work, work.reference)]
        wanted = self.rounds
        while len(steps) < wanted:
            steps.append(self._seconds(work, optimizer))
            references.append(self._seconds(work, work.reference))
            streams.append(self.clock.seconds(self.stream))
            if steps[0] > SLOW * references[0]:
                wanted = min(self.rounds, self.slow_rounds)
        return steps, references, streams

    def _seconds(self, work: Workload, optimizer: torch.optim.Optimizer) -> float:
        work.next_grads()
        return self.clock.seconds(optimizer.step)

    def _tiny_ratio(self, candidate: Candidate) -> float:
        optimizer = candidate.build(self.tiny.params)
        self.tiny.settle(optimizer)
        steps, references, _ = self._rounds(optimizer, self.tiny)
        return _ratio(steps, references)

    def _scaling(self, candidate: Candidate) -> float:
        """How many times faster all threads are than one.

        In blocks, because a change of the number makes the thread pool anew: threads that have just
        woken up are not those that a backward pass leaves behind.
        """
        optimizer = candidate.build(self.slice.params)

        def block(threads: int) -> float:
            torch.set_num_threads(threads)
            self.slice.settle(optimizer)
            return statistics.median(
                self._seconds(self.slice, optimizer) for _ in range(SCALING_STEPS)
            )

        return statistics.median(block(1) / block(self.threads) for _ in range(SCALING_BLOCKS))


def measure(
    bench: Bench, candidates: list[Candidate], report: Callable[[int, str], None]
) -> tuple[list[Row], dict[str, str]]:
    """Rows of all candidates, fastest first, and why some have none; `report(done, line)` is called
    after each."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for done, candidate in enumerate(candidates, start=1):
        try:
            row = bench.row(candidate)
        except Exception as error:  # one broken peer must not cost the others' minutes
            failed[candidate.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            report(done, f"{candidate.name} failed: {failed[candidate.name]}")
            continue
        rows.append(row)
        report(done, f"{row.name}: {row.ratio:.2f}x, tiny tensors {row.tiny_ratio:.2f}x")
    return sorted(rows, key=lambda row: row.ratio), failed


def _ratio(steps: list[float], references: list[float]) -> float:
    """Median of step / mean of its two neighbours: steps (n), references (n + 1)."""
    neighbours = itertools.pairwise(references)
    return statistics.median(
        step / ((before + after) / 2)
        for step, (before, after) in zip(steps, neighbours, strict=True)
    )
