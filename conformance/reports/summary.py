"""The summary of a run that fits a comment on a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from conformance.harness.records import OUTCOMES
from conformance.harness.verdict import WORDS
from conformance.reports.diagnoses import (
    AMBIGUOUS,
    NAMED,
    Group,
    explanations,
    group_failures,
    observations,
)
from conformance.reports.markdown import bullets, code, escaped, fitting, some, table
from conformance.reports.outcomes import (
    cases_line,
    failed,
    known_failures,
    not_checked,
    partly_declined,
)
from conformance.reports.reader import Report

ENDS = (*OUTCOMES, "deselected", "missing")
"""Every way in which a requirement of the suite can end, in the order in which they are shown."""

FEWEST_GROUPS = 3
"""Groups of failures that are named in any case."""


def summary_markdown(report: Report, more: Iterable[str] = ()) -> str:
    """The summary in Markdown, of less than 60,000 bytes; ``more`` are lines of other sections."""
    more = list(more)
    return fitting(lambda most: "\n".join(_lines(report, more, most)))


def _lines(report: Report, more: list[str], most: int) -> list[str]:
    verdict, records = report.verdict, report.records
    implementation = report.header["implementation"]
    version = f" {code(implementation['version'])}" if implementation["version"] else ""
    return [
        f"## Conformance: {verdict.verdict}",
        "",
        f"{code(implementation['name'])}{version}: {escaped(verdict.why, 400)}.",
        "",
        *levels_table(verdict.counts["levels"]),
        "",
        f"{escaped(cases_line(verdict.counts))}.",
        *_failures(failed(records), most),
        *_known(known_failures(records), most),
        *_unchecked(report, most),
        "",
        *more,
        ran_on(report.header),
        "",
    ]


def levels_table(levels: Mapping[str, Mapping[str, int]]) -> list[str]:
    """How the requirements of each level ended, of how many."""
    rows = []
    for end in ENDS:
        numbers = [levels[level].get(end, 0) for level in ("core", "extended")]
        if any(numbers):
            sizes = (levels[level]["suite"] for level in ("core", "extended"))
            rows.append((WORDS[end], *(f"{n} of {size}" for n, size in zip(numbers, sizes))))
    return table(("", "core", "extended"), rows, right=2)


def _failures(red: list[Mapping[str, Any]], most: int) -> Iterable[str]:
    if not red:
        return
    yield from ("", "### Failed")
    groups = group_failures(red)
    shown = max(most, FEWEST_GROUPS)
    for group in groups[:shown]:
        yield from ("", f"**{_title(group)}** ({len(group.records)} of {len(red)} failed)", "")
        for each in group.explanations:
            named = f"{code(each.name)}: " if group.kind == AMBIGUOUS else ""
            correct = f" Correct: {escaped(each.correct, 400)}" if each.correct else ""
            source = f" Source: {escaped(each.source)}." if each.source else ""
            yield from (f"{named}{escaped(each.mechanism, 400)}{correct}{source}", "")
        yield from bullets(map(_failure, group.records), most)
    if rest := groups[shown:]:
        number = sum(len(group.records) for group in rest)
        yield from ("", f"… and {number} more failed, of {len(rest)} further explanations")


def _title(group: Group) -> str:
    if group.kind not in (NAMED, AMBIGUOUS):
        return group.title
    names = " or ".join(code(each.name) for each in group.explanations)
    return f"Looks like {names}" if group.kind == NAMED else f"Ambiguous: {names}"


def _failure(record: Mapping[str, Any]) -> str:
    seen = "" if explanations(record) else "; ".join(observations(record))
    return f"{code(record['id'])}: {code(record['reason'])}" + (f" {code(seen)}" if seen else "")


def _known(records: list[Mapping[str, Any]], most: int) -> Iterable[str]:
    if records:
        lines = (f"{code(record['id'])}: {escaped(record['reason'])}" for record in records)
        yield from ("", "### Known failures", "", *bullets(lines, most))


def _unchecked(report: Report, most: int) -> Iterable[str]:
    groups, counts = not_checked(report.records), report.verdict.counts
    missing = counts["planned"] - counts["reported"]
    lines = [
        f"{WORDS[outcome]}, {len(ids)}: {code(why)} ({some(ids)})" for outcome, why, ids in groups
    ]
    shown = bullets(lines, most) if lines else []
    if counts["deselected"]:
        shown.append(f"- deselected, {counts['deselected']}")
    if missing:
        shown.append(f"- never reported, {missing}")
    if shown:
        yield from ("", "### Not checked", "", *shown)
    parts = partly_declined(report.records)
    if parts:
        said = (f"{code(why)}: some cases of {n}" for why, n in sorted(parts.items()))
        yield from ("", "### Declined in part", "", *bullets(said, most))


def ran_on(first: Mapping[str, Any]) -> str:
    """One line of Markdown: versions, profile, platform and device of a run."""
    environment = first["environment"]
    names = ("python", "torch", "transformers", "hypothesis")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name))
    seed = f", seed {first['seed']}" if first["seed"] is not None else ""
    return escaped(
        f"model-conformance {first['suite_version']}, profile {first['profile']}{seed}; "
        f"{versions}; {environment['platform']}, {environment['device']}",
        400,
    )
