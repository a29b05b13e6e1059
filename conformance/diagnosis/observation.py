"""How one case of a requirement ends for an implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conformance.harness.failures import (
    ConformanceFailure,
    Declined,
    Inconclusive,
    NotRun,
)
from conformance.harness.lanes import dtypes_noted, limited_to
from conformance.harness.requirement import Drawn, Requirement
from conformance.harness.subject import Subject

PASSED, FAILED, SILENT = "passed", "failed", "silent"
"""``silent``: declined, inconclusive, not run, or a planted bug that this case breaks altogether."""


@dataclass(frozen=True)
class Observation:
    """What a case showed."""

    ended: str
    failure: ConformanceFailure | None = None
    dtypes: frozenset[torch.dtype] = frozenset()
    """Those that the implementation took on, until it failed; none where the case has no choice."""


def observe(
    requirement: Requirement, subject: Subject, case: Drawn, like: Observation | None = None
) -> Observation:
    """Check one case, outside of Hypothesis and of the counts of a run.

    In the dtypes alone that the observation ``like`` is of: what the implementation declines is not
    asked of a known bug.
    """
    with limited_to(like.dtypes if like else frozenset()), dtypes_noted() as dtypes:
        ended, failure = _end_of(requirement, subject, case)
    return Observation(ended, failure, frozenset(dtypes))


def _end_of(
    requirement: Requirement, subject: Subject, case: Drawn
) -> tuple[str, ConformanceFailure | None]:
    try:
        # What is random, such as dropout or weights that were never loaded, is the same for all.
        with torch.random.fork_rng(enabled=subject.device == "cpu"):
            torch.manual_seed(0)
            requirement.check_case(subject, case)
    except ConformanceFailure as failure:
        return FAILED, failure
    except (Declined, Inconclusive, NotRun, NotImplementedError):
        return SILENT, None
    except Exception:  # a planted bug that cannot take this case proves nothing
        return SILENT, None
    return PASSED, None
