"""What all commands do alike."""

import argparse
import math
import signal
import sys
from typing import NoReturn

from trainer.system import processes


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def end_with_the_reader() -> None:
    """From now on, end silently when nobody reads the output any more: `... | head`."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def fail(message: str) -> NoReturn:
    """Print an error for the user, once for all processes of a run, and exit with status 2."""
    if processes.is_main():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
