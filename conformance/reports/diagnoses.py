"""Failures that have one explanation, together.

A record's ``diagnosis`` names the known bugs that compute what the implementation computed. What one
of them explains stands under its name; several that fit are an ambiguity, and are shown as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.harness.records import ERROR, LEDGER_MISMATCH

NAMED, AMBIGUOUS, SEEN, UNEXPLAINED, LEDGER, HARNESS = (
    "named",
    "ambiguous",
    "seen",
    "unexplained",
    "ledger",
    "harness",
)
KINDS = (NAMED, AMBIGUOUS, SEEN, UNEXPLAINED, LEDGER, HARNESS)
"""In the order in which they are shown."""

TITLES = {
    SEEN: "No known bug fits; what was seen",
    UNEXPLAINED: "Not explained",
    LEDGER: "Not as in the ledger of known failures",
    HARNESS: "The harness broke: nothing is said about the implementation",
}


@dataclass(frozen=True)
class Explanation:
    """One known bug, or two that fit together."""

    bugs: tuple[str, ...]
    mechanism: str
    correct: str
    source: str

    @property
    def name(self) -> str:
        """Its ids: ``a``, or ``a and b``."""
        return " and ".join(self.bugs)


@dataclass
class Group:
    """Failures that are explained alike."""

    kind: str
    explanations: tuple[Explanation, ...] = ()
    records: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """A heading: ``looks like a``, ``a or b``, or what kind of group it is."""
        if self.kind == NAMED:
            return f"Looks like {self.explanations[0].name}"
        if self.kind == AMBIGUOUS:
            return f"Ambiguous: {' or '.join(each.name for each in self.explanations)}"
        return TITLES[self.kind]


def explanations(record: Mapping[str, Any]) -> tuple[Explanation, ...]:
    """The known bugs that a record's diagnosis names."""
    diagnosis = record.get("diagnosis") or {}
    found = []
    for named in diagnosis.get("named") or ():
        bugs = tuple(map(str, named.get("bugs") or ()))
        if bugs:
            texts = (str(named.get(name) or "") for name in ("mechanism", "correct", "source"))
            found.append(Explanation(bugs, *texts))
    return tuple(found)


def observations(record: Mapping[str, Any]) -> list[str]:
    """What was seen of a failure, where no known bug is named."""
    return [str(line) for line in (record.get("diagnosis") or {}).get("seen") or ()]


def group_failures(records: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Every failure in one group; the kinds in their order, and there the largest group first."""
    groups: dict[tuple, Group] = {}
    for record in records:
        kind, found = _kind(record)
        key = (kind, tuple(sorted(each.bugs for each in found)))
        groups.setdefault(key, Group(kind, found)).records.append(record)
    return sorted(groups.values(), key=lambda group: (KINDS.index(group.kind), -len(group.records)))


def _kind(record: Mapping[str, Any]) -> tuple[str, tuple[Explanation, ...]]:
    if record["outcome"] == ERROR:
        return HARNESS, ()
    if record["outcome"] == LEDGER_MISMATCH:
        return LEDGER, ()
    found = explanations(record)
    if found:
        return (NAMED if len(found) == 1 else AMBIGUOUS), found
    return (SEEN if observations(record) else UNEXPLAINED), ()


def tally(groups: Iterable[Group]) -> dict[str, int]:
    """Number of failures by kind of group."""
    counted: dict[str, int] = defaultdict(int)
    for group in groups:
        counted[group.kind] += len(group.records)
    return dict(counted)
