"""Check on a GPU that the fused optimizers give the CPU's results, reproducibly, without waiting
for the device and in few launches; and measure their speed.

    python scripts/gpu_check.py                          # everything, in at most eight minutes
    python scripts/gpu_check.py --quick                  # fewer cases, a small model
    python scripts/gpu_check.py --only compile parity
    python scripts/gpu_check.py --json gpu.json --markdown gpu.md

It runs from a checkout and only needs torch and cuda-core; our CPU engine, peers and
compute-sanitizer are used if installed.  Each section prints a line with PASS, FAIL or SKIPPED;
exit status: 1 if one failed, 2 without a GPU.
"""

import argparse
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a checkout that is not installed

import torch
from bench import checks, gpu_measures, graph, sanitizer
from bench.cases import CASES
from bench.outcomes import Section, as_json, markdown, run, status
from bench.subject import Subject

from optim import gpu

SECONDS = 480.0
NO_GPU = 2

# Every section: its claim, and the seconds that must be left for it to start.  These are
# conservative guesses; the report says how many it took.
CLAIMS = {
    "compile": ("every kernel compiles, and is kept on the disk", 30),
    "parity": ("CUDA computes what the CPU computes", 30),
    "repeat": ("the same bits again, on any stream, per parameter, resumed, copied", 20),
    "nonfinite": ("unusable gradient elements are skipped and counted", 10),
    "sync": ("a step never waits for the device", 10),
    "graph": ("a CUDA graph holds a training step", 10),
    "launches": (f"a step is at most {gpu_measures.MOST_LAUNCHES} launches", 30),
    "memory": ("a step needs no memory of a tensor's size", 20),
    "speed": ("a step is as fast as memory allows", 45),
    "waves": ("what smaller buckets would bring", 20),
    "sanitizer": ("compute-sanitizer finds nothing", 30),
}


def main(arguments: list[str] | None = None) -> int:
    """Check and report -> exit status."""
    args = parse(arguments)
    missing = nothing_to_check()
    if missing:
        print(f"gpu_check: {missing}", file=sys.stderr)
        return NO_GPU
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OPTIM_CACHE"] = folder  # empty, so that kernels are compiled
        os.environ.pop("OPTIM_BACKEND", None)  # check the kernels, whatever the user's setting
        device = torch.device("cuda", torch.cuda.current_device())
        facts = environment(device)
        outcomes = run(sections(Subject(device), args), args.seconds, say)
    text = markdown(outcomes, facts)
    print("\n" + text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps(as_json(outcomes, facts), indent=1) + "\n")
    return status(outcomes)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=CLAIMS, metavar="SECTION", help=f"of: {', '.join(CLAIMS)}")
    add("--peers", nargs="+", metavar="PACKAGE[/NAME]", help="default: all installed; none: none")
    add("--quick", action="store_true", help="fewer cases, 98M parameters, three rounds")
    add("--seconds", type=float, default=SECONDS, help="time limit for starting sections (480)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--markdown", type=Path, metavar="FILE", help="write the report")
    args = parser.parse_args(arguments)
    if args.seconds <= 0:
        parser.error("--seconds is more than 0")
    return args


def nothing_to_check() -> str | None:
    """Why nothing can be checked on this machine, or None."""
    if not torch.cuda.is_available():
        return f"there is no GPU that torch {torch.__version__} can use; nothing was checked"
    return gpu.unavailable()


def sections(subject: Subject, args: argparse.Namespace) -> list[Section]:
    """The chosen sections, in order."""
    cases = checks.REPEATED if args.quick else CASES
    unet = gpu_measures.Unet(subject.device, args.quick)
    part = functools.partial
    found = {
        "compile": part(checks.compiles, subject, cases),
        "parity": part(checks.agrees_with_the_cpu, subject, cases),
        "repeat": part(checks.repeats, subject, checks.REPEATED),
        "nonfinite": part(checks.skips_nonfinite, subject, checks.REPEATED),
        "sync": part(checks.never_waits, subject, checks.REPEATED),
        "graph": part(graph.is_captured, subject),
        "launches": part(gpu_measures.launches_are_few, subject, unet),
        "memory": part(gpu_measures.holds_nothing_large, subject, unet),
        "speed": part(gpu_measures.is_fast, subject, unet, args.peers),
        "waves": part(gpu_measures.waves, subject, unet),
        "sanitizer": part(sanitizer.is_clean, subject),
    }
    chosen = [name for name in CLAIMS if not args.only or name in args.only]
    return [Section(name, *CLAIMS[name], found[name]) for name in chosen]


def environment(device: torch.device) -> dict[str, Any]:
    """What the results depend on besides the code."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        "driver": driver(),
        "torch": torch.__version__,
        "cuda-core": _version("cuda-core"),
        "nvrtc": ".".join(map(str, _nvrtc_version())),
        "python": platform.python_version(),
        "CPU engine": "built" if Subject(device).native else "not built",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
    }


def driver() -> str:
    """The version of the driver, from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
