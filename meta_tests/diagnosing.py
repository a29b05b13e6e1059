"""What the diagnosis says of a method that fails a requirement."""

from __future__ import annotations

from collections.abc import Callable

from conformance.diagnosis import search
from conformance.diagnosis.search import Diagnosis
from conformance.harness.failures import ConformanceFailure
from conformance.harness.requirement import all_requirements
from conformance.harness.subject import Subject

LONG = 300.0
"""Seconds: neither what fails nor what is named must depend on how busy the machine is."""


def failed(
    slug: str, method: Callable, *, device: str = "cpu", seconds: float = LONG
) -> tuple[ConformanceFailure, Diagnosis]:
    """The failure of a requirement against a method, and what it is."""
    requirement = all_requirements()[slug]
    subject = Subject(requirement.contract, method, device=device)
    try:
        requirement.check(subject, seconds=LONG)
    except ConformanceFailure as failure:
        failing = requirement.last_tally.failing
        found = search.diagnose(requirement, subject, failure, failing, seconds=seconds)
        failure.diagnosis = found
        return failure, found
    raise AssertionError(f"{slug} does not fail")
