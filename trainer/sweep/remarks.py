"""Caveats of a comparison of runs: differences that mean nothing, or have other causes than the
optimizer."""

from collections import Counter
from collections.abc import Iterator, Sequence

from trainer.reporting.measure import EVAL, HOLDOUT, ended_well, got_worse
from trainer.sweep import paired
from trainer.sweep.runs import Comparison, Group, RunSummary, lr_of, optimizer_of
from trainer.wording import plural

# Losses before the first step that differ by a larger share were measured on other points.
_SAME = 0.01
_ENOUGH_SEEDS = 3
_NAMED = 8  # groups in a remark; of more the others are named
_WORST = 3  # runs in a remark that names the worst
_STEADY = 1.25  # slowest / fastest, above which equal steps are said to have varied


def of_runs(comparison: Comparison) -> Iterator[str]:
    """Remarks on these runs, a sentence or two each."""
    runs, groups = comparison.runs, comparison.groups
    for run in runs:
        if "error" in run:
            yield f"{comparison.name_of(run)} failed: {run['error'].splitlines()[0]}"
        elif run.get("times_run", 1) > 1:
            yield (
                f"{comparison.name_of(run)} was run {run['times_run']} times; the newest finished "
                "one counts"
            )
    yield from _of_worse(comparison)
    before = [run["eval_loss_before"] for run in runs if run.get("eval_loss_before") is not None]
    if before and max(before) > (1 + _SAME) * min(before):
        yield (
            "eval before differs: these losses are of another model, prediction or eval points "
            "(data, log.eval_points), and a lower one need not be better"
        )
    if before:
        yield from _of_quality(comparison)
    yield from _of_rates(comparison)
    yield from _of_picked(comparison)
    yield from _of_seeds(_best_of_each(comparison))
    yield from _of_ties(groups)
    if any(run.get("rollbacks") for run in runs):
        yield (
            "rollbacks: how often a run went back to a checkpoint, after which its rate is half of "
            "what it was; lr is the one before the first"
        )
    yield from of_speed(comparison)
    yield from _of_steps(comparison)
    yield from _of_memory(runs)
    if any(run.get("loss_spikes") is not None for run in runs):
        yield (
            "spikes: steps with a loss, relative to that before the first step at the same "
            "timesteps, above 3 times the median of the previous 50 (the first 10: above 3)"
        )
    if any(run.get("grad_norm_over_median") is not None for run in runs):
        yield (
            "norm/median: the largest gradient norm divided by the median of the previous 50 (the "
            "first 10: by their own)"
        )


def _of_worse(comparison: Comparison) -> Iterator[str]:
    """Which runs made the model worse."""
    worse = [
        f"{comparison.name_of(run)} ({run['eval_loss_before']:.4f}, then "
        f"{run['eval_loss_after']:.4f})"
        for run in comparison.runs
        if ended_well(run) and _got_worse(run)
    ]
    if worse:
        yield f"worse than before the first step, by eval: {', '.join(worse)}; lower their rates"


def _got_worse(run: RunSummary) -> bool:
    """Whether a run's loss grew; unknown is no.  (Losses of different prediction types are
    different quantities.)"""
    before, after = run.get("eval_loss_before"), run.get("eval_loss_after")
    if before is None or after is None:
        return False
    is_same = run.get("prediction_before") == run.get("prediction")
    return is_same and got_worse(before, after)


def _of_quality(comparison: Comparison) -> Iterator[str]:
    """Which pictures the losses are measured on, and which loss ranks the runs."""
    what = "eval is on training pictures"
    if comparison.measure is HOLDOUT:
        yield f"{what}, held out on others, which rank the runs"
        yield from _of_orders(comparison.groups)
    elif any(run.get("holdout_loss_after") is not None for run in comparison.runs):
        yield (
            f"{what}, held out on others; eval ranks the runs, because not all of them have "
            "held-out pictures"
        )
    else:
        yield (
            f"{what}, so a run that memorises them looks best; it ranks the runs (with "
            "data.holdout=8, held-out pictures do)"
        )


def _of_orders(groups: Sequence[Group]) -> Iterator[str]:
    """Whether the loss on training pictures would rank another group first."""
    best = min(groups, key=lambda group: group.place(EVAL))
    if best is not groups[0] and best.good:
        yield (
            f"by eval {best.name} would be the best ({best.loss_by(EVAL):.4f}, and "
            f"{groups[0].name} {groups[0].loss_by(EVAL):.4f}): it learned the training pictures "
            "better, but generalises less"
        )


def _of_rates(comparison: Comparison) -> Iterator[str]:
    """Several optimizers were compared at one learning rate each."""
    rates = [
        {lr_of(run) for group in tried for run in group.runs}
        for tried in comparison.rivals.values()
    ]
    is_of_several = len(set(map(optimizer_of, comparison.runs))) > 1
    if is_of_several and all(len(tried - {None}) < 2 for tried in rates):
        yield (
            "each optimizer ran at one learning rate; another may be better, and may change the "
            "order; try a third and three times each rate (-m optim=... optim.lr=...)"
        )


def _best_of_each(comparison: Comparison) -> Sequence[Group]:
    """Each optimizer at its best rate; all rates if there is only one optimizer."""
    rivals = comparison.rivals
    return [tried[0] for tried in rivals.values()] if len(rivals) > 1 else comparison.groups


def _of_picked(comparison: Comparison) -> Iterator[str]:
    """Best rates were selected on the same seeds that are reported."""
    most = max(len({group.lr for group in tried}) for tried in comparison.rivals.values())
    if most > 1:
        yield (
            f"each best rate is the best of those tried (up to {most}) on the seeds that are "
            "reported, so it looks better than it is, the more so the more rates were tried; rerun "
            "it with other seeds"
        )


def _of_seeds(groups: Sequence[Group]) -> Iterator[str]:
    """Few seeds decide the first place."""
    if len(groups) < 2 or not groups[1].good:
        return
    first, second = groups[:2]
    fewest = min(len(first.good), len(second.good))
    if fewest == 1:
        yield (
            "one seed does not show how much is chance: another may change the order (seed=0,1,2)"
        )
        return
    if fewest < _ENOUGH_SEEDS:
        yield f"a spread over {fewest} seeds is rough; use {_ENOUGH_SEEDS} or more"


def _of_ties(groups: Sequence[Group]) -> Iterator[str]:
    """Which groups may be as good as the first."""
    ratios = paired.ratios(groups)
    rows = 1 + sum(one is not None for one in ratios)
    if rows > 2:
        yield (
            f"the intervals are of {rows} rows together: where all are equal, about one sweep in "
            "twenty shows any difference (Bonferroni, over all pairs); fewer rows or more seeds "
            "narrow them"
        )
    found = [(group.name, one) for group, one in zip(groups, ratios, strict=True) if one]
    tied = [name for name, one in found if not one.shows_one]
    worse = [name for name, one in found if one.shows_one]
    if tied:
        names = ", ".join(tied)
        if len(tied) > _NAMED:
            names = f"{len(tied)} of {len(found)}" + (
                f", all but {', '.join(worse)}" if worse else ""
            )
        yield (
            f"not shown to differ from the best, {groups[0].name}: {names} (the 95 % interval of "
            "the ratio with the same seeds contains 1)"
        )


def of_speed(comparison: Comparison) -> Iterator[str]:
    """Why speeds are not comparable; nothing if they are."""
    yield from _of_devices(comparison.runs)
    yield from _of_load(comparison)


def _of_devices(runs: Sequence[RunSummary]) -> Iterator[str]:
    """Speed and memory come from several devices."""
    devices = Counter(run["device"] for run in runs if "device" in run)
    if len(devices) > 1:
        counts = ", ".join(f"{count} on {device}" for device, count in devices.items())
        yield f"these runs were on several devices ({counts}): compare speed and memory on one"


def _estimates_curvature(run: RunSummary) -> bool:
    """Whether some of its steps have another backward pass, which is no `optimizer.step()`."""
    return run.get("config", {}).get("optim", {}).get("hessian_every") is not None


def _of_load(comparison: Comparison) -> Iterator[str]:
    """Equal work took different times, so speeds are not comparable.  Checked first for the rest of
    a step, which does not depend on the optimizer, then between seeds."""
    for alike in comparison.alike_but_for_optimizer:
        rest = {
            comparison.name_of(run): run["seconds_per_step"] - spent
            for run in filter(ended_well, alike)
            if (spent := run.get("optimizer_seconds_per_step")) and run.get("seconds_per_step")
            if not _estimates_curvature(run)
        }
        if len(rest) < 2:
            continue
        slow, fast = max(rest, key=rest.__getitem__), min(rest, key=rest.__getitem__)
        if rest[slow] > _STEADY * rest[fast] > 0:
            yield (
                f"without the optimizer, a step of {slow} took {rest[slow]:.3f} s and one of "
                f"{fast} {rest[fast]:.3f} s, though model and batch are the same: the machine had "
                "other load, so speeds are not comparable"
            )
            return
    for group in comparison.groups:
        times = [run["seconds_per_step"] for run in group.good if run.get("seconds_per_step")]
        if times and max(times) > _STEADY * min(times):
            yield (
                f"s/step of {group.name} is {max(times) / min(times):.1f} times as much with one "
                "seed as with another: the machine had other load, so speeds are not comparable"
            )
            return


def _of_steps(comparison: Comparison) -> Iterator[str]:
    """Step times vary within a run; the runs in which they do most are named."""
    uneven = {
        f"{comparison.name_of(run)} ({first:.3f} to {third:.3f})": third / first
        for run in filter(ended_well, comparison.runs)
        for first, third in [run.get("seconds_per_step_quartiles") or (0.0, 0.0)]
        if third > _STEADY * first > 0
    }
    if uneven:
        worst = sorted(uneven, key=uneven.__getitem__, reverse=True)[:_WORST]
        rest = len(uneven) - len(worst)
        yield (
            "s/step is a median; step times of these runs vary (quartiles), because the machine "
            "had other load or batches had several shapes: "
            + ", ".join(worst)
            + (f" and {plural(rest, 'other')}" if rest else "")
        )


def _of_memory(runs: Sequence[RunSummary]) -> Iterator[str]:
    if any(run.get("on_cpu") and run.get("runs_before_in_process") for run in runs):
        yield (
            "peak in training: these runs shared a process on a CPU, so a later one's peak "
            "includes what earlier ones left behind; compare the optimizer state, or run them "
            "separately"
        )
