"""The pages of several implementations side by side: ``report.html`` and ``summary.md``."""

from __future__ import annotations

from collections.abc import Iterable

from conformance.reports.diagnoses import explanations
from conformance.reports.files import PAGE, SUMMARY
from conformance.reports.markdown import bullets, code, fitting, some, table
from conformance.reports.outcomes import ABSENT, ONE, End
from conformance.reports.page import SYMBOLS, command_line, contract_bar, render, used_ends
from conformance.reports.several import Row, Several


def pages(several: Several) -> dict[str, str]:
    """The files by name."""
    return {PAGE: page(several), SUMMARY: summary(several)}


def page(several: Several) -> str:
    """The matrix as HTML: where they differ first."""
    return render(
        "several.html.j2",
        several=several,
        columns=list(zip(several.names, several.reports)),
        commands=[command_line(report.header) for report in several.reports],
        used_ends=used_ends([report.footer["counts"] for report in several.reports]),
        bar_of=contract_bar,
        looks_like=looks_like,
        words={**ONE, ABSENT: ABSENT},
        symbols={**SYMBOLS, ABSENT: "·"},
    )


def looks_like(end: End) -> str:
    """The known bugs that a failure looks like; empty where none is named."""
    named = explanations(end.record) if end.record else ()
    return " or ".join(each.name for each in named)


def summary(several: Several) -> str:
    """The matrix as Markdown that fits a comment."""
    return fitting(lambda most: "\n".join(_lines(several, most)))


def _lines(several: Several, most: int) -> Iterable[str]:
    yield from (f"## Conformance of {len(several.reports)} implementations", "")
    yield from table(("implementation", "verdict", "core", "extended"), _verdicts(several), right=2)
    rows = several.disagreements
    yield from ("", "### Where they disagree", "")
    if rows:
        heads = ("requirement", *map(code, several.names))
        yield from table(heads, ((code(row.id), *map(_cell, row.ends)) for row in rows[:most]))
        if len(rows) > most:
            yield from ("", f"… and {len(rows) - most} more")
    else:
        yield "No requirement is broken by some and kept by others."
    if both := several.broken_by_all:
        yield from ("", "### Broken by all", "")
        yield from bullets((code(row.id) for row in both), most)
    if groups := several.checked_differently:
        yield from ("", "### Checked for some of them", "")
        yield from bullets((_pattern(several, rows) for rows in groups.values()), most)
    yield ""


def _verdicts(several: Several) -> Iterable[tuple[str, ...]]:
    for name, report in zip(several.names, several.reports):
        levels = report.footer["counts"]["levels"]
        passed = (f"{each.get('pass', 0)} of {each['suite']}" for each in levels.values())
        yield (code(name), report.footer["verdict"], *passed)


def _cell(end: End) -> str:
    symbol = SYMBOLS.get(end.outcome, "·")
    named = looks_like(end)
    return f"{symbol} {end.words}" + (f" ({code(named)})" if named else "")


def _pattern(several: Several, rows: list[Row]) -> str:
    told = ", ".join(f"{code(name)} {end.words}" for name, end in zip(several.names, rows[0].ends))
    return f"{len(rows)}: {told} ({some([row.id for row in rows])})"
