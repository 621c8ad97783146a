"""What a person sees of a run while it goes on: messages and progress."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)
logging.raiseExceptions = False  # a log file on a full disk must not print tracebacks of its own


class Progress:
    """A bar with loss, images/s and ETA on a terminal; in a log file a line now and then."""

    def __init__(self, step: int, steps: int) -> None:
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, loss: float, images_per_second: float, seconds_left: float) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.1f} images/s")
            return
        minutes, seconds = divmod(round(seconds_left), 60)
        form = "step %d/%d  loss %.4f  %.1f images/s  ETA %d:%02d"
        log.info(form, step, self._bar.total, loss, images_per_second, minutes, seconds)

    def close(self) -> None:
        self._bar.close()


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
        file.emit(logging.makeLogRecord({"levelname": "ERROR", "msg": f"the run ended: {error}"}))
        raise
    finally:
        root.setLevel(previous)
        for handler in (console, file):
            root.removeHandler(handler)
        file.close()
