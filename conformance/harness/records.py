"""How one requirement ended, as one JSON-able record.

The record is made in the process that ran the requirement, travels on pytest's own report (from
xdist's workers too), and is all that verdict and report are made of. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conformance.harness.failures import (
    ConformanceFailure,
    Declined,
    Inconclusive,
    NotOffered,
    NotRun,
)

if TYPE_CHECKING:
    from conformance.harness.requirement import Requirement, Tally

PASS = "pass"
FAIL = "fail"
ERROR = "error"
NOT_OFFERED = "not_offered"
DECLINED = "declined"
INCONCLUSIVE = "inconclusive"
NOT_RUN = "not_run"
KNOWN_FAILURE = "known_failure"
LEDGER_MISMATCH = "ledger_mismatch"

OUTCOMES = (
    PASS,
    FAIL,
    ERROR,
    LEDGER_MISMATCH,
    KNOWN_FAILURE,
    NOT_OFFERED,
    DECLINED,
    INCONCLUSIVE,
    NOT_RUN,
)
"""In the order in which they are shown."""

EXECUTED = frozenset({PASS, FAIL, KNOWN_FAILURE, LEDGER_MISMATCH})
"""Outcomes that say something about the implementation."""

RED = frozenset({FAIL, ERROR, LEDGER_MISMATCH})

PROPERTY = "conformance"
"""Name of the user property that carries a record (as JSON) on pytest's report."""

REPORTED_PHASES = ("setup", "call")
"""Phases of a pytest item whose end is the end of the requirement."""

USAGE_ERROR = "usage error"
"""How the reason of an error begins that the user can put right."""

LONGEST_TEXT = 2000
"""Characters of one text in a record: an exception's message can be of any length."""


def outcome_of(error: BaseException | None, phase: str) -> tuple[str, str]:
    """Outcome and reason of what a phase (``setup``, ``call``) of a requirement raised."""
    if error is None:
        return PASS, ""
    if isinstance(error, ConformanceFailure):
        return FAIL, f"{error.kind}: {error.summary}"
    for kind, outcome in (
        (NotOffered, NOT_OFFERED),
        (Declined, DECLINED),
        (Inconclusive, INCONCLUSIVE),
        (NotRun, NOT_RUN),
    ):
        if isinstance(error, kind):
            return outcome, str(error)
    if type(error).__name__ == "Skipped":  # a skip that no one here asked for checks nothing either
        return NOT_RUN, f"skipped: {getattr(error, 'msg', '') or error}"
    if type(error).__name__ == "UsageError":  # a fixture of the user's gave what cannot be tested
        return ERROR, f"{USAGE_ERROR}: {error}"
    first_line = (str(error).strip() or "no message").split("\n")[0]
    where = "" if phase == "call" else f" in {phase}"
    return ERROR, f"{type(error).__name__}{where}: {first_line}"


def make_record(
    planned: Mapping[str, Any],
    outcome: str,
    reason: str,
    *,
    duration: float,
    tally: Tally | None = None,
    error: BaseException | None = None,
) -> dict[str, Any]:
    """The record of a planned requirement."""
    return clean(
        {
            "type": "record",
            "id": planned["id"],
            "slug": planned["slug"],
            "level": planned["level"],
            "contract": planned["contract"],
            "device": planned["device"],
            "outcome": outcome,
            "reason": reason,
            **_counts(tally),
            "duration": round(duration, 4),
            "failure": failure_of(error) if isinstance(error, ConformanceFailure) else None,
            "diagnosis": None,
            "ledger": None,
        }
    )


def died(planned: Mapping[str, Any], stacks: str = "") -> dict[str, Any]:
    """The record of a requirement during which the process ended.

    ``stacks`` are those that it left when it was ended because it never returned to Python.
    """
    if stacks:
        kind, summary = "timed out", "the implementation did not return, and its process was ended"
    else:
        kind, summary = "process died", "the implementation ended the process that ran it"
    record = make_record(planned, FAIL, f"{kind}: {summary}", duration=0.0)
    record["failure"] = {
        "kind": kind,
        "lane": "exact",
        "summary": summary,
        "details": stacks.splitlines()[:STACK_LINES],
        "case": None,
        "reproduction": [],
        "rule": None,
        "source": None,
        "measured": None,
    }
    return record


STACK_LINES = 20
"""Lines of the stacks of a process that had to be ended: the innermost frames come first."""


def _counts(tally: Tally | None) -> dict[str, Any]:
    return {
        "drawn": tally.drawn if tally else 0,
        "executed": tally.executed if tally else 0,
        "declined": dict(tally.declined) if tally else {},
        "inconclusive": dict(tally.inconclusive) if tally else {},
        "telling": tally.telling if tally else 0,
        "comparisons": dict(tally.comparisons) if tally else {},
        "closest": tally.closest if tally else 0.0,
    }


def failure_of(failure: ConformanceFailure) -> dict[str, Any]:
    """What a failure says, field by field."""
    from conformance.harness.messages import reproduction

    requirement: Requirement | None = failure.requirement
    return {
        "kind": failure.kind,
        "lane": failure.lane,
        "summary": failure.summary,
        "details": list(failure.details),
        "case": repr(failure.call.case) if failure.call is not None else None,
        "reproduction": reproduction(failure) if failure.call is not None else [],
        "rule": requirement.rule if requirement else None,
        "source": requirement.source if requirement else None,
        "measured": failure.compared.as_data() if failure.compared is not None else None,
    }


def clean(value: Any) -> Any:
    """The same value in plain JSON: finite numbers, texts of bounded length."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (Mapping, Counter)):
        return {str(clean(str(key))): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    text = str(value)
    return (
        text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text)} characters)"
    )
