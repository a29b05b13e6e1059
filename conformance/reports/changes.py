"""What changed between two runs: what fails now, what is fixed, and what is checked no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conformance.harness.records import EXECUTED, KNOWN_FAILURE, PASS, RED
from conformance.reports.diagnoses import explanations
from conformance.reports.outcomes import ABSENT, End, ends
from conformance.reports.reader import Report

NEWLY_FAILING = "newly failing"
NOW_KNOWN = "newly a known failure"
NO_LONGER_CHECKED = "no longer checked"
DECLINES_MORE = "declining more"
FIXED = "fixed"
NEWLY_CHECKED = "newly checked"
TOLERATED = "entered in the ledger"
FAILS_DIFFERENTLY = "failing differently"
UNCHECKED_DIFFERENTLY = "unchecked for another reason"
OTHER_COUNTS = "passing with other counts"

MEANINGS = {
    NEWLY_FAILING: "they did not fail before",
    NOW_KNOWN: "they passed before",
    NO_LONGER_CHECKED: "they were executed before",
    DECLINES_MORE: "they pass, but decline cases that they took before",
    FIXED: "they failed before, and pass",
    NEWLY_CHECKED: "they were not executed before, and pass",
    TOLERATED: "they failed before as well",
    FAILS_DIFFERENTLY: "another diagnosis or another kind of failure",
    UNCHECKED_DIFFERENTLY: "they were not executed before either",
    OTHER_COUNTS: "they pass as before",
}
"""Kinds of change in the order in which they are shown, and what each means."""

WORSE = frozenset({NEWLY_FAILING, NOW_KNOWN, NO_LONGER_CHECKED, DECLINES_MORE})
BETTER = frozenset({FIXED, NEWLY_CHECKED})


@dataclass(frozen=True)
class Change:
    """What changed of one requirement."""

    id: str
    kind: str
    before: str
    after: str
    why: str


@dataclass(frozen=True)
class Changes:
    """What changed between two runs."""

    before: Report
    after: Report
    changes: list[Change]
    notes: list[str]

    @property
    def worse(self) -> list[Change]:
        """The changes to the worse."""
        return [change for change in self.changes if change.kind in WORSE]

    def of(self, kind: str) -> list[Change]:
        """The changes of a kind."""
        return [change for change in self.changes if change.kind == kind]


def compare(before: Report, after: Report) -> Changes:
    """What changed from one run to another; runs that differ in more say so in their notes."""
    old, new = ends(before), ends(after)
    found = []
    for id in dict.fromkeys([*new, *old]):
        change = _change(id, old.get(id, End(ABSENT)), new.get(id, End(ABSENT)))
        if change is not None:
            found.append(change)
    order = list(MEANINGS)
    found.sort(key=lambda change: order.index(change.kind))
    return Changes(before, after, found, _notes(before, after))


def _change(id: str, old: End, new: End) -> Change | None:
    kind = _kind(old, new)
    if kind is None:
        return None
    record = new.record or {}
    if kind == OTHER_COUNTS:
        why = "; ".join(f"{_counted(end.record)} {when}" for end, when in _both(old, new))
    elif kind == FAILS_DIFFERENTLY:
        why = f"{_how(new.record)}; before: {_how(old.record)}"
    elif kind == DECLINES_MORE:
        why = ", ".join(_new_reasons(old.record, new.record))
    else:
        named = _how(new.record) if new.outcome in RED and explanations(record) else ""
        why = "; ".join(filter(None, (named, record.get("reason", ""))))
    return Change(id, kind, old.words, new.words, why)


def _both(old: End, new: End) -> tuple[tuple[End, str], ...]:
    return (old, "before"), (new, "now")


def _kind(old: End, new: End) -> str | None:
    if new.outcome in RED:
        if old.outcome not in RED:
            return NEWLY_FAILING
        return FAILS_DIFFERENTLY if _how(old.record) != _how(new.record) else None
    if new.outcome == KNOWN_FAILURE:
        if old.outcome == KNOWN_FAILURE:
            return FAILS_DIFFERENTLY if _how(old.record) != _how(new.record) else None
        return TOLERATED if old.outcome in RED else NOW_KNOWN
    if new.outcome == PASS:
        if old.outcome in RED or old.outcome == KNOWN_FAILURE:
            return FIXED
        if old.outcome != PASS:
            return NEWLY_CHECKED
        if _new_reasons(old.record, new.record):
            return DECLINES_MORE
        return OTHER_COUNTS if _counted(old.record) != _counted(new.record) else None
    if old.outcome in EXECUTED or old.outcome in RED:
        return NO_LONGER_CHECKED
    same = (old.outcome, _reason(old)) == (new.outcome, _reason(new))
    return None if same else UNCHECKED_DIFFERENTLY


def _how(record: Mapping[str, Any] | None) -> str:
    """How a requirement fails: the known bugs that it looks like, else the kind of failure."""
    record = record or {}
    named = explanations(record)
    if named:
        return f"looks like {' or '.join(sorted(each.name for each in named))}"
    return (record.get("failure") or {}).get("kind") or record.get("outcome", "")


def _reason(end: End) -> str:
    return end.record["reason"] if end.record else ""


def _new_reasons(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    return [reason for reason in (new or {})["declined"] if reason not in (old or {})["declined"]]


def _counted(record: Mapping[str, Any] | None) -> str:
    record = record or {"executed": 0, "comparisons": {}}
    lanes = ", ".join(f"{n} {lane}" for lane, n in sorted(record["comparisons"].items()) if n)
    return f"{record['executed']} cases, {lanes or 'no'} comparisons"


def _notes(before: Report, after: Report) -> list[str]:
    """In what the runs themselves differ, in sentences."""
    pairs = [
        ("suite version", "suite_version"),
        ("profile", "profile"),
        ("seed", "seed"),
        ("smoke", "smoke"),
    ]
    found = [(name, before.header[key], after.header[key]) for name, key in pairs]
    found.append(("implementation", before.name, after.name))
    old, new = before.header["environment"], after.header["environment"]
    for name in dict.fromkeys([*old, *new]):
        if name != "variables":
            found.append((name, old.get(name), new.get(name)))
    notes = [f"{name}: {a} before, {b} now" for name, a, b in found if a != b]
    gone = before.header["suite"].keys() - after.header["suite"].keys()
    added = after.header["suite"].keys() - before.header["suite"].keys()
    if gone:
        notes.append(f"{len(gone)} requirements left the suite")
    if added:
        notes.append(f"{len(added)} requirements are new in the suite")
    return notes
