"""The tables of a sweep: its runs, groups over seeds, and each optimizer's best rate.

Best is the lowest final loss of the exported weights (`trainer.reporting.measure`).
"""

from collections.abc import Sequence
from statistics import mean, stdev

from trainer.reporting.measure import EVAL
from trainer.sweep import markdown, paired, remarks, verdict
from trainer.sweep.markdown import Table
from trainer.sweep.runs import Comparison, Group, Summary, lr_of, seed_of

Column = tuple[str, str, str]  # title, key in summary.json, format

_COLUMNS: tuple[Column, ...] = (
    ("eval before", "eval_loss_before", "{:.4f}"),
    ("eval after", "eval_loss_after", "{:.4f}"),
    ("held out before", "holdout_loss_before", "{:.4f}"),
    ("held out", "holdout_loss_after", "{:.4f}"),
    ("averaged weights", "ema_loss_after", "{:.4f}"),
    ("s/step", "seconds_per_step", "{:.3f}"),
    ("optimizer s/step", "optimizer_seconds_per_step", "{:.4f}"),
    ("images/s", "images_per_second", "{:.1f}"),
    ("total seconds", "wall_seconds", "{:.0f}"),
    ("optimizer state", "optimizer_state_bytes", "bytes"),
    ("planned peak", "planned_training_bytes", "bytes"),
    ("peak in training", "peak_training_bytes", "bytes"),
    ("skipped", "skipped_steps", "{}"),
    ("spikes", "loss_spikes", "{}"),
    ("diverged", "diverged", "{:d}"),
    ("norm/median", "grad_norm_over_median", "{:.1f}"),
)
_NOT_IN_ALL = {
    "holdout_loss_before",
    "holdout_loss_after",
    "diverged",
    "ema_loss_after",
    "optimizer_seconds_per_step",
    "loss_spikes",
    "planned_training_bytes",
    "grad_norm_over_median",
}
_NOT_OVER_SEEDS = {"eval before", "held out before", "total seconds"}
_LARGEST = {"optimizer state", "planned peak", "peak in training", "norm/median"}
_COSTS = {"s/step", "optimizer state", "peak in training"}  # independent of the learning rate
_IN_ALL = {"skipped", "spikes", "diverged"}
RATE_FORM = "{:g}"


def sweep_table(runs: Sequence[Summary]) -> str:
    """Markdown tables of run summaries: the runs, best first and failed last; then remarks; then
    groups over seeds, and each optimizer at its best rate, if there is more than one.

    A run is named by the overrides that not all runs share.  Optional values get a column if any
    run has them.
    """
    comparison = Comparison(runs)
    first, *others = map(markdown.written, tables(comparison))
    said = "\n".join(f"- {remark}" for remark in remarks.of_runs(comparison))
    return "\n\n".join(part for part in (first, said, *others) if part)


def verdict_of(runs: Sequence[Summary]) -> str:
    """Which optimizer was better, as a Markdown list; "" if nothing can be said."""
    return "\n".join(f"- {line}" for line in verdict.of_runs(Comparison(runs)))


def tables(comparison: Comparison) -> list[Table]:
    """The tables of runs, over seeds, and of best rates; the last two if there are several."""
    values = [item for run in comparison.runs for item in run.items()]
    known = {key for key, value in values if value is not None and value is not False}
    columns = [c for c in _COLUMNS if c[1] in known or c[1] not in _NOT_IN_ALL]
    others = (_over_seeds(comparison, columns), _best_rates(comparison, columns))
    return [_of_runs(comparison, columns), *filter(None, others)]


def _of_runs(comparison: Comparison, columns: Sequence[Column]) -> Table:
    rows = [["run", "lr", *(title for title, _, _ in columns)]]
    for run in comparison.runs:
        cells = [markdown.cell(run.get(key), form) for _, key, form in columns]
        if "error" in run:
            cells = ["failed", *[""] * (len(columns) - 1)]
        rows.append([comparison.name_of(run), _rate(run), *cells])
    return Table(rows=rows)


def _rate(run: Summary) -> str:
    """The learning rate, and the factor that the optimizer found for it, if any."""
    rate, found = lr_of(run), run.get("rate_found")
    return markdown.cell(rate, RATE_FORM) + ("" if found is None else f" x {found:.2g}")


def _over_seeds(comparison: Comparison, columns: Sequence[Column]) -> Table | None:
    """A table of groups over seeds; None if no group has several.  Cells are mean and standard
    deviation over the runs that ended well, the largest for memory and gradient norms, the sum for
    counts.  The ranking loss is followed by its paired ratio to the best group's."""
    groups = comparison.groups
    if all(len({seed_of(run) for run in group.runs}) < 2 for group in groups):
        return None
    columns = [column for column in columns if column[0] not in _NOT_OVER_SEEDS]
    titles, found = [title for title, _, _ in columns], paired.ratios(groups)
    place = titles.index(comparison.measure.title) + 1 if any(found) else None
    if place is not None:
        titles.insert(place, "over the best, 95 % interval")
    rows = [["over seeds", "ended well", "lr", *titles]]
    for group, ratio in zip(groups, found, strict=True):
        cells = [_over(group.good, column) for column in columns]
        if place is not None:
            cells.insert(place, str(ratio or ""))
        rate = markdown.cell(group.lr, RATE_FORM)
        rows.append([group.name, group.counted, rate, *(cells if group.good else _failed(cells))])
    return Table(rows=rows)


def _failed(cells: Sequence[str]) -> list[str]:
    return ["failed", *[""] * (len(cells) - 1)]


def _over(runs: Sequence[Summary], column: Column) -> str:
    """One cell for several runs; "" if any of them lacks the value."""
    title, key, form = column
    values = [value for run in runs if (value := run.get(key)) is not None]
    if not values or len(values) < len(runs):
        return ""
    if title in _LARGEST:
        return markdown.cell(max(values), form)
    if title in _IN_ALL:
        return markdown.cell(sum(values), form)
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def _best_rates(comparison: Comparison, columns: Sequence[Column]) -> Table | None:
    """A table of each optimizer, with its other options, at its best rate; None if rates were not
    swept.  A note marks a best rate that is the lowest or highest tried: others may be better."""
    measure, rivals = comparison.measure, comparison.rivals
    if all(len({group.lr for group in tried}) < 2 for tried in rivals.values()):
        return None
    wanted = {EVAL.title, measure.title, *_COSTS}
    columns = [column for column in columns if column[0] in wanted]
    titles = [title for title, _, _ in columns]
    rows = [["each at its best rate", "lr", *titles, "ended well", "rates tried", "note"]]
    for name, tried in rivals.items():
        best, rates = tried[0], sorted({group.lr for group in tried if group.lr is not None})
        row = [name, markdown.cell(best.lr, RATE_FORM)]
        cells = [_over(best.good, column) for column in columns]
        row += [*(cells if best.good else _failed(cells)), best.counted]
        rows.append([*row, ", ".join(map(RATE_FORM.format, rates)), _edge(best, rates)])
    return Table(rows=rows, words={"rates tried", "note"})


def _edge(best: Group, rates: Sequence[float]) -> str:
    """A note if the best rate is the only, lowest or highest one tried."""
    if not best.good or best.lr is None:
        return ""
    if len(rates) < 2:
        return "one rate only: another may be better"
    if best.lr == rates[0]:
        return "the lowest tried: a lower one may be better"
    return "the highest tried: a higher one may be better" if best.lr == rates[-1] else ""
