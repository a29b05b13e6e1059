"""Reading a stream, and taking nothing in it on trust.

:func:`read_report` refuses a stream that has no footer, is cut off, holds lines of two runs, or
contradicts itself. Each way has an error of its own, whose message is one sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from conformance.harness.records import OUTCOMES, RED
from conformance.harness.verdict import Plan, Verdict, judge

SCHEMA_VERSION = 2
"""Version 2: a record has ``diagnosis``, its failure ``measured``."""

STREAM = "report.jsonl"


class ReportError(ValueError):
    """A report that cannot be relied on."""


class NotAReport(ReportError):
    """The file is missing, empty, or does not begin with a header."""


class UnknownSchema(ReportError):
    """The report was written in a version of the schema that this reader does not know."""


class BrokenLine(ReportError):
    """A line is cut off, is no JSON, or lacks what its type of line must have."""


class NoFooter(ReportError):
    """The run did not end, so it has no verdict."""


class MixedRuns(ReportError):
    """Lines of more than one run are in one file."""


class DuplicatedRecord(ReportError):
    """Two records are about the same planned requirement."""


class NotPlanned(ReportError):
    """A record is about a requirement that the header did not plan."""


class Inconsistent(ReportError):
    """The footer contradicts the records."""


@dataclass(frozen=True)
class Report:
    """A whole stream."""

    header: dict[str, Any]
    records: list[dict[str, Any]]
    footer: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        """The verdict in the footer."""
        f = self.footer
        return Verdict(f["verdict"], f["why"], f["exit_code"], f["counts"])

    @property
    def name(self) -> str:
        """The implementation, with its version where it has one."""
        implementation = self.header["implementation"]
        version = implementation.get("version")
        return f"{implementation['name']} {version}" if version else implementation["name"]


def read_report(path: Path | str) -> Report:
    """The report in a folder or file; a :class:`ReportError` says in a sentence what is wrong."""
    path = Path(path)
    path = path / STREAM if path.is_dir() else path
    lines = [_parse(line, number, path) for number, line in enumerate(_lines(path), 1)]
    if not lines or lines[0].get("type") != "header":
        raise NotAReport(f"The report {path} does not begin with a header.")
    first = lines[0]
    if first.get("schema") != SCHEMA_VERSION:
        raise UnknownSchema(
            f"The report {path} has schema version {first.get('schema')!r}; "
            f"this reader knows version {SCHEMA_VERSION}."
        )
    for number, line in enumerate(lines, 1):
        _check_fields(line, number, path)
    _check_one_run(lines, path)
    if lines[-1]["type"] != "footer":
        raise NoFooter(
            f"The report {path} has no footer: the run did not end, so it has no verdict."
        )
    records = lines[1:-1]
    _check_records(records, first, path)
    _check_footer(records, first, lines[-1], path)
    return Report(first, records, lines[-1])


def plan_of(first: Mapping[str, Any]) -> Plan:
    """What the run of a header set out to check."""
    return Plan(
        planned=tuple({"id": id, "slug": slug_of(id)} for id in first["planned"]),
        suite=first["suite"],
        required=tuple(first["required"]),
        smoke=first["smoke"],
    )


def slug_of(id: str) -> str:
    """The slug in the id of a planned requirement, which may add a device and a number."""
    return re.split(r"[\[#]", id, maxsplit=1)[0]


_TEXT, _MAYBE_TEXT, _NUMBER = (str,), (str, NoneType), (int, float)

_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "header": {
        "suite_version": _TEXT,
        "implementation": (dict,),
        "environment": (dict,),
        "profile": _TEXT,
        "seed": _MAYBE_TEXT,
        "smoke": (bool,),
        "planned": (list,),
        "suite": (dict,),
        "required": (list,),
    },
    "record": {
        "id": _TEXT,
        "slug": _TEXT,
        "level": _TEXT,
        "contract": _TEXT,
        "device": _TEXT,
        "outcome": _TEXT,
        "reason": _TEXT,
        "drawn": (int,),
        "executed": (int,),
        "declined": (dict,),
        "inconclusive": (dict,),
        "comparisons": (dict,),
        "closest": (int, float, NoneType),
        "duration": _NUMBER,
        "failure": (dict, NoneType),
        "ledger": (dict, NoneType),
    },
    "footer": {"counts": (dict,), "verdict": _TEXT, "why": _TEXT, "exit_code": (int,)},
}
"""What every line must have, and of which type. The schema says more, and is for tests."""

_INSIDE = {
    "implementation": {"name": _TEXT, "version": _MAYBE_TEXT},
    "environment": {"torch": _MAYBE_TEXT, "platform": _TEXT, "device": _TEXT, "variables": (dict,)},
    "failure": {"kind": _TEXT, "summary": _TEXT, "details": (list,), "reproduction": (list,)},
    "ledger": {"reason": _TEXT, "issue": _TEXT, "expires": _TEXT},
    "diagnosis": {"named": (list,), "seen": (list,)},
    "measured": {"statistics": (list,), "profiles": (list,)},
}
"""The same for what is inside a field, where it is not null."""


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): it also splits at separators that JSON allows inside a text.
        return [line for line in path.read_text("utf-8").split("\n") if line]
    except FileNotFoundError:
        raise NotAReport(f"There is no report at {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NotAReport(f"The report {path} cannot be read ({error}).") from None


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise BrokenLine(
            f"Line {number} of {path} is not JSON: it was cut off or damaged."
        ) from None
    if not isinstance(value, dict):
        raise BrokenLine(f"Line {number} of {path} is not a JSON object.")
    return value


def _check_fields(line: dict[str, Any], number: int, path: Path) -> None:
    kind = line.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise BrokenLine(f"Line {number} of {path} has the unknown type {kind!r}.")
    _check_types(line, _FIELDS[kind], "", number, path)
    _check_items(line, number, path)
    for name in ("implementation", "environment", "failure", "ledger", "diagnosis"):
        if isinstance(line.get(name), dict):
            _check_types(line[name], _INSIDE[name], f"{name}.", number, path)
    if kind == "record":
        if line["outcome"] not in OUTCOMES:
            what = f"has the unknown outcome {line['outcome']!r}"
            raise BrokenLine(f"Line {number} of {path} {what}.")
        measured = (line["failure"] or {}).get("measured")
        if isinstance(measured, dict):
            _check_types(measured, _INSIDE["measured"], "failure.measured.", number, path)
    if kind == "footer" and line["verdict"] not in ("pass", "partial", "fail", "inconclusive"):
        what = f"has the unknown verdict {line['verdict']!r}"
        raise BrokenLine(f"Line {number} of {path} {what}.")


def _check_types(
    values: Mapping[str, Any],
    types: Mapping[str, tuple[type, ...]],
    prefix: str,
    number: int,
    path: Path,
) -> None:
    missing = [prefix + name for name in types if name not in values]
    if missing:
        raise BrokenLine(f"Line {number} of {path} lacks {', '.join(missing)}.")
    for name, allowed in types.items():
        value = values[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(_JSON_NAMES[kind] for kind in allowed)
            raise BrokenLine(
                f"Line {number} of {path}: {prefix}{name} is {type(value).__name__}, not {wanted}."
            )


_ITEMS = {
    "planned": str,
    "required": str,
    "suite": str,
    "declined": int,
    "inconclusive": int,
    "comparisons": int,
}
"""What lists and the values of objects consist of."""


def _check_items(line: dict[str, Any], number: int, path: Path) -> None:
    for name, kind in _ITEMS.items():
        items = line.get(name, [])
        for item in items.values() if isinstance(items, dict) else items:
            if not isinstance(item, kind):
                raise BrokenLine(
                    f"Line {number} of {path}: {name} has {type(item).__name__} in it, "
                    f"not {_JSON_NAMES[kind]}."
                )


_JSON_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    NoneType: "null",
}


def _check_one_run(lines: list[dict[str, Any]], path: Path) -> None:
    for number, line in enumerate(lines[1:], 2):
        if line["type"] == "header":
            raise MixedRuns(
                f"Line {number} of {path} is a second header: lines of two runs are in one file."
            )
        if line["type"] == "footer" and number < len(lines):
            raise MixedRuns(
                f"Line {number} of {path} is a footer before the end: lines of two runs are in one "
                "file."
            )


def _check_records(records: list[dict[str, Any]], first: dict[str, Any], path: Path) -> None:
    planned, seen = set(first["planned"]), set()
    for record in records:
        if record["id"] not in planned:
            raise NotPlanned(
                f"The report {path} has a record of {record['id']}, which was not planned."
            )
        if record["id"] in seen:
            raise DuplicatedRecord(f"The report {path} has two records of {record['id']}.")
        seen.add(record["id"])


def _check_footer(
    records: list[dict[str, Any]], first: dict[str, Any], last: dict[str, Any], path: Path
) -> None:
    outcomes = Counter(record["outcome"] for record in records)
    counted = last["counts"].get("outcomes", {})
    if not isinstance(counted, dict) or {o: n for o, n in counted.items() if n} != dict(outcomes):
        raise Inconsistent(f"The footer of {path} counts other outcomes than its records have.")
    green = last["verdict"] in ("pass", "partial")
    if green and len(records) < len(first["planned"]):
        missing = len(first["planned"]) - len(records)
        raise Inconsistent(
            f"The footer of {path} says {last['verdict']}, but {missing} planned requirements have "
            "no record."
        )
    if green and RED & outcomes.keys():
        raise Inconsistent(f"The footer of {path} says {last['verdict']} in spite of failures.")
    again = judge(plan_of(first), records)
    for name, count in again.counts.items():
        if last["counts"].get(name) != count:
            raise Inconsistent(
                f"The footer of {path} counts {name.replace('_', ' ')} otherwise than its records."
            )
    if (again.verdict, again.exit_code) != (last["verdict"], last["exit_code"]):
        raise Inconsistent(
            f"The footer of {path} says {last['verdict']} with exit code {last['exit_code']}, but "
            f"its records make it {again.verdict} with {again.exit_code}."
        )


__all__ = [
    "SCHEMA_VERSION",
    "STREAM",
    "BrokenLine",
    "DuplicatedRecord",
    "Inconsistent",
    "MixedRuns",
    "NoFooter",
    "NotAReport",
    "NotPlanned",
    "Report",
    "ReportError",
    "UnknownSchema",
    "plan_of",
    "read_report",
    "slug_of",
]
