"""Hashes of weights, cached by each file's size and modification time."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.system import disk

_MEMO = "fingerprints.json"


def remembered(
    what: dict[str, Any], files: list[Path], cache: Path | None, compute: Callable[[], str]
) -> str:
    """`compute()`, or its earlier result for the same `what` and files (path, size, time).

    `cache` is the folder of the memo; with None nothing is remembered.
    """
    if cache is None:
        return compute()
    stats = [(str(path.resolve()), path.stat()) for path in files]
    key = json.dumps(
        [what, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]], sort_keys=True
    )
    memo = _read(cache / _MEMO)
    if key not in memo:
        memo[key] = compute()
        with suppress(OSError):  # read-only cache or full disk: it will be computed again
            cache.mkdir(parents=True, exist_ok=True)
            disk.replace_text(cache / _MEMO, json.dumps(_read(cache / _MEMO) | memo, indent=0))
    return memo[key]


def _read(path: Path) -> dict[str, str]:
    """The memo; {} if it is damaged or missing."""
    try:
        memo = json.loads(path.read_text(encoding="utf-8"))
        return memo if isinstance(memo, dict) else {}
    except (OSError, ValueError):
        return {}
