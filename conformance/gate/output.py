"""What a gate run leaves behind: table, ``gate.json``, ``summary.md``, ``junit.xml``. Pure text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from conformance.gate import evidence
from conformance.gate.metrics import Change
from conformance.gate.result import GateResult, Interval, Row

JSON_FILE, SUMMARY_FILE, JUNIT_FILE = "gate.json", "summary.md", "junit.xml"

HEADINGS = ("benchmark", "verdict", "change", "99 % bounds", "A/A", "pairs", "base")


def percent(logarithm: float | None) -> str:
    """``+3.2 %`` for the logarithm of a ratio."""
    return "-" if logarithm is None else evidence.percent(logarithm)


def bounds(interval: Interval | None) -> str:
    """``+1.0 % to +3.2 %``."""
    if interval is None:
        return "-"
    return f"{percent(interval.lower)} to {percent(interval.upper)}"


def duration(seconds: float | None) -> str:
    """``3.21 ms``."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of :data:`HEADINGS`."""
    return (
        row.benchmark,
        row.verdict,
        percent(row.head.estimate) if row.head else "-",
        bounds(row.head),
        percent(row.control.estimate) if row.control else "-",
        str(row.pairs),
        duration(row.base_seconds),
    )


def table_lines(result: GateResult) -> Iterable[str]:
    """The table for the terminal, the reasons of what is not OK, and the verdict."""
    table = [HEADINGS, *map(cells, result.rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
    yield ""
    for row in result.rows:
        if row.verdict != "OK":
            yield f"{row.verdict} {row.benchmark}: {row.reason}"
        for change in row.changes:
            if str(change) not in row.reason:
                yield f"    {shown(change)}"
    yield from result.notes
    yield f"gate  {result.verdict}: {result.why}"


def summary(result: GateResult) -> str:
    """The same for a pull request, in Markdown."""
    lines = [
        f"## Regression gate: {result.verdict}",
        "",
        f"{result.why[:1].upper()}{result.why[1:]}.",
        "",
        f"Base `{result.base}`, head `{result.head}`, on {result.device}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
    ]
    for row in result.rows:
        name, *others = cells(row)
        lines.append(f"| {' | '.join([f'`{name}`', *map(escaped, others)])} |")
    told = [row for row in result.rows if row.verdict != "OK" or row.changes]
    if told:
        lines += ["", "<details><summary>Why</summary>", ""]
        for row in told:
            lines.append(f"- `{row.benchmark}` {row.verdict}: {escaped(row.reason)}")
            lines += [f"  - {escaped(shown(change))}" for change in row.changes]
        lines += ["", "</details>"]
    if result.notes:
        lines += ["", *(f"- {escaped(note)}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def shown(change: Change) -> str:
    """A change of a deterministic metric, with its direction."""
    return f"{change.direction}: {change}"


def escaped(text: str) -> str:
    """A text inside a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def junit(result: GateResult) -> str:
    """One test case a benchmark: REGRESSED fails, VOID is an error, INCONCLUSIVE is skipped."""
    kinds = {"REGRESSED": "failure", "VOID": "error", "INCONCLUSIVE": "skipped"}
    found = [kinds.get(row.verdict) for row in result.rows]
    suite = ElementTree.Element(
        "testsuite",
        name="conformance gate",
        tests=str(len(found)),
        failures=str(found.count("failure")),
        errors=str(found.count("error")),
        skipped=str(found.count("skipped")),
    )
    for row, kind in zip(result.rows, found):
        name = row.benchmark
        case = ElementTree.SubElement(suite, "testcase", classname="conformance.gate", name=name)
        if kind:
            ElementTree.SubElement(case, kind, message=f"{row.verdict}: {row.reason}")
        if row.changes:
            ElementTree.SubElement(case, "system-out").text = "\n".join(map(shown, row.changes))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def write_all(result: GateResult, folder: Path) -> Sequence[Path]:
    """Write the three files into a folder that is made where it is missing; OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        JSON_FILE: json.dumps(result.as_json(), indent=2, allow_nan=False) + "\n",
        SUMMARY_FILE: summary(result),
        JUNIT_FILE: junit(result),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in texts]
