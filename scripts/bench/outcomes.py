"""Claims that are checked one after another: each with its verdict, its numbers and its time."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


class Skip(Exception):
    """What a claim needs is not here; the message says what."""


@dataclass(kw_only=True)
class Finding:
    """What a check found: whether its claim holds, a line of numbers, and more of them."""

    holds: bool
    line: str
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON file
    tables: list[str] = field(default_factory=list)  # Markdown


@dataclass(kw_only=True)
class Outcome:
    """A claim's verdict."""

    name: str
    claim: str
    verdict: str
    line: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A claim and what checks it: `check(deadline)`, a time of `time.monotonic()` by which it
    should be through.  `least` is the number of seconds without which it is not begun."""

    name: str
    claim: str
    least: float
    check: Callable[[float], Finding]


def run(sections: Sequence[Section], budget: float, report: Callable[[str], None]) -> list[Outcome]:
    """Check the claims, all of them whatever happens, within about `budget` seconds."""
    began = time.monotonic()
    outcomes = []
    for count, section in enumerate(sections, start=1):
        outcome = _outcome(section, began + budget)
        outcomes.append(outcome)
        elapsed = time.monotonic() - began
        report(
            f"[{count}/{len(sections)} {elapsed:4.0f} s] {outcome.verdict:7} {outcome.name}: "
            f"{outcome.line}"
        )
    return outcomes


def _outcome(section: Section, deadline: float) -> Outcome:
    began = time.monotonic()
    left = deadline - began
    facts, tables = {}, []
    try:
        if left < section.least:
            raise Skip(f"it needs {section.least:.0f} s, and {max(left, 0):.0f} s are left")
        finding = section.check(deadline)
        verdict, line = PASS if finding.holds else FAIL, finding.line
        facts, tables = finding.facts, finding.tables
    except Skip as reason:
        verdict, line = SKIPPED, str(reason)
    except Exception as error:  # one broken check must not cost the others
        verdict, line = FAIL, f"{type(error).__name__}: {error}".splitlines()[0]
        facts = {"traceback": traceback.format_exc()}
    return Outcome(
        name=section.name,
        claim=section.claim,
        verdict=verdict,
        line=line,
        seconds=time.monotonic() - began,
        facts=facts,
        tables=tables,
    )


def status(outcomes: Sequence[Outcome]) -> int:
    """The exit status: 1 where a claim failed."""
    return int(any(outcome.verdict == FAIL for outcome in outcomes))


def markdown(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """What ran, where, and every verdict; then the checks' own tables."""
    rows = [(x.name, x.claim, x.verdict, f"{x.seconds:.1f}", x.line) for x in outcomes]
    parts = ["\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts.append(table(("section", "claim", "verdict", "s", "found"), rows))
    for outcome in outcomes:
        parts += [f"**{outcome.name}**\n\n{text}" for text in outcome.tables]
        if "traceback" in outcome.facts:
            parts.append(f"**{outcome.name}**\n\n```\n{outcome.facts['traceback']}```")
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def as_json(outcomes: Sequence[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """The same as plain data."""
    return {**facts, "sections": [dataclasses.asdict(outcome) for outcome in outcomes]}
