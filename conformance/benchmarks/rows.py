"""A row of a record: one workload on one implementation, from times to figures. Imports no torch.

Fields of a row, all of JSON::

    name, contract, dtype     of the workload
    status                    TIMED, or why there are no times; then ``reason`` is one line
    seconds                   median, q1, q3 of all launches, and how many
    flops, bytes              of the workload, from its shape
    tflops, gbps              10¹² operations and 10⁹ bytes in a second, at the median
    share                     of the machine's own product (same dtype) and copy: 1 is the ceiling
    anchor                    implementation, its median seconds in the same rounds, ratio to it
    counters                  exact metrics, the backend that ran among them
    exposed                   launches whose host time was longer than the GPU was kept busy
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

Row = dict[str, Any]
Status = Literal["timed", "declined", "out of memory", "wrong", "failed", "over budget"]

TIMED: Status = "timed"
DECLINED: Status = "declined"
OUT_OF_MEMORY: Status = "out of memory"
WRONG: Status = "wrong"
FAILED: Status = "failed"
OVER_BUDGET: Status = "over budget"

BAD = (WRONG, FAILED)
"""Statuses with which a run does not end well."""

DIGITS = 5
"""Significant digits of a record's figures."""


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (inclusive method) and the number of values, at least one."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "number": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "number": len(values)}


def paired_ratio(rounds: Sequence[Sequence[float]], anchor: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the ratio of medians: what both sides have in common drops out."""
    pairs = zip(rounds, anchor, strict=True)
    return statistics.median(statistics.median(own) / statistics.median(a) for own, a in pairs)


def header(workload: Any) -> Row:
    """The fields that say which workload it is."""
    return {"name": workload.name, "contract": workload.contract, "dtype": workload.dtype}


def untimed_row(workload: Any, status: Status, reason: str) -> Row:
    """A row without times, and why."""
    return {**header(workload), "status": status, "reason": " ".join(reason.split())[:300]}


def timed_row(
    workload: Any,
    rounds: Sequence[Sequence[float]],
    *,
    anchor: tuple[str, Sequence[Sequence[float]]] | None,
    product: float | None,
    copy: float,
    counters: dict[str, Any],
    exposed: int = 0,
) -> Row:
    """A row from seconds, a list of launches a round.

    ``anchor`` is the implementation that the ratio is to, and its seconds in the same rounds; None
    where this is the anchor itself, or the anchor does not run. ``product`` in operations a second
    and ``copy`` in bytes a second are the machine's ceilings.
    """
    work, seconds = workload.work(), quartiles([each for one in rounds for each in one])
    flops_a_second, bytes_a_second = (n / seconds["median"] for n in (work.flops, work.bytes))
    compared = None
    if anchor is not None:
        name, times = anchor
        compared = {
            "impl": name,
            "seconds": quartiles([each for one in times for each in one])["median"],
            "ratio": paired_ratio(rounds, times),
        }
    return significant(
        {
            **header(workload),
            "status": TIMED,
            "seconds": seconds,
            "flops": work.flops,
            "bytes": work.bytes,
            "tflops": flops_a_second / 1e12,
            "gbps": bytes_a_second / 1e9,
            "share": {
                "product": flops_a_second / product if product else None,
                "copy": bytes_a_second / copy,
            },
            "anchor": compared,
            "counters": counters,
            "exposed": exposed,
        }
    )


def significant(value: Any, digits: int = DIGITS) -> Any:
    """The same with floats rounded to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: significant(each, digits) for key, each in value.items()}
    return [significant(each, digits) for each in value] if isinstance(value, list) else value


def intensity(row: Row) -> float:
    """Operations a byte of compulsory traffic."""
    return row["flops"] / row["bytes"]
