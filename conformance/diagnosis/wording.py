"""A diagnosis in words and as data."""

from __future__ import annotations

import functools
import textwrap
from typing import Any

from conformance.diagnosis.candidates import Candidate
from conformance.diagnosis.search import Diagnosis
from conformance.known_bugs import PlantedBug

WIDTH = 92
INDENT = 12


def lines(diagnosis: Diagnosis, slug: str) -> list[str]:
    """What the message of a failure of the requirement ``slug`` says of it; it may be nothing."""
    said: list[str] = []
    for number, candidate in enumerate(diagnosis.named):
        said += _headed("       or" if number else "looks like", _known(candidate, diagnosis, slug))
    if not diagnosis.named:
        said += _headed("seen", [f"{observation}." for observation in diagnosis.seen])
    if diagnosis.note:
        said += _headed("note", [f"{diagnosis.note}."])
    return said


def _headed(head: str, texts: list[str]) -> list[str]:
    wrapped = [line for text in texts for line in textwrap.wrap(text, WIDTH)]
    heads = [head, *[""] * len(wrapped)]
    return [f"{head:<{INDENT}}{line}" for head, line in zip(heads, wrapped)]


def _known(candidate: Candidate, diagnosis: Diagnosis, slug: str) -> list[str]:
    names = " together with ".join(_cited(bug) for bug in candidate.bugs)
    cases = f"{diagnosis.cases} case{'s' * (diagnosis.cases != 1)}"
    said = [f"{names}, equal on {cases}:", *(bug.mechanism for bug in candidate.bugs)]
    rules = dict.fromkeys(_rule(bug.breaks) for bug in candidate.bugs if bug.breaks != slug)
    return [*said, *(f"Correct: {rule}" for rule in rules)]


def _cited(bug: PlantedBug) -> str:
    source = _source(bug.entry)
    return f"{bug.id} ({source})" if source else bug.id


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


def _rule(slug: str) -> str:
    from conformance.harness.requirement import all_requirements

    return all_requirements()[slug].rule


def _source(entry: str) -> str:
    return str(_catalogue().get(entry, {}).get("source", ""))


@functools.cache
def _catalogue() -> dict[str, dict[str, Any]]:
    from conformance.harness.data import catalogue

    return catalogue()
