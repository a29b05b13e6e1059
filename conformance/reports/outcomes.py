"""What there is to say of the records of a run: failures, what was not checked, and how near it was.

Every page and the terminal say the same things; they are put together here, without any markup.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from conformance.harness.records import (
    DECLINED,
    INCONCLUSIVE,
    KNOWN_FAILURE,
    NOT_OFFERED,
    NOT_RUN,
    PASS,
    RED,
)
from conformance.harness.verdict import WORDS, Plan, judge
from conformance.reports.reader import Report, slug_of

Record = Mapping[str, Any]

ONE = {**WORDS, KNOWN_FAILURE: "known failure"}
"""How a single requirement ended, in words."""

ABSENT = "not in the suite"
"""How a requirement ended that another report has and this one does not know."""

UNCHECKED = (NOT_OFFERED, DECLINED, INCONCLUSIVE, NOT_RUN)
"""Outcomes that say nothing about the implementation."""


def counts_line(counts: Mapping[str, Any]) -> str:
    """Counts of outcomes in one line, with the denominator."""
    shown = [f"{n} {WORDS[o]}" for o, n in counts["outcomes"].items() if n]
    if counts["deselected"]:
        shown.append(f"{counts['deselected']} deselected")
    missing = counts["planned"] - counts["reported"]
    if missing:
        shown.append(f"{missing} never reported")
    return f"{', '.join(shown) or 'nothing'}; {counts['suite']} requirements in the suite"


def cases_line(counts: Mapping[str, Any]) -> str:
    """Counts of cases and comparisons in one line."""
    lanes = ", ".join(f"{n} {lane}" for lane, n in sorted(counts["comparisons"].items()))
    cases = counts["cases"]
    executed = f"{cases['executed']} of {cases['drawn']} drawn cases executed"
    return f"{executed}; comparisons: {lanes or 'none'}"


def failed(records: Iterable[Record]) -> list[Record]:
    """The records that are red."""
    return [record for record in records if record["outcome"] in RED]


def known_failures(records: Iterable[Record]) -> list[Record]:
    """The records of known failures."""
    return [record for record in records if record["outcome"] == KNOWN_FAILURE]


def not_checked(records: Iterable[Record]) -> list[tuple[str, str, list[str]]]:
    """(outcome, reason, ids) for what did not run, requirements with one reason together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record["outcome"] in UNCHECKED:
            groups[record["outcome"], record["reason"]].append(record["id"])
    found = [(outcome, reason, ids) for (outcome, reason), ids in groups.items()]
    return sorted(found, key=lambda group: UNCHECKED.index(group[0]))


def never_reported(report: Report) -> list[str]:
    """Ids that were planned and have no record, in the order of the plan."""
    seen = {record["id"] for record in report.records}
    return [id for id in report.header["planned"] if id not in seen]


def deselected(report: Report) -> list[str]:
    """Slugs of the suite that the run did not plan."""
    planned = {slug_of(id) for id in report.header["planned"]}
    return [slug for slug in report.header["suite"] if slug not in planned]


def partly_declined(records: Iterable[Record]) -> dict[str, int]:
    """Reason to number of requirements that ran, though some of their cases were declined."""
    reasons: Counter[str] = Counter()
    for record in records:
        if record["executed"]:
            reasons.update(record["declined"].keys())
    return dict(reasons)


@dataclass(frozen=True)
class End:
    """How one requirement ended in one run, whether it has a record or not."""

    outcome: str
    record: Record | None = None

    @property
    def words(self) -> str:
        """The outcome in words."""
        return ONE.get(self.outcome, self.outcome)


def ends(report: Report) -> dict[str, End]:
    """How every requirement of the suite ended, by id; the planned ones first."""
    by_id = {record["id"]: record for record in report.records}
    found = {
        id: End(by_id[id]["outcome"], by_id[id]) if id in by_id else End("missing")
        for id in report.header["planned"]
    }
    return found | {slug: End("deselected") for slug in deselected(report)}


@dataclass(frozen=True)
class ContractCounts:
    """How the requirements of one contract ended."""

    contract: str
    counts: dict[str, Any]
    """As those of the footer, of this contract alone."""
    seconds: float

    def of(self, level: str, end: str) -> int:
        """How many requirements of a level ended so."""
        return self.counts["levels"][level].get(end, 0)

    def both(self, end: str) -> int:
        """How many requirements ended so."""
        return self.of("core", end) + self.of("extended", end)

    def suite(self, level: str) -> int:
        """How many requirements of a level the contract has."""
        return self.counts["levels"][level]["suite"]


def by_contract(report: Report) -> list[ContractCounts]:
    """Every contract of the suite with its counts, in the order of the names."""
    suite: dict[str, dict[str, str]] = defaultdict(dict)
    for slug, level in report.header["suite"].items():
        suite[slug.partition(".")[0]][slug] = level
    planned: dict[str, list[dict[str, str]]] = defaultdict(list)
    for id in report.header["planned"]:
        planned[id.partition(".")[0]].append({"id": id, "slug": slug_of(id)})
    records = defaultdict(list)
    for record in report.records:
        records[record["slug"].partition(".")[0]].append(record)
    return [
        ContractCounts(
            contract,
            judge(Plan(tuple(planned[contract]), suite[contract]), records[contract]).counts,
            sum(record["duration"] for record in records[contract]),
        )
        for contract in sorted(suite)
    ]


def passed_with_errors(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By contract what passed and was measured against a limit, the nearest to it first."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["outcome"] == PASS and record["closest"]:
            found[record["contract"]].append(record)
    return {
        contract: sorted(found[contract], key=lambda record: -record["closest"])
        for contract in sorted(found)
    }
