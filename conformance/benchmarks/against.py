"""Records of an H100 or H200 held against published figures, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from conformance.benchmarks import plots, published
from conformance.benchmarks.cells import number, percent, table
from conformance.benchmarks.recording import Record, short
from conformance.benchmarks.rows import Row


def published_table(records: Sequence[Record]) -> str:
    """Published figures beside the same kernel here, or where torch has it not the fastest one."""
    cells = []
    for figure in sorted(published.FIGURES, key=lambda f: (f.workload, f.backward)):
        found = speeds(records, figure)
        if not found:
            continue
        speed, implementation = max(found)
        share = speed / figure.tflops
        low = " **low**" if figure.backend and share < published.LOW else ""
        what = figure.workload.partition(".")[2] + (" (backward)" if figure.backward else "")
        here = "the same kernel" if figure.backend else "the fastest"
        cells.append(
            (
                f"`{what}`",
                figure.kernel,
                f"{figure.tflops:g}",
                f"{number(speed)} ({here}: `{implementation}`)",
                f"{share:.0%}{low}",
                figure.source,
            )
        )
    if not cells:
        return "No row of these records has a published figure."
    heads = ("workload", "published", "TFLOP/s", "here", "share", "source")
    note = (
        f"A kernel below {published.LOW:.0%} of what was published of itself is marked. A backward "
        "pass is forward with backward less the forward row of the same shape."
    )
    return "\n".join([note, "", *table(heads, cells)])


def speeds(records: Sequence[Record], figure: published.Figure) -> list[tuple[float, str]]:
    """(TFLOP/s, implementation) of the rows that a figure is held against."""
    found = []
    for record in records:
        for row in plots.timed(record):
            backend = str(row["counters"].get("backend", ""))
            if not fnmatchcase(row["name"], figure.workload):
                continue
            if figure.backend is not None and figure.backend not in backend.split("+"):
                continue
            speed = speed_of(record, row, figure.backward)
            if speed is not None:
                found.append((speed, short(record["implementation"])))
    return found


def speed_of(record: Record, row: Row, backward: bool) -> float | None:
    """TFLOP/s of a row, or of its backward pass; None where the forward row is missing."""
    if not backward:
        return row["tflops"]
    name = row["name"].replace(".train.", ".prefill.")
    for other in plots.timed(record):
        if other["name"] == name:
            seconds = row["seconds"]["median"] - other["seconds"]["median"]
            return (row["flops"] - other["flops"]) / seconds / 1e12 if seconds > 0 else None
    return None


def decode_table(records: Sequence[Record]) -> str:
    """Decoding steps with a cache that memory bounds, as shares of the machine's copy."""
    cells = []
    for record in records:
        for row in plots.timed(record):
            large = row["bytes"] > published.DECODE_BYTES
            if not (large and fnmatchcase(row["name"], "attention.decode.*")):
                continue
            share = row["share"]["copy"]
            low = " **low**" if share < published.DECODE_SHARE else ""
            name = f"`{row['name'].partition('.')[2]}`"
            implementation = f"`{short(record['implementation'])}`"
            cells.append((name, implementation, number(row["gbps"]), percent(share) + low))
    if not cells:
        return "No row of these records is a decoding step that memory bounds."
    note = (
        f"Decoding over more than {published.DECODE_BYTES / 1e6:.0f} MB: good kernels reach "
        f"{published.DECODE_SHARE:.0%} of a copy and more (FlashMLA 90% of the datasheet; "
        "FlashAttention-3 with pages of 8 tokens 55%, flash-attention#1572)."
    )
    heads = ("workload", "implementation", "GB/s", "of copy")
    return "\n".join([note, "", *table(heads, sorted(cells))])
