"""The report of a run: a stream of lines, its reader, and a summary for people.

``report.jsonl`` is header → one record a requirement → footer, each line flushed as it is written.
A stream without a footer is that of a run which did not end: :func:`read_report` refuses it, as it
refuses every stream that contradicts itself.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.harness.records import (
    DECLINED,
    INCONCLUSIVE,
    LEDGER_MISMATCH,
    NOT_OFFERED,
    NOT_RUN,
    OUTCOMES,
    RED,
)
from conformance.harness.verdict import WORDS, Verdict

if TYPE_CHECKING:
    from conformance.harness.numerics_run import NumericsRun

SCHEMA_VERSION = 1

STREAM = "report.jsonl"
SUMMARY = "summary.md"

MOST_LINES = 40
"""Failures and reasons that a summary shows before it says how many more there are."""


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


class DuplicatedRecord(ReportError):
    """Two records are about the same planned requirement."""


class NotPlanned(ReportError):
    """A record is about a requirement that the header did not plan."""


class Inconsistent(ReportError):
    """The footer contradicts the records."""


class ReportWriter:
    """Appends lines to ``report.jsonl`` in a folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and forget what an earlier run left there; OSError if that cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in (STREAM, SUMMARY):
            # Emptied at once: an earlier run's verdict must not outlive a crash of this one.
            (folder / name).write_text("", "utf-8")

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and flush it."""
        with (self.folder / STREAM).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def finish(
        self,
        header: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]],
        verdict: Verdict,
        numerics: NumericsRun | None = None,
    ):
        """Write the footer and the summary, with what the numerics ledger says."""
        self.append(footer(verdict, numerics.summary() if numerics else None))
        more = numerics.markdown() if numerics else []
        text = summary_markdown(header, list(records), verdict, more)
        (self.folder / SUMMARY).write_text(text, "utf-8")


def header(
    *,
    implementation: Mapping[str, Any],
    environment: Mapping[str, Any],
    profile: str,
    seed: str | None,
    smoke: bool,
    planned: Iterable[str],
    suite: Mapping[str, str],
    required: Iterable[str],
) -> dict[str, Any]:
    """The first line of a stream."""
    from conformance import __version__

    return {
        "type": "header",
        "schema": SCHEMA_VERSION,
        "suite_version": __version__,
        "implementation": dict(implementation),
        "environment": dict(environment),
        "profile": profile,
        "seed": seed,
        "smoke": smoke,
        "planned": list(planned),
        "suite": dict(suite),
        "required": list(required),
    }


def footer(verdict: Verdict, numerics: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The last line of a stream; counts of the numerics ledger where it was checked."""
    return {
        "type": "footer",
        "counts": verdict.counts,
        "verdict": verdict.verdict,
        "why": verdict.why,
        "exit_code": verdict.exit_code,
        **({"numerics": dict(numerics)} if numerics else {}),
    }


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


def read_report(path: Path | str) -> Report:
    """The report in a folder or file; a :class:`ReportError` says in a sentence what is wrong."""
    path = Path(path)
    path = path / STREAM if path.is_dir() else path
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise NotAReport(f"There is no report at {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise NotAReport(f"The report {path} cannot be read ({error}).") from None
    lines = [_parse(line, number, path) for number, line in enumerate(text.splitlines(), 1)]
    if not lines or lines[0].get("type") != "header":
        raise NotAReport(f"The report {path} does not begin with a header.")
    first = lines[0]
    if first.get("schema") != SCHEMA_VERSION:
        raise UnknownSchema(
            f"The report {path} has schema version {first.get('schema')!r}; "
            f"this reader knows version {SCHEMA_VERSION}."
        )
    if lines[-1].get("type") != "footer":
        raise NoFooter(
            f"The report {path} has no footer: the run did not end, so it has no verdict."
        )
    for number, line in enumerate(lines, 1):
        _check_fields(line, number, path)
    records = lines[1:-1]
    _check_records(records, set(first["planned"]), path)
    _check_footer(records, first, lines[-1], path)
    return Report(first, records, lines[-1])


_FIELDS = {
    "header": ("suite_version", "implementation", "environment", "profile", "planned", "suite"),
    "record": ("id", "slug", "level", "contract", "outcome", "drawn", "executed", "comparisons"),
    "footer": ("counts", "verdict", "why", "exit_code"),
}


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise BrokenLine(
            f"Line {number} of {path} is not JSON: it was cut off or damaged."
        ) from None
    if not isinstance(value, dict):
        raise BrokenLine(f"Line {number} of {path} is not a JSON object.")
    return value


def _check_fields(line: dict[str, Any], number: int, path: Path) -> None:
    kind = line.get("type")
    missing = [name for name in _FIELDS.get(kind, ()) if name not in line]
    if kind not in _FIELDS or missing:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown type {kind!r}"
        raise BrokenLine(f"Line {number} of {path} {what}.")
    if kind == "record" and line["outcome"] not in OUTCOMES:
        raise BrokenLine(f"Line {number} of {path} has the unknown outcome {line['outcome']!r}.")


def _check_records(records: list[dict[str, Any]], planned: set[str], path: Path) -> None:
    seen: set[str] = set()
    for record in records:
        if record["type"] != "record":
            raise Inconsistent(f"The report {path} has a {record['type']} between its records.")
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
    counted = {o: n for o, n in last["counts"].get("outcomes", {}).items() if n}
    if counted != dict(outcomes):
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


def counts_line(counts: Mapping[str, Any]) -> str:
    """Counts of outcomes in one line, with the denominator."""
    shown = [f"{n} {WORDS[o]}" for o, n in counts["outcomes"].items() if n]
    if counts["deselected"]:
        shown.append(f"{counts['deselected']} deselected")
    missing = counts["planned"] - counts["reported"]
    if missing:
        shown.append(f"{missing} never reported")
    return f"{', '.join(shown) or 'nothing'}; {counts['suite']} requirements in the suite"


def cases_line(counts: Mapping[str, Any]) -> str:
    """Counts of cases and comparisons in one line."""
    lanes = ", ".join(f"{n} {lane}" for lane, n in sorted(counts["comparisons"].items()))
    cases = counts["cases"]
    executed = f"{cases['executed']} of {cases['drawn']} drawn cases executed"
    return f"{executed}; comparisons: {lanes or 'none'}"


def failures(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Id and one line for everything that is red."""
    return [(r["id"], r["reason"]) for r in records if r["outcome"] in RED]


def not_checked(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(outcome, reason, ids) for what did not run, requirements with one reason together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if record["outcome"] in (NOT_OFFERED, DECLINED, INCONCLUSIVE, NOT_RUN):
            groups[record["outcome"], record["reason"]].append(record["id"])
    return [(outcome, reason, ids) for (outcome, reason), ids in groups.items()]


def partly_declined(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Reason to number of requirements that ran, though some of their cases were declined."""
    reasons: Counter[str] = Counter()
    for record in records:
        if record["executed"]:
            reasons.update(record["declined"].keys())
    return dict(reasons)


def known_failures(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Id and one line for every known failure."""
    return [(r["id"], r["reason"]) for r in records if r["outcome"] == "known_failure"]


def summary_markdown(
    first: Mapping[str, Any],
    records: list[Mapping[str, Any]],
    verdict: Verdict,
    more: Iterable[str] = (),
) -> str:
    """A summary that fits a comment on a pull request; ``more`` are lines of other sections."""
    implementation = first["implementation"]
    version = f" {implementation['version']}" if implementation["version"] else ""
    lines = [
        f"## Conformance: {verdict.verdict}",
        "",
        f"`{implementation['name']}`{version}: {_cell(verdict.why)}.",
        "",
        "| | core | extended |",
        "|---|---:|---:|",
    ]
    levels = verdict.counts["levels"]
    ends = [*OUTCOMES, "deselected", "missing"]
    for end in ends:
        numbers = [levels[level].get(end, 0) for level in ("core", "extended")]
        if any(numbers):
            cells = [f"{n} of {levels[level]['suite']}" for n, level in zip(numbers, levels)]
            lines.append(f"| {WORDS[end]} | {cells[0]} | {cells[1]} |")
    lines += ["", f"{cases_line(verdict.counts)}.".capitalize()]
    red = failures(records)
    if red:
        lines += ["", "### Failed", "", *_bullets(f"`{id}`: {_cell(why)}" for id, why in red)]
    known = known_failures(records)
    if known:
        lines += [
            "",
            "### Known failures",
            "",
            *_bullets(f"`{i}`: {_cell(why)}" for i, why in known),
        ]
    unchecked = not_checked(records)
    if unchecked or verdict.counts["deselected"]:
        lines += ["", "### Not checked", ""]
        lines += _bullets(
            f"{WORDS[outcome]}, {len(ids)}: {_cell(why)} ({_some_ids(ids)})"
            for outcome, why, ids in unchecked
        )
        if verdict.counts["deselected"]:
            lines.append(f"- deselected, {verdict.counts['deselected']}")
    lines += ["", *more, _ran_on(first), ""]
    return "\n".join(lines)


def _ran_on(first: Mapping[str, Any]) -> str:
    environment = first["environment"]
    names = ("python", "torch", "transformers", "hypothesis")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name))
    seed = f", seed {first['seed']}" if first["seed"] is not None else ""
    return (
        f"model-conformance {first['suite_version']}, profile {first['profile']}{seed}; "
        f"{versions}; {environment['platform']}, {environment['device']}"
    )


def _bullets(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    shown = [f"- {line}" for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"- … and {len(lines) - MOST_LINES} more")
    return shown


def _some_ids(ids: list[str]) -> str:
    more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
    return ", ".join(f"`{id}`" for id in ids[:4]) + more


def _cell(text: str, width: int = 200) -> str:
    """One line of Markdown that no text of an implementation can break out of."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return line if len(line) <= width else line[: width - 1] + "…"


def terminal_lines(records: list[Mapping[str, Any]], verdict: Verdict) -> list[tuple[str, str]]:
    """(colour, line) for the end of a run in a terminal; compact."""
    colour = {"pass": "green", "partial": "yellow", "fail": "red", "inconclusive": "yellow"}
    lines = [(colour[verdict.verdict], f"verdict {verdict.line}")]
    lines.append(("", f"counts  {counts_line(verdict.counts)}"))
    lines.append(("", f"cases   {cases_line(verdict.counts)}"))
    for id, why in failures(records)[:MOST_LINES]:
        lines.append(("red", f"failed  {id} - {_plain(why)}"))
    more = len(failures(records)) - MOST_LINES
    if more > 0:
        lines.append(("red", f"failed  … and {more} more"))
    for id, why in known_failures(records)[:MOST_LINES]:
        lines.append(("yellow", f"known   {id} - {_plain(why)}"))
    for outcome, why, ids in not_checked(records)[:MOST_LINES]:
        what = ids[0] if len(ids) == 1 else f"{len(ids)} requirements"
        lines.append(("yellow", f"{WORDS[outcome]}: {what}: {_plain(why)}"))
    for why, number in sorted(partly_declined(records).items())[:MOST_LINES]:
        plural = "s" * (number != 1)
        lines.append(("", f"declined in part: {number} requirement{plural}: {_plain(why)}"))
    return lines


def _plain(text: str, width: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


__all__ = [
    "LEDGER_MISMATCH",
    "SCHEMA_VERSION",
    "BrokenLine",
    "DuplicatedRecord",
    "Inconsistent",
    "NoFooter",
    "NotAReport",
    "NotPlanned",
    "Report",
    "ReportError",
    "ReportWriter",
    "UnknownSchema",
    "read_report",
]
