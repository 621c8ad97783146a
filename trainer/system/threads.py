"""Work that threads do ahead of the caller."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")

_WORKERS = min(8, os.cpu_count() or 1)


@contextmanager
def ahead(
    function: Callable[[Thing], Result], things: Iterable[Thing]
) -> Iterator[Iterator[Result]]:
    """`map` in threads, a few things ahead of the caller: decoders release the GIL.

    The threads end with the block.  (An iterator that ended them when it is collected might do so
    while Python holds one of its own locks on threads, and wait forever.)
    """
    pool = ThreadPoolExecutor(_WORKERS)

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for thing in things:
            waiting.append(pool.submit(function, thing))
            if len(waiting) > 2 * _WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
