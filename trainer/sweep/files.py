"""The results of a sweep for other programs: CSV, JSON and LaTeX."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from trainer.sweep import markdown, paired, remarks, verdict
from trainer.sweep.runs import Comparison, Group, RunSummary, optimizer_of
from trainer.sweep.table import tables

_TEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "|": r"\textbar{}",  # TeX's older fonts have other characters in the places of these
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def as_csv(runs: Sequence[RunSummary]) -> str:
    """One row per run, best first; the columns are those of all summaries."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(grid(runs))
    return text.getvalue()


def grid(runs: Sequence[RunSummary]) -> list[list[Any]]:
    """A row of titles, then one per run, best first: numbers, words and None."""
    rows = _rows(Comparison(runs))
    titles = [*dict.fromkeys(key for row in rows for key in row)]
    return [titles, *([_cell(row.get(title)) for title in titles] for row in rows)]


def as_json(runs: Sequence[RunSummary]) -> str:
    """The ranking metric, the verdict, the runs and groups over seeds, both best first, and the
    remarks.  Final losses that are not finite are null."""
    comparison = Comparison(runs)
    groups = comparison.groups
    content = {
        "ranked_by": comparison.measure.metric,
        "verdict": verdict.of_runs(comparison),
        "runs": _rows(comparison),
        "over_seeds": [
            _of_group(group, ratio)
            for group, ratio in zip(groups, paired.ratios(groups), strict=True)
        ],
        "remarks": [*remarks.of_runs(comparison)],
    }
    return json.dumps(content, indent=2) + "\n"


def as_latex(runs: Sequence[RunSummary]) -> str:
    """The tables of sweep.md, each as a booktabs tabular."""
    return "% \\usepackage{booktabs}\n" + "\n".join(map(_tabular, tables(Comparison(runs))))


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Summaries with their runs' names, without the (long) configurations, which are in the
    folders."""
    return [
        {
            "run": comparison.name_of(run),
            "folder": run["folder"],
            "final_loss": _finite(comparison.loss(run)),
            **{key: value for key, value in run.items() if key != "config"},
            "optimizer": optimizer_of(run),
        }
        for run in comparison.runs
    ]


def _cell(value: Any) -> Any:
    """Lists become words separated by spaces."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _of_group(group: Group, ratio: paired.Ratio | None) -> dict[str, Any]:
    return {
        "name": group.name,
        "lr": group.lr,
        "runs": len(group.runs),
        "ended_well": len(group.good),
        "final_loss": _finite(group.loss),
        "standard_deviation": group.spread if len(group.good) > 1 else None,
        "over_the_best": ratio
        and {
            "mean": _finite(ratio.mean),
            "interval": [_finite(bound) for bound in ratio.interval],
            "seeds": ratio.count,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tabular(table: markdown.Table) -> str:
    titles, *rows = ([*map(_escaped, row)] for row in table.rows)
    columns = "".join("l" if is_left else "r" for is_left in table.is_left)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _line(titles), r"\midrule"]
    return "\n".join([*lines, *map(_line, rows), r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
