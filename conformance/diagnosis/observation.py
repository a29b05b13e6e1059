"""How one case of a requirement ends for an implementation."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.harness.failures import (
    ConformanceFailure,
    Declined,
    Inconclusive,
    NotRun,
)
from conformance.harness.requirement import Drawn, Requirement
from conformance.harness.subject import Subject

PASSED, FAILED, SILENT = "passed", "failed", "silent"
"""``silent``: declined, inconclusive, not run, or a planted bug that this case breaks altogether."""


@dataclass(frozen=True)
class Observation:
    """What a case showed."""

    ended: str
    failure: ConformanceFailure | None = None


def observe(requirement: Requirement, subject: Subject, case: Drawn) -> Observation:
    """Check one case, outside of Hypothesis and of the counts of a run."""
    try:
        requirement.check_case(subject, case)
    except ConformanceFailure as failure:
        return Observation(FAILED, failure)
    except (Declined, Inconclusive, NotRun, NotImplementedError):
        return Observation(SILENT)
    except Exception:  # a planted bug that cannot take this case proves nothing
        return Observation(SILENT)
    return Observation(PASSED)
