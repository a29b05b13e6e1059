"""The record of an implementation on a machine: written row by row, so that a cut run leaves its part.

Imports no torch at module level: reading records needs none.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from conformance.benchmarks.machine import machine
from conformance.benchmarks.rows import BAD, TIMED, Row, significant

RECORDS = Path(__file__).parent / "records"
KIND = "kernels"
FORMAT = 1
"""Of the record; raised where a field changes its meaning."""

DRIFT = 0.05
"""How far the ceilings may move between begin and end before it is worth a word."""

Record = dict[str, Any]


class BadRecord(ValueError):
    """A file is no record of kernels; one line."""


def record_name(identity: str, implementation: str) -> str:
    """``kernels-<fingerprint>-<implementation>.json``, the implementation in plain characters."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(implementation).name or implementation)
    return f"{KIND}-{identity}-{plain.strip('-')}.json"


def new_record(implementation: str, device: str, fingerprint: Record, options: Record) -> Record:
    """A record without rows."""
    return {
        "benchmark": KIND,
        "format": FORMAT,
        "implementation": implementation,
        "device": device,
        "fingerprint": fingerprint,
        "machine": machine(),
        "options": options,
        "ceilings": {},
        "complete": False,
        "rows": [],
    }


def fill(
    record: Record,
    workloads: Iterable[Any],
    row_of: Callable[[Any], Row | None],
    *,
    save: Callable[[Record], None],
    progress: Callable[[str], None],
) -> None:
    """Add a row for each workload that is offered, saving after each and saying a line."""
    listed = list(workloads)
    for number, workload in enumerate(listed, 1):
        begin = time.monotonic()
        row = row_of(workload)
        if row is None:
            continue
        record["rows"].append(row)
        save(record)
        took = time.monotonic() - begin
        progress(f"{number}/{len(listed)} {record['implementation']} {line(row)} ({took:.1f} s)")
    record["complete"] = True
    save(record)


def line(row: Row) -> str:
    """A row in a line."""
    if row["status"] != TIMED:
        return f"{row['name']}: {row['status']}: {row['reason']}"
    seconds, anchor = row["seconds"], row["anchor"]
    against = f", {anchor['ratio']:.2f} of {short(anchor['impl'])}" if anchor else ""
    return (
        f"{row['name']}: {1e3 * seconds['median']:.3f} ms, {row['tflops']:.3g} TFLOP/s, "
        f"{row['gbps']:.3g} GB/s{against}"
    )


def short(implementation: str) -> str:
    """An implementation's name without the package that it lies in."""
    return implementation.rpartition(":")[2].rpartition(".")[2] or implementation


def drift(record: Record) -> dict[str, float]:
    """How much the ceilings of a record moved from its begin to its end, as shares."""
    begin, end = (record["ceilings"].get(at) for at in ("begin", "end"))
    if not begin or not end:
        return {}
    moved = {"copy": end["copy"] / begin["copy"] - 1}
    for dtype, speed in begin["product"].items():
        moved[f"product {dtype}"] = end["product"][dtype] / speed - 1
    return moved


def ended_well(record: Record) -> bool:
    """Whether every row was timed, or could not be for a reason that is no fault."""
    return not any(row["status"] in BAD for row in record["rows"])


def write_record(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(significant(record), indent=1) + "\n", "utf-8")
    part.replace(path)


def read_records(folder: Path = RECORDS) -> list[Record]:
    """Every record of kernels in a folder, in the order of their names; BadRecord for what is none."""
    return [read_record(path) for path in sorted(folder.glob(f"{KIND}-*.json"))]


def read_record(path: Path) -> Record:
    """One record; BadRecord unless it is one of this format."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path.name}: {error}") from None
    if not isinstance(record, dict) or record.get("benchmark") != KIND:
        raise BadRecord(f"{path.name} is no record of kernels")
    if record.get("format") != FORMAT:
        raise BadRecord(f"{path.name} has format {record.get('format')!r}, expected {FORMAT}")
    return record
