"""What all commands do alike."""

import argparse
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from trainer.system import processes

_SECONDS_TO_REPORT = 10.0
_SECONDS_OF_SILENCE = 3.0


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


@contextmanager
def told_if_long(doing: str) -> Iterator[None]:
    """Print on stderr what is being done in the block, if it takes seconds."""
    timer = threading.Timer(
        _SECONDS_OF_SILENCE, lambda: print(f"{doing} ...", file=sys.stderr, flush=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_with_the_reader() -> None:
    """From now on, end silently when nobody reads the output any more: `... | head`."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def fail(message: str) -> NoReturn:
    """Print an error for the user and exit with status 2.

    What all processes of a run find is reported by the main one.  The others leave it the time to:
    as soon as one exits, torchrun ends all.  One that is still there has found it alone.
    """
    where = ""
    if not processes.is_main():
        time.sleep(_SECONDS_TO_REPORT)
        where = f" in process {processes.rank()}"
    print(f"error{where}: {message}", file=sys.stderr)
    raise SystemExit(2)
