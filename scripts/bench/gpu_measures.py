"""What a step costs on a GPU: launches, memory, time.

The tensors are the whole SDXL UNet's in bf16 where the device has room for them, a sample where it
has not.

A step's time is that of its work on the device: events around it, with enough copies queued before
it that the host is through with the step before the device begins.  So it is in training, where
the backward pass is still running when `step()` is called.  The time *alone*, on an idle device,
has the host's share in it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from bench import candidates, shapes
from bench.candidates import Candidate
from bench.clock import Clock
from bench.memory import peak_temporary, state_bytes
from bench.outcomes import Finding, Skip, table
from bench.subject import Subject
from bench.workload import Workload
from optim import cuda

OURS = (
    "adamw_factored",
    "adopt_factored",
    "adafactor8bit",
    "adafactor8bit:clip_norm=lagged",
    "adafactor8bit:clip_threshold=none",
    "adamw8bit",
    "lion8bit",
    "sgd",
)
REFERENCE = "torch/adamw-fused"
MOST_LAUNCHES = 32  # in a step
# The targets, in bf16 on the whole UNet: milliseconds, and the share of a copy's bandwidth that
# rules of one pass have at least.
MOST_MS = {"adamw_factored": 5.0, "adafactor8bit": 7.0}
ONE_PASS = ("adamw_factored", "adopt_factored", "adamw8bit", "lion8bit", "sgd")
LEAST_SHARE = 0.8
JUDGED = ("H100", "H200")  # the devices that these targets are for

# Device bytes a parameter while candidates are measured: the weights' 2, two sets of gradients 4,
# the reference's moments 4, the largest candidate's state 8, and as much again for a peer's
# temporaries and what lies between.
BYTES_PER_PARAM = 26
QUICK_PARAMS = 98e6
COPY_BYTES = 1 << 30
ROUNDS, QUICK_ROUNDS = 10, 3
SLOW = 0.05  # seconds of a step from which on QUICK_ROUNDS are enough
ROOMS = tuple(1 << shift for shift in range(20, 28))  # of cuda.ROOM: 1 to 128 MiB


class Unet:
    """The UNet's tensors on a device, made when first asked for."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick = device, quick
        self._work: Workload | None = None

    @property
    def work(self) -> Workload:
        """Raises Skip where not even the smallest sample fits."""
        if self._work is None:
            free = torch.cuda.mem_get_info(self.device)[0]
            self._work = Workload(pick(free, self.quick), torch.bfloat16, self.device)
        return self._work

    @property
    def is_whole(self) -> bool:
        return self.work.num_params == shapes.num_params(shapes.unet())

    def __str__(self) -> str:
        of = "the whole SDXL UNet" if self.is_whole else "a sample of the SDXL UNet"
        work = self.work
        return f"{work.num_params / 1e9:.3f}e9 bf16 parameters in {len(work.shapes)} tensors, {of}"

    def built(self, candidate: Candidate) -> torch.optim.Optimizer:
        """The candidate's optimizer, its special first steps behind it."""
        gc.collect()
        optimizer = candidate.build(self.work.params)
        self.work.settle(optimizer)
        return optimizer


def pick(free: int, quick: bool) -> list[shapes.Shape]:
    """As many of the UNet's tensors as there is room for in so many bytes."""
    whole = shapes.unet()
    wanted = min(shapes.num_params(whole), free / BYTES_PER_PARAM)
    if quick:
        wanted = min(wanted, QUICK_PARAMS)
    if wanted < 25e6:
        raise Skip(f"{free / 1e9:.1f} GB of free device memory hold no sample of the UNet")
    return whole if wanted == shapes.num_params(whole) else shapes.sample(wanted)


# Launches and memory ------------------------------------------------------------------------------


def launches_are_few(subject: Subject, unet: Unet, deadline: float) -> Finding:
    """A step is at most MOST_LAUNCHES of our kernels, and of everything on the device."""
    rows, most = [], 0
    for candidate in candidates.ours(list(OURS), "auto"):
        optimizer = unet.built(candidate)
        unet.work.next_grads()
        launched = subject.launches(optimizer.step)
        unet.work.next_grads()
        seen = activities(optimizer.step)
        rows.append((candidate.name, launched, seen, state_bytes(optimizer)))
        most = max(most, launched, seen or 0)
        del optimizer
    blind = all(seen is None for *_, seen, _ in rows)
    note = "; the profiler saw nothing" if blind else ", copies to the device and all"
    head = ("optimizer", "launches", "on the device", "state MB")
    cells = [(name, str(n), str(seen), f"{kept / 1e6:,.2f}") for name, n, seen, kept in rows]
    keys = ("name", "launches", "activities", "state_bytes")
    return Finding(
        holds=most <= MOST_LAUNCHES,
        line=f"{unet}: at most {most} in a step (of {MOST_LAUNCHES}){note}",
        facts={"rows": [dict(zip(keys, row, strict=True)) for row in rows]},
        tables=[table(head, cells)],
    )


def activities(call: Callable[[], object]) -> int | None:
    """How many kernels and copies the device runs in this call; None where the profiler is blind
    (it may be forbidden)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    # A range that torch names (`Optimizer.step#...`) is shown beside what runs within it.
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.")
    ]
    return len(events) or None


def holds_nothing_large(subject: Subject, unet: Unet, deadline: float) -> Finding:
    """A step allocates nothing of a tensor's size: at most a hundredth of the largest."""
    largest = max(p.numel() * p.element_size() for p in unet.work.params)
    peaks = {}
    for candidate in candidates.ours(list(OURS), "auto"):
        optimizer = unet.built(candidate)
        unet.work.next_grads()
        peaks[candidate.name] = peak_temporary(optimizer.step, subject.device) or 0
        del optimizer
    worst = max(peaks, key=lambda name: peaks[name])
    return Finding(
        holds=peaks[worst] <= largest / 100,
        line=f"{unet}: at most {peaks[worst] / 1e3:,.1f} kB during a step ({worst}); "
        f"the largest tensor has {largest / 1e6:,.1f} MB",
        facts={"peaks": peaks, "largest_tensor": largest},
    )


# Time ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Timing:
    """A candidate's steps.  Times in seconds, medians."""

    name: str
    ours: bool
    seconds: float  # on the device
    alone: float  # on an idle device, the host's share included
    state_bytes: int
    ideal_per_param: float  # read gradient, read and write weight and state: once each
    copy_share: float  # of a copy's bandwidth, by ideal bytes
    ratio: float = math.nan  # to the reference's seconds


class Stopwatch:
    """Times calls on a device by events, and a copy from it to itself."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.rounds = rounds
        self._clock = Clock(device, threads=1)
        self._from = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        self.copy()
        self._copy_seconds = statistics.median(
            self._clock.seconds(self.copy) for _ in range(2 * rounds)
        )
        self.bandwidth = 2 * COPY_BYTES / self._copy_seconds  # bytes a second, read and written

    def copy(self) -> None:
        self._to.copy_(self._from)

    def alone(self, call: Callable[[], object], prepare: Callable[[], None]) -> float:
        """Seconds on an idle device."""
        prepare()
        first = self._clock.seconds(call)
        return statistics.median(
            [first, *(self._one_alone(call, prepare) for _ in range(self._rounds(first) - 1))]
        )

    def on_device(self, call: Callable[[], object], prepare: Callable[[], None]) -> float:
        """Seconds of the work that a call gives a device that is busy until then."""
        prepare()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        copies = math.ceil(2 * host / self._copy_seconds) + 1
        return statistics.median(
            self._one_behind(copies, call, prepare) for _ in range(self._rounds(host))
        )

    def _rounds(self, seconds: float) -> int:
        return self.rounds if seconds < SLOW else min(self.rounds, QUICK_ROUNDS)

    def _one_alone(self, call: Callable[[], object], prepare: Callable[[], None]) -> float:
        prepare()
        return self._clock.seconds(call)

    def _one_behind(
        self, copies: int, call: Callable[[], object], prepare: Callable[[], None]
    ) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepare()
        torch.cuda.synchronize()
        for _ in range(copies):
            self.copy()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def is_fast(subject: Subject, unet: Unet, peers: list[str] | None, deadline: float) -> Finding:
    """Step times against the copy bandwidth, torch's fused AdamW, and every installed peer."""
    watch = Stopwatch(subject.device, QUICK_ROUNDS if unet.quick else ROUNDS)
    ours = candidates.ours(list(OURS), "auto")
    others, absent = candidates.peers(peers)
    others.sort(key=lambda candidate: candidate.name != REFERENCE)
    rows, left_out = [], dict(absent)
    for candidate in (*others[:1], *ours, *others[1:]):
        if time.monotonic() > deadline:
            left_out[candidate.name] = "no time was left"
            continue
        try:
            rows.append(_timing(watch, unet, candidate))
        except Exception as error:  # a broken peer must not cost the others their row
            left_out[candidate.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.cuda.empty_cache()
    compare(rows)
    name = torch.cuda.get_device_name(subject.device)
    verdicts = judge(rows, name, unet.is_whole)
    broken = [candidate.name for candidate in ours if candidate.name in left_out]
    missed = [line for met, line in verdicts if not met]
    line = f"{unet}; a copy has {watch.bandwidth / 1e12:.2f} TB/s; "
    line += f"{len(verdicts) - len(missed)} of {len(verdicts)} targets met" if verdicts else (
        f"targets are for the whole UNet on {' or '.join(JUDGED)}, and not judged here"
    )  # fmt: skip
    judged = "\n".join(f"- {'PASS' if met else 'FAIL'}: {line}" for met, line in verdicts)
    return Finding(
        holds=not missed and not broken,
        line=line + (f"; not measured: {', '.join(broken)}" if broken else ""),
        facts={
            "rows": [asdict(row) for row in rows],
            "copy_bandwidth": watch.bandwidth,
            "left_out": left_out,
            "targets": [{"met": met, "target": line} for met, line in verdicts],
        },
        tables=[times(rows), *([judged] if judged else []), *_list(left_out)],
    )


def _timing(watch: Stopwatch, unet: Unet, candidate: Candidate) -> Timing:
    work = unet.work
    optimizer = unet.built(candidate)
    kept = state_bytes(optimizer)
    ideal = 3 * work.element_size + 2 * kept / work.num_params
    seconds = watch.on_device(optimizer.step, work.next_grads)
    return Timing(
        name=candidate.name,
        ours=candidate.ours,
        seconds=seconds,
        alone=watch.alone(optimizer.step, work.next_grads),
        state_bytes=kept,
        ideal_per_param=ideal,
        copy_share=ideal * work.num_params / seconds / watch.bandwidth,
    )


def compare(rows: list[Timing]) -> None:
    """Sort rows by time, and write each one's ratio to the reference, where that was measured."""
    rows.sort(key=lambda row: row.seconds)
    reference = next((row.seconds for row in rows if row.name == REFERENCE), math.nan)
    for row in rows:
        row.ratio = row.seconds / reference


def judge(rows: list[Timing], device: str, whole: bool) -> list[tuple[bool, str]]:
    """Every target -> (met, what was wanted and found); none where they are not for this."""
    if not whole or not any(name in device for name in JUDGED):
        return []
    found = {row.name: row for row in rows}
    verdicts = []
    for name, most in MOST_MS.items():
        ms = found[name].seconds * 1e3 if name in found else math.inf
        verdicts.append((ms <= most, f"{name}: {ms:.2f} <= {most} ms"))
    for name in ONE_PASS:
        share = found[name].copy_share if name in found else 0.0
        line = f"{name}: {share:.0%} >= {LEAST_SHARE:.0%} of the copy bandwidth"
        verdicts.append((share >= LEAST_SHARE, line))
    return verdicts


def times(rows: list[Timing]) -> str:
    """The rows as a Markdown table."""
    head = ("optimizer", "ms", "x torch fused AdamW", "alone, ms", "of a copy's bandwidth",
            "ideal B/param", "state MB")  # fmt: skip
    cells = [
        (
            f"**{row.name}**" if row.ours else row.name,
            f"{row.seconds * 1e3:.2f}",
            f"{row.ratio:.2f}",
            f"{row.alone * 1e3:.2f}",
            f"{row.copy_share:.0%}",
            f"{row.ideal_per_param:.2f}",
            f"{row.state_bytes / 1e6:,.2f}",
        )
        for row in rows
    ]
    return table(head, cells)


def waves(subject: Subject, unet: Unet, deadline: float) -> Finding:
    """What a limit on buckets does to Adafactor's three sweeps over gradients: smaller buckets find
    them in the cache again, and take more launches."""
    watch = Stopwatch(subject.device, QUICK_ROUNDS)
    usual, found = cuda.ROOM, []
    (candidate,) = candidates.ours(["adafactor8bit"], "auto")
    try:
        for room in ROOMS:
            if time.monotonic() > deadline:
                break
            cuda.ROOM = room
            optimizer = unet.built(candidate)
            seconds = watch.on_device(optimizer.step, unet.work.next_grads)
            found.append((room, subject.launches(optimizer.step), seconds))
            del optimizer
    finally:
        cuda.ROOM = usual
    best = min(found, key=lambda one: one[2])
    cells = [(f"{room >> 20}", str(count), f"{s * 1e3:.2f}") for room, count, s in found]
    return Finding(
        holds=True,
        line=f"{unet}: fastest with {best[0] >> 20} MiB, {best[2] * 1e3:.2f} ms in {best[1]} "
        f"launches (measured, not judged; the limit is {usual >> 20} MiB)",
        facts={
            "rows": [{"room": room, "launches": n, "seconds": s} for room, n, s in found],
        },
        tables=[table(("cuda.ROOM, MiB", "launches", "ms"), cells)],
    )


def _list(reasons: dict[str, str]) -> list[str]:
    lines = [f"- {name} was left out: {reason}" for name, reason in reasons.items()]
    return ["\n".join(lines)] if lines else []
