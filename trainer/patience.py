"""Reading from a drive that may not answer at once."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

# What passes: a network drive's, and that of a process that has too many files open.
_PASSING = {
    getattr(errno, name, errno.EIO)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EMFILE", "ENFILE", "ESTALE", "EREMOTEIO", "ETIMEDOUT"),
        *("ECONNRESET", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH"),
    )
}
_PAUSES = (0.5, 2.0, 8.0)  # seconds before it is tried again
_ENOUGH = 3  # failures that no pause helped, after which none is made
_hopeless: list[OSError] = []

Answer = TypeVar("Answer")


def renew() -> None:
    """Pause again whatever has failed before: another run may have another drive."""
    _hopeless.clear()


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What a file system answers, asked again where a drive could not.  Raises OSError; after some
    that no pause has helped, at once."""
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
