"""The tables of a sweep: its runs, groups over seeds, and each optimizer's best rate.

Best is the lowest final loss of the exported weights (`trainer.reporting.measure`).
"""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from trainer.reporting.measure import EVAL
from trainer.sweep import markdown, paired, remarks, verdict
from trainer.sweep.markdown import Table
from trainer.sweep.runs import Comparison, Group, RunSummary, lr_of, seed_of


class Column(NamedTuple):
    """A value of the summaries in the tables."""

    title: str
    key: str  # in summary.json
    form: str  # as for `markdown.cell`
    over: Callable[[list[Any]], Any] | None = mean  # of a group's seeds; None: no column there
    is_optional: bool = False  # it has a column only if any run has it
    is_cost: bool = False  # independent of the learning rate: shown where the best is chosen


_COLUMNS = (
    Column("eval before", "eval_loss_before", "{:.4f}", over=None),
    Column("eval after", "eval_loss_after", "{:.4f}"),
    Column("held out before", "holdout_loss_before", "{:.4f}", over=None, is_optional=True),
    Column("held out", "holdout_loss_after", "{:.4f}", is_optional=True),
    Column("averaged weights", "ema_loss_after", "{:.4f}", is_optional=True),
    Column("s/step", "seconds_per_step", "{:.3f}", is_cost=True),
    Column("optimizer s/step", "optimizer_seconds_per_step", "{:.4f}", is_optional=True),
    Column("images/s", "images_per_second", "{:.1f}"),
    Column("total seconds", "wall_seconds", "{:.0f}", over=None),
    Column("optimizer state", "optimizer_state_bytes", "bytes", over=max, is_cost=True),
    Column("planned peak", "planned_training_bytes", "bytes", over=max, is_optional=True),
    Column("peak in training", "peak_training_bytes", "bytes", over=max, is_cost=True),
    Column("skipped", "skipped_steps", "{}", over=sum),
    Column("rollbacks", "rollbacks", "{}", over=sum, is_optional=True),
    Column("spikes", "loss_spikes", "{}", over=sum, is_optional=True),
    Column("diverged", "diverged", "{:d}", over=sum, is_optional=True),
    Column("norm/median", "grad_norm_over_median", "{:.1f}", over=max, is_optional=True),
)
_RATE_FORM = "{:g}"


def sweep_table(runs: Sequence[RunSummary]) -> str:
    """Markdown tables of run summaries: the runs, best first and failed last; then remarks; then
    groups over seeds, and each optimizer at its best rate, if there is more than one.

    A run is named by the overrides that not all runs share.  Optional values get a column if any
    run has them.
    """
    comparison = Comparison(runs)
    first, *others = map(markdown.written, tables(comparison))
    caveats = "\n".join(f"- {remark}" for remark in remarks.of_runs(comparison))
    return "\n\n".join(part for part in (first, caveats, *others) if part)


def verdict_of(runs: Sequence[RunSummary]) -> str:
    """Which optimizer was better, as a Markdown list; "" if nothing can be said."""
    return "\n".join(f"- {line}" for line in verdict.of_runs(Comparison(runs)))


def tables(comparison: Comparison) -> list[Table]:
    """The tables of runs, over seeds, and of best rates; the last two if there are several."""
    values = [item for run in comparison.runs for item in run.items()]
    known = {key for key, value in values if value is not None and value is not False}
    columns = [c for c in _COLUMNS if c.key in known or not c.is_optional]
    others = (_over_seeds(comparison, columns), _best_rates(comparison, columns))
    return [_of_runs(comparison, columns), *filter(None, others)]


def _of_runs(comparison: Comparison, columns: Sequence[Column]) -> Table:
    rows = [["run", "lr", *(column.title for column in columns)]]
    for run in comparison.runs:
        cells = [markdown.cell(run.get(column.key), column.form) for column in columns]
        cells = _failed(cells) if "error" in run else cells
        rows.append([comparison.name_of(run), _rate(run), *cells])
    return Table(rows=rows)


def _rate(run: RunSummary) -> str:
    """The learning rate, and the factor that the optimizer found for it, if any."""
    rate, found = lr_of(run), run.get("rate_found")
    return markdown.cell(rate, _RATE_FORM) + ("" if found is None else f" x {found:.2g}")


def _over_seeds(comparison: Comparison, columns: Sequence[Column]) -> Table | None:
    """A table of groups over seeds; None if no group has several.  Cells are mean and standard
    deviation over the runs that ended well, the largest for memory and gradient norms, the sum for
    counts.  The ranking loss is followed by its paired ratio to the best group's."""
    groups = comparison.groups
    if all(len({seed_of(run) for run in group.runs}) < 2 for group in groups):
        return None
    columns = [column for column in columns if column.over]
    titles, ratios = [column.title for column in columns], paired.ratios(groups)
    place = titles.index(comparison.measure.title) + 1 if any(ratios) else None
    if place is not None:
        titles.insert(place, "over the best, 95 % interval")
    rows = [["over seeds", "ended well", "lr", *titles]]
    for group, ratio in zip(groups, ratios, strict=True):
        cells = [_over(group.good, column) for column in columns]
        if place is not None:
            cells.insert(place, str(ratio or ""))
        rate = markdown.cell(group.lr, _RATE_FORM)
        rows.append([group.name, group.counted, rate, *(cells if group.good else _failed(cells))])
    return Table(rows=rows)


def _failed(cells: Sequence[str]) -> list[str]:
    return ["failed", *[""] * (len(cells) - 1)]


def _over(runs: Sequence[RunSummary], column: Column) -> str:
    """One cell for several runs; "" if any of them lacks the value."""
    over = column.over
    values: list[Any] = [x for run in runs if (x := run.get(column.key)) is not None]
    if over is None or not values or len(values) < len(runs):
        return ""
    has_spread = over is mean and len(values) > 1
    spread = f" ± {markdown.cell(stdev(values), column.form)}" if has_spread else ""
    return markdown.cell(over(values), column.form) + spread


def _best_rates(comparison: Comparison, columns: Sequence[Column]) -> Table | None:
    """A table of each optimizer, with its other options, at its best rate; None if rates were not
    swept.  A note marks a best rate that is the lowest or highest tried: others may be better."""
    measure, rivals = comparison.measure, comparison.rivals
    if all(len({group.lr for group in tried}) < 2 for tried in rivals.values()):
        return None
    wanted = {EVAL.title, measure.title}
    columns = [column for column in columns if column.title in wanted or column.is_cost]
    titles = [column.title for column in columns]
    rows = [["each at its best rate", "lr", *titles, "ended well", "rates tried", "note"]]
    for name, tried in rivals.items():
        best, rates = tried[0], sorted({group.lr for group in tried if group.lr is not None})
        row = [name, markdown.cell(best.lr, _RATE_FORM)]
        cells = [_over(best.good, column) for column in columns]
        row += [*(cells if best.good else _failed(cells)), best.counted]
        rows.append([*row, ", ".join(map(_RATE_FORM.format, rates)), _edge(best, rates)])
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
