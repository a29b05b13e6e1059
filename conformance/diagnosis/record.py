"""What diagnosis says of the planted bugs themselves, for the record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conformance.diagnosis import search
from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.kill_matrix import in_processes
from conformance.harness.requirement import all_requirements
from conformance.harness.subject import Subject
from conformance.known_bugs import all_known_bugs


def row(id: str, seconds: float = search.SECONDS) -> dict[str, Any]:
    """What is said of a bug where it fails the requirement whose rule it breaks."""
    bug = all_known_bugs()[id]
    requirement = all_requirements()[bug.breaks]
    subject = Subject(bug.contract, getattr(bug.make(), bug.contract))
    search.forget()
    try:
        with profiles.temporarily(profiles.without_shrinking(profiles.PROFILES["gate"])):
            requirement.check(subject)
    except ConformanceFailure as failure:
        failing = requirement.last_tally.failing
        found = search.diagnose(requirement, subject, failure, failing, seconds=seconds)
    else:
        raise AssertionError(f"{id} passes {bug.breaks}")
    return {
        "named": [list(candidate.ids) for candidate in found.named],
        "seen": list(found.seen),
        "cases": found.cases,
        "whole_search": found.note is None,
    }


def rows(ids: Iterable[str], processes: int = 2) -> dict[str, dict[str, Any]]:
    """The rows of several bugs, by id."""
    ids = list(ids)
    return dict(zip(ids, in_processes(row, ids, processes)))
