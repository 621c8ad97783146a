"""What the user sees during a run: messages and progress."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.errors import UserError
from trainer.system import processes
from trainer.wording import counted

log = logging.getLogger(__name__)
logging.raiseExceptions = False  # a log file on a full disk must not print tracebacks of its own

_REPORT_SECONDS = 30
# Without tqdm's own estimate of the time left, which only considers steps.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class Progress:
    """A bar with loss, images/s and ETA on a terminal; an occasional line in a log file."""

    def __init__(self, step: int, steps: int) -> None:
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            disable=None,  # no bar in a log file
            dynamic_ncols=True,
            bar_format=_BAR,
        )

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, loss: float, images_per_second: float, seconds_left: float) -> None:
        eta = duration(seconds_left)
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {images_per_second:.1f} images/s, ETA {eta}"
            )
            return
        message = "step %d/%d  loss %.4f  %.1f images/s  ETA %s"
        log.info(message, step, self._bar.total, loss, images_per_second, eta)

    def close(self) -> None:
        self._bar.close()


class Aside:
    """A bar for work between steps, removed when it is done; in a log file, a line before the work
    and one every half minute."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what = f"{what}: %d of {total} {unit}, ETA %s"
        hides = None if processes.is_main() else True  # None: in a log file
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", disable=hides, leave=False)
        self._began = self._reported = time.monotonic()
        self._done, self._total = 0, total
        if self._bar.disable and total:
            log.info("%s: %s", what, counted(total, unit))

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Count this many more as done."""
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        if self._bar.disable and now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            left = (now - self._began) / self._done * (self._total - self._done)
            log.info(self._what, self._done, duration(left))


def duration(seconds: float) -> str:
    """83.4 -> '1:23', and 12799 -> '3:33:19'."""
    whole, rest = divmod(round(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02d}:{rest:02d}" if hours else f"{whole}:{rest:02d}"


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send messages to the terminal, above the progress bar, and with their times to a file."""
    root = logging.getLogger()
    console = logging.StreamHandler(sys.stdout)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    previous = root.level
    root.setLevel(logging.INFO)
    for handler in (console, file):
        root.addHandler(handler)
    try:
        with logging_redirect_tqdm():
            yield
    except Exception as error:
        record: dict[str, object] = {"levelname": "ERROR", "msg": f"the run ended: {error}"}
        if not isinstance(error, UserError | OSError):
            record["exc_info"] = (type(error), error, error.__traceback__)
        file.emit(logging.makeLogRecord(record))
        raise
    finally:
        root.setLevel(previous)
        for handler in (console, file):
            root.removeHandler(handler)
        with suppress(OSError):  # a full disk must not hide what ended the run
            file.close()


@contextmanager
def muted(level: int) -> Iterator[None]:
    """Suppress messages up to this level."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
