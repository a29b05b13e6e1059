"""``python -m conformance.benchmarks.page``: docs/benchmarks.md and its plots from the records.

    python -m conformance.benchmarks.page --records FOLDER --output docs/benchmarks.md

The page depends on the records alone. Exit status 4 for records that cannot be read, or none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from conformance.benchmarks import plots, published
from conformance.benchmarks.against import decode_table, published_table
from conformance.benchmarks.cells import number, percent, table
from conformance.benchmarks.recording import (
    DRIFT,
    RECORDS,
    BadRecord,
    Record,
    drift,
    read_records,
    short,
)
from conformance.benchmarks.rows import TIMED, Row

MISTAKE = 4

BUSY = 0.2
"""How far ceilings move where a machine does something else as well."""

BUSY_NOTE = (
    "The ceilings moved: the machine was doing other work. Ratios to the anchor, which is timed in "
    "the same rounds, and counters can be compared between implementations; times and shares cannot."
)

FAMILIES = (
    ("Attention: prefill", "attention.prefill.*"),
    ("Attention: forward and backward", "attention.train.*"),
    ("Attention: decode", "attention.decode.*"),
    ("Experts", "experts.*"),
    ("Compressed experts", "shared_core_block.*"),
)
"""Sections of a machine: title, and a glob on names of workloads."""

LINES = (
    (
        "prefill-d128-causal",
        "Causal prefill, width 128, 16 heads, 16,384 tokens in all",
        r"attention\.prefill\.b\d+\.(\d+)x\d+\.h16x16\.d128\.causal\.\w+",
        "length of a sequence",
    ),
    (
        "experts-qwen3",
        "Experts of Qwen3-30B-A3B, uniform routing",
        r"(?:experts|shared_core_block)\.qwen3-30b-a3b\.[\w.]*\.t(\d+)\.uniform\.\w+",
        "tokens",
    ),
    (
        "experts-mixtral",
        "Experts of Mixtral-8x7B, uniform routing",
        r"(?:experts|shared_core_block)\.mixtral-8x7b\.[\w.]*\.t(\d+)\.uniform\.\w+",
        "tokens",
    ),
)
"""Plots of time against tokens: name, title, pattern with the tokens as its group, and the axis."""

INTRODUCTION = Path(__file__).with_name("introduction.md")
"""What stands before the tables."""


def page(records: Sequence[Record], folder: str = "benchmarks") -> tuple[str, dict[str, str]]:
    """The page as Markdown, and its plots as SVG by file name, which it looks for in ``folder``."""
    parts, files = [INTRODUCTION.read_text("utf-8").strip()], {}
    for identity, group in by_machine(records).items():
        text, made = machine_section(identity, group, folder)
        parts.append(text)
        files.update(made)
    return "\n\n".join(parts) + "\n", files


def by_machine(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by fingerprint: those of GPUs first, then by the machine's name."""
    order = sorted(
        records,
        key=lambda r: (
            r["device"] == "cpu",
            r["fingerprint"]["hard"]["name"],
            r["fingerprint"]["id"],
        ),
    )
    groups: dict[str, list[Record]] = {}
    for record in order:
        if any(row["status"] == TIMED for row in record["rows"]):
            groups.setdefault(record["fingerprint"]["id"], []).append(record)
    return groups


def machine_section(
    identity: str, records: Sequence[Record], folder: str
) -> tuple[str, dict[str, str]]:
    """Everything of one machine, and its plots."""
    hard, files = records[0]["fingerprint"]["hard"], {}
    parts = [f"## {hard['name']}", described(identity, records)]
    files[f"{identity}-roofline.svg"] = plots.roofline(records, f"{hard['name']}: roofline")
    parts.append(f"![Roofline]({folder}/{identity}-roofline.svg)")
    for name, title, pattern, axis in LINES:
        lines = plots.time_lines(records, pattern)
        if any(len(line) > 1 for line in lines.values()):
            files[f"{identity}-{name}.svg"] = plots.times(lines, title, axis)
            parts.append(f"![{title}]({folder}/{identity}-{name}.svg)")
    if published.is_published_model(hard["name"]):
        parts += ["### Against published figures", published_table(records)]
        parts += [decode_table(records)]
    for title, glob in FAMILIES:
        table = family_table(records, glob)
        if table:
            parts += [f"### {title}", table]
    parts += ["### Not timed", *not_timed(records)] if any(untimed(r) for r in records) else []
    return "\n\n".join(parts), files


def described(identity: str, records: Sequence[Record]) -> str:
    """The machine, its ceilings, and when it was measured."""
    hard, lines = records[0]["fingerprint"]["hard"], []
    skipped = ("name", "device", "method")
    facts = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in hard.items() if k not in skipped)
    lines.append(f"Fingerprint `{identity}`: {facts}.")
    lines.append("")
    lines += table(
        ("record of", "date", "load", "product TFLOP/s", "copy GB/s", "launch µs", "drift"),
        [
            (
                f"`{short(record['implementation'])}`",
                record["machine"]["date"],
                number(record["machine"]["load_average"]),
                number(max(record["ceilings"]["begin"]["product"].values()) / 1e12),
                number(record["ceilings"]["begin"]["copy"] / 1e9),
                number(record["ceilings"]["begin"]["launch"] * 1e6),
                drifted(record),
            )
            for record in records
        ],
    )
    if any(abs(by) > BUSY for record in records for by in drift(record).values()):
        lines += ["", BUSY_NOTE]
    return "\n".join(lines)


def drifted(record: Record) -> str:
    """How far the ceilings moved during the run, where it is more than little."""
    if not record["complete"]:
        return "cut short"
    moved = [f"{what} {by:+.0%}" for what, by in drift(record).items() if abs(by) > DRIFT]
    return ", ".join(moved) or f"below {DRIFT:.0%}"


def family_table(records: Sequence[Record], glob: str) -> str:
    """Rows of a family: by workload, and there the fastest first."""
    names = dict.fromkeys(
        row["name"]
        for record in records
        for row in plots.timed(record)
        if fnmatchcase(row["name"], glob)
    )
    cells = []
    for name in names:
        found = [
            (short(record["implementation"]), row)
            for record in records
            for row in plots.timed(record)
            if row["name"] == name
        ]
        found.sort(key=lambda pair: pair[1]["seconds"]["median"])
        for index, (implementation, row) in enumerate(found):
            shown = f"`{name.partition('.')[2]}`" if index == 0 else ""
            cells.append((shown, f"`{implementation}`", *figures(row)))
    if not cells:
        return ""
    heads = ("workload", "implementation", "ms", "quartiles", "TFLOP/s", "GB/s", "of product")
    more = ("of copy", "to anchor", "backend", "launches", "peak MiB")
    return "\n".join(table((*heads, *more), cells))


def figures(row: Row) -> tuple[str, ...]:
    """The cells of a row after its names."""
    seconds, share, counted = row["seconds"], row["share"], row["counters"]
    exposed = " \\*" if row["exposed"] else ""
    return (
        number(1e3 * seconds["median"]) + exposed,
        f"{number(1e3 * seconds['q1'])}–{number(1e3 * seconds['q3'])}",
        number(row["tflops"]),
        number(row["gbps"]),
        percent(share["product"]),
        percent(share["copy"]),
        f"{row['anchor']['ratio']:.2f}" if row["anchor"] else "–",
        str(counted.get("backend", "–")),
        str(counted.get("launches", "–")),
        number(counted["peak_bytes"] / 2**20) if "peak_bytes" in counted else "–",
    )


def untimed(record: Record) -> list[Row]:
    """The rows without times."""
    return [row for row in record["rows"] if row["status"] != TIMED]


def not_timed(records: Sequence[Record]) -> list[str]:
    """Workloads that an implementation does not compute, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for row in untimed(record):
            line = row["reason"].partition(": a row of")[0].replace("|", "/")[:120]
            key = (short(record["implementation"]), row["status"], line.replace(row["name"], "…"))
            reasons.setdefault(key, []).append(row["name"])
    cells = [
        (f"`{name}`", status, reason, f"{len(names)}: `{names[0]}`" + (" …" if names[1:] else ""))
        for (name, status, reason), names in reasons.items()
    ]
    return ["\n".join(table(("implementation", "status", "reason", "workloads"), cells))]


def write(text: str, files: dict[str, str], output: Path) -> None:
    """Write the page, and its plots into the folder of the same name, from which others are removed."""
    folder = output.with_suffix("")
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.name not in files:
            path.unlink()
    for name, svg in files.items():
        (folder / name).write_text(svg, "utf-8")
    output.write_text(text, "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Make the page; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks.page",
        description="The page of benchmarks and its plots, from records.",
    )
    default: Any = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE.md")
    options = parser.parse_args(arguments)
    try:
        records = read_records(options.records)
        if not by_machine(records):
            raise BadRecord(f"no record of kernels with times in {options.records}")
        if not options.output.parent.is_dir():
            raise BadRecord(f"there is no folder {options.output.parent}")
        text, files = page(records, options.output.stem)
    except (BadRecord, ImportError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return MISTAKE
    write(text, files, options.output)
    print(f"{options.output}: {len(records)} records, {len(files)} plots")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
