"""The end of a run in a terminal: few lines, however much failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.harness.verdict import WORDS, Verdict
from conformance.reports.diagnoses import AMBIGUOUS, NAMED, group_failures
from conformance.reports.outcomes import (
    cases_line,
    counts_line,
    failed,
    known_failures,
    not_checked,
    partly_declined,
)

MOST_LINES = 40
"""Lines of one kind that are shown before it says how many more there are."""

COLOURS = {"pass": "green", "partial": "yellow", "fail": "red", "inconclusive": "yellow"}


def terminal_lines(records: list[Mapping[str, Any]], verdict: Verdict) -> list[tuple[str, str]]:
    """(colour, line) for the end of a run in a terminal; compact."""
    lines = [(COLOURS[verdict.verdict], f"verdict {verdict.line}")]
    lines.append(("", f"counts  {counts_line(verdict.counts)}"))
    lines.append(("", f"cases   {cases_line(verdict.counts)}"))
    red = failed(records)
    for record in red[:MOST_LINES]:
        lines.append(("red", f"failed  {record['id']} - {plain(record['reason'])}"))
    if len(red) > MOST_LINES:
        lines.append(("red", f"failed  … and {len(red) - MOST_LINES} more"))
    for group in group_failures(red):
        if group.kind in (NAMED, AMBIGUOUS):
            names = " or ".join(each.name for each in group.explanations)
            number = len(group.records)
            lines.append(("", f"looks like {plain(names)}: {number} of {len(red)} failed"))
    for record in known_failures(records)[:MOST_LINES]:
        lines.append(("yellow", f"known   {record['id']} - {plain(record['reason'])}"))
    for outcome, why, ids in not_checked(records)[:MOST_LINES]:
        what = ids[0] if len(ids) == 1 else f"{len(ids)} requirements"
        lines.append(("yellow", f"{WORDS[outcome]}: {what}: {plain(why)}"))
    for why, number in sorted(partly_declined(records).items())[:MOST_LINES]:
        plural = "s" * (number != 1)
        lines.append(("", f"declined in part: {number} requirement{plural}: {plain(why)}"))
    return lines


def plain(text: str, width: int = 160) -> str:
    """A text as one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
