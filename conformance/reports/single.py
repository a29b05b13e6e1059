"""The pages of one run: page, summary and badge."""

from __future__ import annotations

from collections.abc import Iterable

from conformance.reports.badge import badge_files
from conformance.reports.files import PAGE, SUMMARY
from conformance.reports.page import page
from conformance.reports.reader import Report
from conformance.reports.summary import summary_markdown


def pages(report: Report, more: Iterable[str] = ()) -> dict[str, str]:
    """Everything that is made of one stream, by name; ``more`` are lines for the summary."""
    return {
        PAGE: page(report),
        SUMMARY: summary_markdown(report, more),
        **badge_files(report.verdict),
    }
