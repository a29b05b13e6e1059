"""A diagnosis in words and as data."""

from __future__ import annotations

import functools
import textwrap
from typing import Any

from conformance.diagnosis.candidates import Candidate
from conformance.diagnosis.search import Diagnosis

WIDTH = 92


def lines(diagnosis: Diagnosis) -> list[str]:
    """What a failure's message says of it; nothing where there is nothing to say."""
    said: list[str] = []
    if diagnosis.named:
        names = " or ".join(_names(candidate) for candidate in diagnosis.named)
        cases = f"{diagnosis.cases} case{'s' * (diagnosis.cases != 1)}"
        said.append(f"on {cases} equal to what {names} gives")
        said += [text for candidate in diagnosis.named for text in _mechanisms(candidate)]
        if len(diagnosis.named) > 1:
            said.append("these cannot be told apart by the cases that were tried")
    said += [f"seen: {observation}" for observation in diagnosis.seen]
    if diagnosis.note:
        said.append(diagnosis.note)
    return [line for text in said for line in textwrap.wrap(text, WIDTH)]


def as_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as a record carries it."""
    return {
        "named": [_candidate_data(candidate) for candidate in diagnosis.named],
        "seen": list(diagnosis.seen),
        "cases": diagnosis.cases,
        "seconds": diagnosis.seconds,
        "note": diagnosis.note,
    }


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    return {
        "bugs": list(candidate.ids),
        "mechanism": " ".join(bug.mechanism for bug in candidate.bugs),
        "correct": " ".join(dict.fromkeys(_rule(bug.breaks) for bug in candidate.bugs)),
        "source": "; ".join(filter(None, (_source(bug.entry) for bug in candidate.bugs))),
    }


def _names(candidate: Candidate) -> str:
    return " with ".join(f"the known bug {id}" for id in candidate.ids)


def _mechanisms(candidate: Candidate) -> list[str]:
    said = []
    for bug in candidate.bugs:
        source = _source(bug.entry)
        where = f"{bug.id} ({source})" if source else bug.id
        said.append(f"{where}: {bug.mechanism} Correct: {_rule(bug.breaks)}")
    return said


def _rule(slug: str) -> str:
    from conformance.harness.requirement import all_requirements

    return all_requirements()[slug].rule


def _source(entry: str) -> str:
    return str(_catalogue().get(entry, {}).get("source", ""))


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    from conformance.harness.data import catalogue

    return catalogue()
