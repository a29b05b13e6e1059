"""Several implementations side by side, requirement by requirement. None of them gets a rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance.harness.records import KNOWN_FAILURE, RED
from conformance.reports.outcomes import ABSENT, ContractCounts, End, by_contract, ends
from conformance.reports.reader import Report, ReportError, slug_of


class CannotCompare(ReportError):
    """The reports are not of the same requirements."""


@dataclass(frozen=True)
class Row:
    """How one requirement ended in each report."""

    id: str
    level: str
    ends: tuple[End, ...]

    @property
    def pattern(self) -> tuple[str, ...]:
        """The outcomes."""
        return tuple(end.outcome for end in self.ends)

    @property
    def differs(self) -> bool:
        """Whether they did not all end alike."""
        return len(set(self.pattern)) > 1

    @property
    def fails_somewhere(self) -> bool:
        """Whether an implementation breaks the rule."""
        return any(end.outcome in RED or end.outcome == KNOWN_FAILURE for end in self.ends)


@dataclass(frozen=True)
class Several:
    """Reports of the same requirements, side by side."""

    reports: tuple[Report, ...]
    names: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def disagreements(self) -> list[Row]:
        """Requirements that some break and others do not."""
        return [row for row in self.rows if row.differs and row.fails_somewhere]

    @property
    def broken_by_all(self) -> list[Row]:
        """Requirements that all of them break in the same way of ending."""
        return [row for row in self.rows if not row.differs and row.fails_somewhere]

    @property
    def checked_differently(self) -> dict[tuple[str, ...], list[Row]]:
        """Requirements that nobody breaks and not all were checked for, by their outcomes."""
        found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.differs and not row.fails_somewhere:
                found[row.pattern].append(row)
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))

    @property
    def contracts(self) -> dict[str, list[ContractCounts]]:
        """By contract the counts of each report."""
        found: dict[str, list[ContractCounts]] = defaultdict(list)
        for report in self.reports:
            for each in by_contract(report):
                found[each.contract].append(each)
        return dict(found)

    @property
    def rows_by_contract(self) -> dict[str, list[Row]]:
        """The rows of each contract."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.id.partition(".")[0]].append(row)
        return {contract: found[contract] for contract in sorted(found)}


def side_by_side(parts: Sequence[tuple[Path, Report]]) -> Several:
    """The reports in rows; CannotCompare where they are not of the same requirements."""
    place, first = parts[0]
    for other_place, other in parts[1:]:
        here, there = first.header["suite_version"], other.header["suite_version"]
        if here != there:
            raise CannotCompare(
                f"{place} is of suite version {here} and {other_place} of {there}: "
                "their requirements cannot be compared."
            )
        different = sorted(first.header["suite"].items() ^ other.header["suite"].items())
        if different:
            raise CannotCompare(
                f"{place} and {other_place} are of different sets of requirements: "
                f"{different[0][0]} is not the same in both."
            )
    reports = tuple(report for _, report in parts)
    ended = [ends(report) for report in reports]
    position = {slug: number for number, slug in enumerate(first.header["suite"])}
    ids = sorted(
        dict.fromkeys(id for each in ended for id in each), key=lambda id: position[slug_of(id)]
    )
    rows = [
        Row(
            id,
            first.header["suite"][slug_of(id)],
            tuple(each.get(id, End(ABSENT)) for each in ended),
        )
        for id in ids
    ]
    return Several(reports, tuple(_names(parts)), tuple(rows))


def _names(parts: Sequence[tuple[Path, Report]]) -> list[str]:
    """Names of the columns: that of the implementation, with the place where it is not enough."""
    names = [report.name for _, report in parts]
    return [
        f"{name} ({place})" if names.count(name) > 1 else name
        for name, (place, _) in zip(names, parts)
    ]
