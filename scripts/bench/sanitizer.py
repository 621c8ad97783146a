"""Small steps under NVIDIA's compute-sanitizer, where it is installed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.outcomes import Finding, Skip
from bench.subject import Subject

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
SANITIZER = "compute-sanitizer"
# cuda-core asks the driver for a thread's context, and "there is none" is an answer, no fault.
QUIET = ("--report-api-errors", "no")
FOUND = 9  # its exit status where it has found something


def is_clean(subject: Subject, deadline: float) -> Finding:
    """No access out of bounds, no race in shared memory, in a few small steps."""
    if shutil.which(SANITIZER) is None:
        raise Skip(f"{SANITIZER} is not installed")
    lines, wrong = [], []
    for tool in TOOLS:
        left = deadline - time.monotonic()
        try:
            done = _watched(tool, max(left, 1.0))
        except subprocess.TimeoutExpired:
            lines.append(f"{tool} was not through in {left:.0f} s")
            continue
        lines.append(f"{tool} {'clean' if done.returncode == 0 else 'not clean'}")
        if done.returncode == FOUND:
            wrong.append(f"{tool}:\n{done.stdout[-2000:]}")
        elif done.returncode:
            wrong.append(f"{tool} did not run (status {done.returncode}):\n{done.stderr[-2000:]}")
    if not any("clean" in line for line in lines):
        raise Skip("; ".join(lines))
    return Finding(holds=not wrong, line="; ".join(lines), facts={"reports": wrong})


def _watched(tool: str, seconds: float) -> "subprocess.CompletedProcess[str]":
    """Small steps in a process that the tool watches."""
    paths = [str(ROOT / "scripts"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; from bench import checks; checks.small_steps()"
    watcher = [SANITIZER, "--tool", tool, *QUIET, "--error-exitcode", str(FOUND)]
    return subprocess.run(
        [*watcher, sys.executable, "-c", code],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that bounds are tensors'
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
