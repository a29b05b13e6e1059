"""From what was measured of a benchmark to its row: times, deterministic metrics, refusals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conformance.gate.decide import Session
from conformance.gate.evidence import interval
from conformance.gate.judgement import Judgement
from conformance.gate.measuring import BASE, CONTROL, HEAD, TOO_SHORT_KIND, ProcessPairs, Unusable
from conformance.gate.metrics import changes, failing, unsteady
from conformance.gate.result import Interval, Row
from conformance.gate.statistics import Bounds, signed_rank_bounds
from conformance.gate.worker import DECLINED, NOT_OFFERED

DRIFT = 0.05
"""By how much the machine's own speed may move before it is reported."""


def not_offered(names: Sequence[str], pairs: ProcessPairs) -> dict[str, str]:
    """Benchmarks that the base has nothing for, and why: there is nothing to compare."""
    return {
        name: refused.why
        for name in names
        if (refused := pairs.unusable.get(name)) is not None
        and refused.side == BASE
        and refused.kind in (NOT_OFFERED, DECLINED)
    }


def row_of(name: str, pairs: ProcessPairs, session: Session | None, accepted: Sequence[str]) -> Row:
    """The row of a benchmark. A worse deterministic metric regresses it, whatever its times are."""
    if name in pairs.unusable:
        return _refused_row(name, pairs.unusable[name])
    counted = pairs.found[name].counters
    found = changes(counted[BASE], counted[HEAD], counted[CONTROL])
    worse = failing(found, accepted)
    judgement = session.judgements.get(name) if session is not None else None
    if judgement is None:
        verdict, reason, by_time = "OK", "no deterministic metric is worse", ""
    else:
        verdict, reason = _by_time(judgement, pairs.found[name].cycles)
        by_time = f"; by time {verdict}: {reason}"
    if worse:
        verdict, reason = "REGRESSED", f"{'; '.join(map(str, worse))}{by_time}"
    return Row(
        name,
        verdict,
        reason,
        head=_interval(judgement.evidence.head) if judgement else None,
        control=_interval(judgement.evidence.control) if judgement else None,
        pairs=judgement.pairs if judgement else 0,
        base_seconds=pairs.plans[name].seconds,
        changes=tuple(found),
        details=_details(name, pairs, judgement)
        | {"counters": counted, "unsteady": unsteady(counted[BASE], counted[CONTROL])},
    )


def _by_time(judgement: Judgement, cycles: Sequence[Sequence[float]]) -> tuple[str, str]:
    """Verdict and reason of the judgement, unless the clock of the GPU explains it.

    A change of clock makes code slower that takes as many cycles as before. So where clocks were read
    (``cycles`` are logarithms of ratios by pair and round), a slowdown must show in cycles too.
    """
    verdict, reason = judgement.verdict.value, judgement.reason
    if verdict == "REGRESSED" and len(cycles) == judgement.pairs:
        medians = np.array([statistics.median(rounds) for rounds in cycles])
        found = signed_rank_bounds(medians, judgement.rule.alpha)
        if not found.lower > judgement.evidence.margin:
            shown = interval(found)
            return "INCONCLUSIVE", f"slower in time but not in cycles, {shown}: {reason}"
    return verdict, reason


def drift(anchors: Sequence[Mapping[str, float]]) -> list[str]:
    """What the machine's own speed did during a run, a line for each anchor that moved too much."""
    lines = []
    for name in anchors[0] if anchors else ():
        values = [each[name] for each in anchors]
        moved = max(values) / min(values) - 1
        if moved > DRIFT:
            lines.append(
                f"the machine's own {name} moved by {100 * moved:.0f} % during the run, "
                f"between {min(values):.3g} and {max(values):.3g} a second"
            )
    return lines


def _refused_row(name: str, refused: Unusable) -> Row:
    """A benchmark that a side refuses.

    What the base computes and the head does not is the head's regression; where the base itself is
    wrong there is nothing to hold the head against.
    """
    reason = f"the {refused.side}: {refused.kind}: {refused.why}"
    if refused.kind == TOO_SHORT_KIND:
        return Row(name, "INCONCLUSIVE", reason)
    return Row(name, "REGRESSED" if refused.side == HEAD else "VOID", reason)


def _details(name: str, pairs: ProcessPairs, judgement: Judgement | None) -> dict[str, Any]:
    found = pairs.found[name]
    return {
        "judgement": judgement.as_json() if judgement else None,
        "launches": pairs.plans[name].launches,
        "median_seconds": {s: statistics.median(times) for s, times in found.seconds.items()},
        "order_effect": found.order_effect,
        "stalls": dict(found.stalls),
    }


def _interval(bounds: Bounds) -> Interval:
    return Interval(float(bounds.estimate), float(bounds.lower), float(bounds.upper))
