"""What a sweep's runs have in common, so that its tables can be understood on their own."""

from collections.abc import Sequence
from typing import Any

from trainer.sweep.runs import Summary

_NAMED = 8  # missing runs that are named; the rest is counted


def head(name: str, runs: Sequence[Summary], missing: Sequence[str] = ()) -> str:
    """Markdown: a title, what was run, on what and when, the options that all runs share, and the
    runs that have not ended."""
    failed = sum("error" in run for run in runs)
    facts = [
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        + (f", {failed} of them failed" if failed else ""),
        _said([run for run in runs if "error" not in run] or runs, "steps", "{} steps"),
        _said(runs, "model", "model {}"),
        _said(runs, "method", "method {}"),
        _said(runs, "device", "on {}"),
        _dates(runs),
    ]
    shared = set.intersection(*(set(run["overrides"]) for run in runs))
    common = [o for o in runs[0]["overrides"] if o in shared]
    options = f"Shared options: `{' '.join(common)}`" if common else ""
    parts = [f"# {name}", "; ".join(fact for fact in facts if fact) + ".", options, left(missing)]
    return "\n\n".join(part for part in parts if part)


def _said(runs: Sequence[Summary], key: str, form: str) -> str:
    """The distinct values of a key."""
    values: list[Any] = sorted({run[key] for run in runs if run.get(key) is not None})
    return form.format(", ".join(map(str, values))) if values else ""


def _dates(runs: Sequence[Summary]) -> str:
    """When the first and the last run ended."""
    ended = sorted(run["ended"] for run in runs if "ended" in run)
    if not ended:
        return ""
    first, last = (time[:16].replace("T", " ") for time in (ended[0], ended[-1]))
    return f"ended {first}" if first == last else f"ended from {first} to {last}"


def left(missing: Sequence[str]) -> str:
    """Which runs of a sweep have not ended; "" if all have."""
    if not missing:
        return ""
    named = ", ".join(f"`{run}`" for run in missing[:_NAMED])
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return (
        f"Not ended, {len(missing)} of the planned runs: {named}{more}.  The command of the sweep, "
        "repeated with its hydra.sweep.dir=, runs them."
    )
