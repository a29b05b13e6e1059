"""The stream of a run: header → one record a requirement → footer, each line flushed as it is written.

A stream without a footer is that of a run which did not end. Every page is made of a stream, so the
writer of the stream also forgets the pages that an earlier run left in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.reports.reader import SCHEMA_VERSION, STREAM, Report

if TYPE_CHECKING:
    from conformance.harness.numerics_run import NumericsRun
    from conformance.harness.verdict import Verdict


class ReportWriter:
    """Appends lines to ``report.jsonl`` in a folder, and writes the pages at the end."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and forget what an earlier run left there; OSError if that cannot be."""
        from conformance.reports.files import forget_pages

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # At once: an earlier run's verdict must not outlive a crash of this one.
        (folder / STREAM).write_text("", "utf-8")
        forget_pages(folder)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line and flush it."""
        # Half a surrogate pair in a message has no encoding; escaped it is JSON all the same.
        with (self.folder / STREAM).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(as_line(line))

    def finish(
        self,
        header: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]],
        verdict: Verdict,
        numerics: NumericsRun | None = None,
    ) -> None:
        """Write the footer and the pages, with what the numerics ledger says."""
        from conformance.reports.files import write_pages
        from conformance.reports.single import pages

        last = footer(verdict, numerics.summary() if numerics else None)
        self.append(last)
        report = Report(dict(header), [dict(record) for record in records], last)
        more = numerics.markdown() if numerics else []
        write_pages(self.folder, pages(report, more))


def as_line(line: Mapping[str, Any]) -> str:
    """One line of a stream; ValueError for numbers that JSON does not have."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


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
