"""Measure a step of our optimizers and of installed peers, against torch's fused AdamW.

    python scripts/bench_optim.py                               # ours and all peers, one thread
    python scripts/bench_optim.py --peers none --check          # only ours, checked against targets
    python scripts/bench_optim.py --threads 2 --peers none      # scaling to two threads
    python scripts/bench_optim.py --ours adamw_factored adafactor8bit:clip_norm=lagged --peers torch
    python scripts/bench_optim.py --lora 16 --dtype float32     # a LoRA's matrices
    python scripts/bench_optim.py --json bench.json --png bench.png

The tensors are a systematic sample of the SDXL UNet's shapes with fixed random gradients; every
candidate's step is timed between two steps of torch.optim.AdamW(fused=True) in the same run and
divided by their mean.  The table goes to stdout, progress to stderr.  docs/benchmarks.md explains
the columns and their limits.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch comes after the environment is set, see main()
    from bench.measure import Bench, Row

# Targets of --check: the largest median ratio to torch's fused AdamW, bf16, on one thread, by the
# instruction set of the native module ...
SLICE_TARGETS = {
    "adamw_factored": {"avx512": 0.75, "avx2": 1.0},
    "adopt_factored": {"avx512": 0.75, "avx2": 1.0},
    "adafactor8bit": {"avx512": 0.70, "avx2": 0.75},
    "adamw8bit": {"avx512": 1.0, "avx2": 1.2},
}
# ... the largest on the tiny tensors, for the same optimizers ...
TINY_TARGET = 0.5
# ... and, with --threads 2 or more, the smallest speedup over one thread.
SCALING_TARGET = 1.6

QUICK_PARAMS, QUICK_ROUNDS, QUICK_EVERY = 1e6, 2, 28
DTYPES = ("bfloat16", "float16", "float32")


def main() -> None:
    args = parse()
    # OpenMP and the native module read these when importing torch and optim loads them.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.isa:
        os.environ["OPTIM_ISA"] = args.isa
    try:
        sys.exit(run(args))
    except ValueError as error:
        sys.exit(f"bench_optim: {error}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with --quick's values filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ours", nargs="+", metavar="NAME[:OPTION=VALUE,...]", help="default: the whole family")
    add("--peers", nargs="+", metavar="PACKAGE[/NAME]", help="default: all installed; none: none")
    add("--backend", choices=("auto", "native", "torch"), default="auto", help="backend of ours")
    add("--isa", choices=("baseline", "avx2", "avx512"), help="instruction set (OPTIM_ISA)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights, gradients")
    add("--threads", type=int, default=1, help="1 (default): CPU time is measured; more: wall time")
    add("--params", type=float, default=98e6, help="size of the sample (default 98e6)")
    add("--lora", type=int, metavar="RANK", help="instead: a LoRA's matrices of this rank")
    add("--rounds", type=int, default=21, help="steps measured per optimizer (default 21)")
    add("--peer-rounds", type=int, default=3, help="... if 5x slower than torch (default 3)")
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    add("--png", type=Path, metavar="FILE", help="draw a chart")
    add("--quick", action="store_true", help="smoke test: 1M parameters, two rounds")
    add("--check", action="store_true", help="exit with status 1 if a target is missed")
    args = parser.parse_args(arguments)
    if min(args.threads, args.rounds, args.peer_rounds) < 1 or (args.lora or 1) < 1:
        parser.error("--threads, --rounds, --peer-rounds and --lora are at least 1")
    other = args.quick or args.lora or args.dtype != "bfloat16" or args.device != "cpu"
    if args.check and other:
        parser.error("targets are for the bf16 slice on a CPU: use --check without "
                     "--quick, --lora, --dtype and --device")  # fmt: skip
    if args.check and args.isa == "baseline":
        parser.error("no targets for the baseline instruction set: use --isa avx2 or avx512")
    if args.quick:
        args.params, args.rounds, args.peer_rounds = QUICK_PARAMS, QUICK_ROUNDS, QUICK_ROUNDS
    return args


def run(args: argparse.Namespace) -> int:
    """Measure and report -> exit status."""
    from bench import candidates, chart, table
    from bench.measure import measure

    # Choose the candidates.
    ours = candidates.ours(args.ours, args.backend)
    peers, absent = candidates.peers(args.peers)
    for name, reason in absent.items():
        say(f"skipped {name}: {reason}")
    isa = candidates.native_isa()
    if args.isa and isa != args.isa:
        raise ValueError(f"--isa {args.isa}: the native module is not built, or has no choice; "
                         "install again with a C++ compiler, or leave --isa out")  # fmt: skip

    # Measure.
    bench = set_up(args)
    everybody = [*ours, *peers]
    rows, failed = measure(bench, everybody, Progress(len(everybody)))

    # Report.
    facts = environment(args, bench, isa)
    print(caption(facts), end="\n\n")
    print(table.markdown(rows, args.threads), end="\n\n")
    verdicts = judge(rows, args.threads, facts["isa"]) if args.check else []
    for met, line in verdicts:
        print(f"- {'met' if met else '**missed**'}: {line}")
    if args.json:
        content = {
            **facts,
            "rows": [dataclasses.asdict(row) for row in rows],
            "skipped": absent | failed,
            "targets": [{"met": met, "target": line} for met, line in verdicts],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.png and rows:
        chart.draw(rows, args.png, caption(facts))
    broken = any(candidate.name in failed for candidate in ours)
    return int(broken or (args.check and not all(met for met, _ in verdicts)))


def set_up(args: argparse.Namespace) -> "Bench":
    """Allocate the tensors; raises ValueError if there is no such device."""
    import torch
    from bench import shapes
    from bench.clock import Clock, Stream
    from bench.measure import Bench
    from bench.workload import Workload

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: use --device cpu, or a CUDA build of torch")
    torch.set_num_threads(args.threads)
    chosen = shapes.lora(args.lora) if args.lora else shapes.sample(args.params)
    return Bench(
        slice=Workload(chosen, dtype, device),
        tiny=Workload(shapes.tiny(QUICK_EVERY if args.quick else 1), dtype, device),
        clock=Clock(device, args.threads),
        stream=Stream(device, args.quick),
        threads=args.threads,
        rounds=args.rounds,
        slow_rounds=args.peer_rounds,
    )


def environment(args: argparse.Namespace, bench: "Bench", isa: str | None) -> dict[str, Any]:
    """What the results depend on besides the code."""
    import torch
    from bench import shapes

    sets = {"slice": bench.slice, "tiny": bench.tiny}
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(args.device),
        "isa": isa,
        "backend": args.backend,
        "device": args.device,
        "dtype": args.dtype,
        "lora": args.lora,
        "threads": args.threads,
        "rounds": args.rounds,
        "clock": bench.clock.kind,
        "load": round(os.getloadavg()[0], 1),  # of the last minute, this run's own included
        **{
            name: {
                "tensors": len(work.shapes),
                "params": work.num_params,
                "mix": shapes.mix(work.shapes),
            }
            for name, work in sets.items()
        },
    }


def machine(device: str) -> str:
    """The processor's name."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def caption(facts: dict[str, Any]) -> str:
    """One line that says what was measured."""
    count, size = facts["slice"]["tensors"], facts["slice"]["params"] / 1e6
    isa = f", {facts['isa']}" if facts["isa"] else ""
    threads = "" if facts["device"] != "cpu" else f"{facts['threads']} thread(s), "
    of = f"a LoRA of rank {facts['lora']} for the SDXL UNet" if facts["lora"] else "the SDXL UNet"
    return (
        f"{size:.1f}M {facts['dtype']} parameters in {count} tensors of {of}; {threads}"
        f"{facts['clock']}; up to {facts['rounds']} rounds; {facts['machine']}{isa}, "
        f"load {facts['load']}, torch {facts['torch']}"
    )


def judge(rows: "list[Row]", threads: int, isa: str | None) -> list[tuple[bool, str]]:
    """Every target that this run can judge -> (met, what was wanted and found).

    Times are judged on one thread, scaling on more.  An optimizer that was not measured misses its
    targets; an unknown instruction set is held to the strictest.
    """
    found = {row.name: row for row in rows if row.ours}
    verdicts = []
    for name, limits in SLICE_TARGETS.items():
        row, limit = found.get(name), limits.get(isa or "avx512")
        if row is None:
            verdicts.append((False, f"{name} was not measured"))
        elif threads > 1:
            scaling = row.scaling or 0.0
            line = f"{name}, {threads} threads: {scaling:.2f} >= {SCALING_TARGET} times one"
            verdicts.append((scaling >= SCALING_TARGET, line))
        elif limit is None:
            verdicts.append((False, f"{name} has no target for {isa}: use --isa avx2 or avx512"))
        else:
            tiny = row.tiny_ratio if row.tiny_ratio is not None else float("inf")
            verdicts.append((row.ratio <= limit, f"{name}: {row.ratio:.2f} <= {limit} x torch"))
            line = f"{name}, tiny tensors: {tiny:.2f} <= {TINY_TARGET} x torch"
            verdicts.append((tiny <= TINY_TARGET, line))
    return verdicts


class Progress:
    """A line on stderr after each candidate, with the time that the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.started = total, time.monotonic()

    def __call__(self, done: int, line: str) -> None:
        elapsed = time.monotonic() - self.started
        left = elapsed / done * (self.total - done)
        say(f"[{done}/{self.total}] {line}  ({elapsed:.0f} s, about {left:.0f} s left)")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
