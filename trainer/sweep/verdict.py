"""Which optimizer was better, in a few lines: by its loss, its memory, its speed, its stability.

Each is judged at its best rate; how stable it is, by all of its runs.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from trainer.reporting.measure import ended_well
from trainer.reporting.report import format_bytes
from trainer.sweep import markdown, paired, remarks
from trainer.sweep.runs import Comparison, Group
from trainer.wording import plural

_ALIKE = 1.1  # slowest / fastest, below which speeds are not told apart
_NAMED = 4  # of more the others are counted


def of_runs(comparison: Comparison) -> list[str]:
    """A line for each kind of quality; none unless two configurations ended well."""
    tried = comparison.rivals
    if len(tried) < 2:
        tried = {group.name: [group] for group in comparison.groups}
    firsts = (groups[0] for groups in tried.values())
    best = sorted(firsts, key=lambda group: group.place(comparison.measure))
    good = [group for group in best if group.good]
    if len(good) < 2:
        return []
    speed = _of_speed(comparison, good)
    lines = [_of_loss(comparison, good), _of_memory(good), speed, _of_stability(tried)]
    return [line for line in lines if line]


def _of_loss(comparison: Comparison, good: Sequence[Group]) -> str:
    predicted = {run["prediction"] for g in good for run in g.good if run.get("prediction")}
    if len(predicted) > 1:
        return (
            f"quality: not compared, as losses of {' and '.join(sorted(predicted))} are different "
            "quantities; compare the pictures"
        )
    winner, seeds = good[0], len(good[0].good)
    spread = f" ± {winner.spread:.4f} over {seeds} seeds" if seeds > 1 else ""
    title = comparison.measure.title
    line = (
        f"quality: the lowest loss ({title}) is that of `{winner.name}`, {winner.loss:.4f}{spread}"
    )
    groups = comparison.groups
    ratios = {id(g): ratio for g, ratio in zip(groups, paired.ratios(groups), strict=True)}
    known = [(g, ratio) for g in good[1:] if (ratio := ratios[id(g)])]
    if not known:
        return line
    worse = [g for g, ratio in known if ratio.shows_one]
    equal = [f"`{g.name}`" for g, ratio in known if not ratio.shows_one]
    if len(good) == 2:
        return line + f"; the other is {'' if worse else 'not '}shown to be worse"
    line += f"; {len(worse)} of {len(good) - 1} others are shown to be worse"
    return line + (f", not so {markdown.first(equal, _NAMED)}" if equal else "")


def _of_memory(good: Sequence[Group]) -> str:
    title = "memory: the smallest optimizer state is"
    if len({_mean(group, "optimizer_state_bytes") for group in good}) == 1:
        return ""
    return _least(title, good, "optimizer_state_bytes", lambda count: format_bytes(round(count)))


def _of_speed(comparison: Comparison, good: Sequence[Group]) -> str:
    key = "seconds_per_step"
    values = [value for group in good if (value := _mean(group, key)) is not None]
    if len(values) < len(good):
        return ""
    if any(remarks.of_speed(comparison)):
        return "speed: not comparable, for the reason among the remarks"
    if max(values) < _ALIKE * min(values):
        return f"speed: alike, {min(values):.3f} to {max(values):.3f} s/step"
    return _least("speed: the fastest step is", good, key, lambda x: f"{x:.3f} s")


def _least(what: str, good: Sequence[Group], key: str, written: Callable[[float], str]) -> str:
    """Which group has the least of something, and how much the best by its loss has."""
    values = [_mean(group, key) for group in good]
    known = [(value, group) for value, group in zip(values, good, strict=True) if value is not None]
    if len(known) < len(good):
        return ""
    least, group = min(known, key=lambda pair: pair[0])
    line = f"{what} that of `{group.name}`, {written(least)}"
    return line if group is good[0] else f"{line} (`{good[0].name}`: {written(known[0][0])})"


def _mean(group: Group, key: str) -> float | None:
    """Over the runs that ended well and have it; None if none has."""
    good: Sequence[Mapping[str, Any]] = group.good
    values = [run[key] for run in good if run.get(key) is not None]
    return mean(values) if values else None


def _of_stability(tried: Mapping[str, Sequence[Group]]) -> str:
    """Which optimizers had runs that failed, diverged, went back or skipped steps, at any rate."""
    unwell = []
    for name, groups in tried.items():
        runs = [run for group in groups for run in group.runs]
        counts = {
            "failed": sum(not ended_well(run) for run in runs),
            "diverged": sum(bool(run.get("diverged")) for run in runs if ended_well(run)),
            "with rollbacks": sum(bool(run.get("rollbacks")) for run in runs if ended_well(run)),
            "with skipped steps": sum(
                bool(run.get("skipped_steps")) for run in runs if ended_well(run)
            ),
        }
        told = [f"{count} {what}" for what, count in counts.items() if count]
        if told:
            unwell.append(f"`{name}` (of {plural(len(runs), 'run')}: {', '.join(told)})")
    if not unwell:
        return "stability: every run ended well; none diverged or skipped a step"
    return f"stability: not all runs went well of {markdown.first(unwell, _NAMED)}"
