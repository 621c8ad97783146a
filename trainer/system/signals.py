"""How a person or a scheduler stops a run: the first signal asks it to, the second forces it."""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Optional work was abandoned because a signal asks the run to stop."""


def leave_if(stop: Sequence[int]) -> None:
    """Raise `Stopped` once `stop` holds a signal."""
    if stop:
        raise Stopped


def end(number: int) -> NoReturn:
    """End the process with the status that shells report for a process ended by this signal."""
    raise SystemExit(128 + number)


def end_if(stop: Sequence[int], doing: str) -> None:
    """End the process, which was `doing` something, once `stop` holds a signal."""
    if stop:
        log.info("stopped while %s", doing)
        end(stop[0])


def leave_at_once(number: int, frame: Any) -> None:
    """A signal handler for when there is nothing to finish."""
    print("stopped", file=sys.stderr)
    end(number)


@contextmanager
def stop_signals(after: str = "this step") -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM, for the loop to stop `after` what it is at; a second one
    ends the process at once."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught:
            end(number)
        caught.append(number)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        log.warning("%s: stopping after %s; a second one quits now", name, after)

    handled = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, catch) for number in handled}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
