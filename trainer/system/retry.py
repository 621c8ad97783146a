"""Retrying reads from a drive that fails temporarily."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

# Temporary errors: of network drives, and of a process with too many open files.
_PASSING = {
    getattr(errno, name, errno.EIO)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EMFILE", "ENFILE", "ESTALE", "EREMOTEIO", "ETIMEDOUT"),
        *("ECONNRESET", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH"),
    )
}
_PAUSES = (0.5, 2.0, 8.0)  # seconds before each retry
_ENOUGH = 3  # reads that failed despite retries, after which none is retried
_hopeless: list[OSError] = []

Answer = TypeVar("Answer")


def reset() -> None:
    """Allow retries again after earlier failures: another run may use another drive."""
    _hopeless.clear()


def with_retries(ask: Callable[[], Answer]) -> Answer:
    """The result of `ask`, retried after temporary errors.  Raises OSError; at once, after several
    failures despite retries."""
    for pause in _PAUSES if len(_hopeless) < _ENOUGH else ():
        try:
            return ask()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            log.warning("%s; retrying in %g s", error, pause)
            time.sleep(pause)
    try:
        return ask()
    except OSError as error:
        if error.errno in _PASSING:
            _hopeless.append(error)
        raise
