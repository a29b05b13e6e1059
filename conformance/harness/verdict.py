"""From the records of a run to one verdict with counts, denominators and an exit code. Pure.

``pass``
    every core requirement of the suite ran and passed.
``partial``
    nothing failed, but a core requirement was not offered, declined, deselected, not run, or is a
    known failure.
``fail``
    a requirement failed, the ledger does not match, the suite itself broke, or a requirement that
    the user requires did not run.
``inconclusive``
    nothing ran, a core requirement could not tell right from wrong, or a planned one is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conformance.harness.records import (
    DECLINED,
    ERROR,
    EXECUTED,
    FAIL,
    INCONCLUSIVE,
    KNOWN_FAILURE,
    LEDGER_MISMATCH,
    NOT_OFFERED,
    NOT_RUN,
    OUTCOMES,
    PASS,
    USAGE_ERROR,
)

OK, FAILED, BROKEN_HARNESS, USAGE, TOO_FEW = 0, 1, 3, 4, 6
"""Exit codes; 2 is pytest's own, for an interrupted run."""

WORDS = {
    PASS: "passed",
    FAIL: "failed",
    ERROR: "broke the harness",
    LEDGER_MISMATCH: "not as in the ledger",
    KNOWN_FAILURE: "known failures",
    NOT_OFFERED: "not offered",
    DECLINED: "declined",
    INCONCLUSIVE: "inconclusive",
    NOT_RUN: "not run",
    "deselected": "deselected",
    "missing": "never reported",
}


@dataclass(frozen=True)
class Plan:
    """What a run set out to check, and of what."""

    planned: tuple[Mapping[str, Any], ...]
    """One mapping an item: id, slug, level, contract, device."""
    suite: Mapping[str, str]
    """Slug to level of every requirement that this run could have held."""
    required: tuple[str, ...] = ()
    """Slugs that the user requires."""
    smoke: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run."""

    verdict: str
    why: str
    exit_code: int
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """Verdict and reason in one line."""
        return f"{self.verdict}: {self.why}"


def judge(plan: Plan, records: Iterable[Mapping[str, Any]]) -> Verdict:
    """The verdict on a run."""
    records = list(records)
    ends = _end_of_each(plan, records)
    counts = count(plan, records, ends)
    tally = Counter(record["outcome"] for record in records)
    planned, executed = len(plan.planned), sum(tally[o] for o in EXECUTED)

    def verdict(word: str, exit_code: int, why: str) -> Verdict:
        if plan.smoke:
            why = f"smoke, {planned} of {len(plan.suite)} requirements; {why}"
        return Verdict(word, why, exit_code, counts)

    if tally[FAIL] or tally[LEDGER_MISMATCH]:
        parts = [_of(tally[FAIL], planned, "failed")] if tally[FAIL] else []
        if tally[LEDGER_MISMATCH]:
            parts.append(f"{tally[LEDGER_MISMATCH]} not as in the ledger of known failures")
        if tally[ERROR]:
            parts.append(f"{tally[ERROR]} broke the harness")
        return verdict("fail", FAILED, ", ".join(parts))
    errors = [record["reason"] for record in records if record["outcome"] == ERROR]
    if errors and all(reason.startswith(USAGE_ERROR) for reason in errors):
        return verdict("fail", USAGE, errors[0])
    if errors:
        return verdict(
            "fail",
            BROKEN_HARNESS,
            f"broken harness: {tally[ERROR]} of {planned} "
            "requirements ended in an error that is not the implementation's",
        )
    required = _required_not_run(plan, ends)
    if required:
        shown = _some(f"{slug} ({WORDS[ends[slug]]})" for slug in required)
        return verdict(
            "fail",
            TOO_FEW,
            f"too few executed: {len(required)} of {len(plan.required)} required requirements "
            f"did not run: {shown}",
        )
    if ends_missing := sum(end == "missing" for end in ends.values()):
        return verdict(
            "inconclusive",
            TOO_FEW,
            f"{ends_missing} of {planned} planned requirements never reported",
        )
    if not executed:
        reasons = {record["reason"] for record in records}
        why = f": {reasons.pop()}" if len(reasons) == 1 else ""
        return verdict(
            "inconclusive", TOO_FEW, f"none of {planned} planned requirements executed{why}"
        )
    core = {slug: end for slug, end in ends.items() if plan.suite.get(slug) == "core"}
    unsure = [slug for slug, end in core.items() if end == INCONCLUSIVE]
    if unsure:
        return verdict(
            "inconclusive",
            TOO_FEW,
            _of(len(unsure), len(core), "could not tell right from wrong", "core ")
            + f": {_some(unsure)}",
        )
    short = Counter(end for end in core.values() if end != PASS)
    if short:
        kinds = ", ".join(f"{n} {WORDS[end]}" for end, n in short.items())
        return verdict(
            "partial",
            OK,
            f"{_of(len(core) - short.total(), len(core), 'passed', 'core ')}; {kinds}",
        )
    return verdict(
        "pass", OK, f"{_of(len(core), len(core), 'passed', 'core ')}; {_extended(ends, plan)}"
    )


def count(plan: Plan, records: list[Mapping[str, Any]], ends: Mapping[str, str]) -> dict[str, Any]:
    """Every count of a run, each beside its denominator."""
    tally = Counter(record["outcome"] for record in records)
    comparisons: Counter[str] = Counter()
    for record in records:
        comparisons.update(record["comparisons"])
    levels = {}
    for level in ("core", "extended"):
        slugs = [slug for slug in ends if plan.suite.get(slug) == level]
        by_end = Counter(ends[slug] for slug in slugs)
        levels[level] = {"suite": len(slugs), **dict(by_end)}
    return {
        "suite": len(plan.suite),
        "planned": len(plan.planned),
        "reported": len(records),
        "executed": sum(tally[outcome] for outcome in EXECUTED),
        "outcomes": {outcome: tally[outcome] for outcome in OUTCOMES},
        "deselected": sum(end == "deselected" for end in ends.values()),
        "levels": levels,
        "cases": {
            "drawn": sum(record["drawn"] for record in records),
            "executed": sum(record["executed"] for record in records),
        },
        "comparisons": dict(comparisons),
    }


def _end_of_each(plan: Plan, records: list[Mapping[str, Any]]) -> dict[str, str]:
    """How every requirement of the suite ended, where the worst of its devices counts."""
    # A requirement planned on two devices has run when it ran on one of them.
    order = [FAIL, LEDGER_MISMATCH, ERROR, "missing", KNOWN_FAILURE, PASS, INCONCLUSIVE]
    order += [DECLINED, NOT_OFFERED, NOT_RUN, "deselected"]
    rank = {end: position for position, end in enumerate(order)}
    by_id = {record["id"]: record["outcome"] for record in records}
    ends = dict.fromkeys(plan.suite, "deselected")
    for item in plan.planned:
        end = by_id.get(item["id"], "missing")
        ends[item["slug"]] = min(ends.get(item["slug"], "deselected"), end, key=rank.__getitem__)
    return ends


def _required_not_run(plan: Plan, ends: Mapping[str, str]) -> list[str]:
    # --smoke is a question of its own; it answers for the requirements that it planned.
    exempt = {"deselected"} if plan.smoke else set()
    return [
        slug
        for slug in plan.required
        if ends.get(slug, "deselected") not in EXECUTED
        and ends.get(slug, "deselected") not in exempt
    ]


def _extended(ends: Mapping[str, str], plan: Plan) -> str:
    slugs = [slug for slug in ends if plan.suite.get(slug) == "extended"]
    by_end = Counter(ends[slug] for slug in slugs)
    rest = "".join(f", {n} {WORDS[end]}" for end, n in by_end.items() if end != PASS)
    return f"extended: {by_end[PASS]} of {len(slugs)} passed{rest}"


def _of(part: int, whole: int, what: str, kind: str = "") -> str:
    return f"{part} of {whole} {kind}requirement{'s' * (whole != 1)} {what}"


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
