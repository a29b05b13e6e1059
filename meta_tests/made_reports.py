"""Reports made by hand, for the tests of what is made of reports."""

from __future__ import annotations

import json

from conformance.harness.failures import ConformanceFailure
from conformance.harness.records import make_record
from conformance.harness.verdict import judge
from conformance.reports import stream
from conformance.reports.reader import STREAM, Report, plan_of

CORE, EXTENDED = ("rule.a.one", "rule.a.two"), ("rule.b.one",)
SUITE = dict.fromkeys(CORE, "core") | dict.fromkeys(EXTENDED, "extended")

MEASURED = {
    "name": "output",
    "statistics": [
        {"name": "largest error", "value": 0.41, "limit": 1e-6, "floor": 3e-7},
        {"name": "root mean square", "value": 1e-7, "limit": 1e-6, "floor": 0.0},
        {"name": "worst row", "value": None, "limit": 1e-6, "floor": 5e-7},
        {"name": "gain", "value": 0.0, "limit": 1e-6, "floor": 5e-7},
    ],
    "profiles": [
        {"axis": "heads", "errors": [0.0, 0.41, 1e-7]},
        {"axis": "tokens", "errors": [None, 1e-9] * 100},
    ],
    "limit": 1e-6,
    "floor": 3e-7,
}


def item(slug, device="cpu", level=None):
    """A planned requirement."""
    id = slug if device == "cpu" else f"{slug}[{device}]"
    level = level or SUITE.get(slug, "core")
    return {
        "id": id,
        "slug": slug,
        "level": level,
        "contract": slug.split(".")[0],
        "device": device,
    }


def ended(slug, outcome, reason="because", device="cpu", **fields):
    """The record of a requirement that ended so; ``fields`` replace those of the record."""
    fails = outcome in ("fail", "known_failure")
    error = ConformanceFailure("wrong values", "off by one") if fails else None
    record = make_record(item(slug, device), outcome, reason, duration=0.1, error=error)
    return {**record, **fields}


def diagnosed(*bugs, seen=(), note=None):
    """A diagnosis that names these bugs; each is an id, or two."""
    named = [
        {
            "bugs": [bug] if isinstance(bug, str) else list(bug),
            "mechanism": f"does {bug}.",
            "correct": f"Not {bug}.",
            "source": "paper 7",
        }
        for bug in bugs
    ]
    return {"named": named, "seen": list(seen), "cases": 9, "seconds": 0.4, "note": note}


def header_of(suite, planned, **changes):
    """A header with this suite and these planned ids."""
    return {
        **stream.header(
            implementation={"name": "x", "version": None, "file": None, "chosen_by": "--impl"},
            environment={
                **dict.fromkeys(("python", "torch", "transformers", "hypothesis", "pytest"), "1"),
                **dict.fromkeys(("platform", "machine", "device"), "cpu"),
                "variables": {},
            },
            profile="gate",
            seed=None,
            smoke=False,
            planned=planned,
            suite=suite,
            required=(),
        ),
        **changes,
    }


def report_of(records, suite=None, planned=None, **changes):
    """A whole report of these records, judged; ``changes`` are fields of its header."""
    suite = suite or {record["slug"]: record["level"] for record in records}
    head = header_of(suite, planned or [record["id"] for record in records], **changes)
    return Report(head, list(records), stream.footer(judge(plan_of(head), records)))


def three(*outcomes, **changes):
    """A report of the three requirements of the suite, ended so."""
    return report_of([ended(s, o) for s, o in zip(SUITE, outcomes)], SUITE, **changes)


def saved(report, folder):
    """Write the stream of a report into a folder, which is given back."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [report.header, *report.records, report.footer]
    (folder / STREAM).write_text("".join(map(stream.as_line, lines)), "utf-8")
    return folder


def lines_of(folder):
    """The lines of a stream as values."""
    return [json.loads(line) for line in (folder / STREAM).read_text("utf-8").splitlines()]


def rewrite(folder, lines):
    """Write other lines in place of a stream."""
    (folder / STREAM).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
