"""``python -m conformance report`` and ``merge``: pages of reports, and one report of several parts.

    report A [--output DIR]               the pages of one report, beside it or in DIR
    report A B C [--output DIR]           several implementations side by side
    report --before X --after Y [--output DIR]   what changed; exit status 1 where something is worse
    merge A B C D --output DIR            one report of a run that was split over several runners

A report is a folder with a report.jsonl, or such a file. Without --output what is made of more than one
report is printed as Markdown and nothing is written. The exit status of merge is that of the whole run;
a mistake is one line, and exit status 4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conformance.harness.verdict import FAILED, OK, USAGE
from conformance.reports.files import SUMMARY, forget_pages, same_report, write_pages
from conformance.reports.reader import STREAM, ReportError, read_report


class Mistake(ValueError):
    """A command that cannot be carried out; the message is one line."""


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT", help="folder or file")
    parser.add_argument("--before", type=Path, metavar="REPORT", help="what to compare with")
    parser.add_argument("--after", type=Path, metavar="REPORT", help="the report of now")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the pages")


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``merge``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="folder or file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="the run was a selection: requirements may be in no part, and count as deselected",
    )


def run(options: argparse.Namespace) -> int:
    """Carry out one of the commands; the exit status."""
    try:
        return merge(options) if options.command == "merge" else report(options)
    except (Mistake, ReportError) as error:
        print(f"conformance {options.command}: {_one_line(error)}", file=sys.stderr)
        return USAGE


def report(options: argparse.Namespace) -> int:
    """Write or print the pages of one report, of several, or of what changed."""
    changed = options.before is not None or options.after is not None
    if changed and (options.reports or options.before is None or options.after is None):
        raise Mistake("--before and --after go together, without other reports")
    if changed:
        return _changes(options.before, options.after, options.output)
    if not options.reports:
        raise Mistake("name a report, several, or --before and --after")
    if len(options.reports) > 1:
        return _several(options.reports, options.output)
    from conformance.reports.single import pages

    (path,) = options.reports
    found = read_report(path)
    folder = options.output or (path if path.is_dir() else path.parent)
    _refuse_foreign_stream(folder, [path])
    _write(folder, pages(found))
    print(f"{found.name}: {found.verdict.line}")
    return OK


def merge(options: argparse.Namespace) -> int:
    """Write one report, with its pages, of the parts of a run; the exit status is the run's."""
    from conformance.reports import merging
    from conformance.reports.single import pages
    from conformance.reports.stream import as_line

    parts = [(path, read_report(path)) for path in options.reports]
    if any(same_report(options.output, path) for path in options.reports):
        raise Mistake(f"--output: {options.output} holds one of the parts")
    merged, notes = merging.merge(parts, partial=options.partial)
    lines = map(as_line, (merged.header, *merged.records, merged.footer))
    _forget(options.output)
    _write(options.output, {STREAM: "".join(lines), **pages(merged)})
    for note in notes:
        print(_one_line(note))
    print(f"{merged.name}: {merged.verdict.line}")
    return merged.verdict.exit_code


def _several(paths: Sequence[Path], output: Path | None) -> int:
    from conformance.reports.several import side_by_side
    from conformance.reports.several_pages import pages

    several = side_by_side([(path, read_report(path)) for path in paths])
    _write_or_print(output, pages(several))
    if output is not None:
        differ = sum(row.differs for row in several.rows)
        names, rows = len(several.names), len(several.rows)
        print(f"{names} implementations differ in {differ} of {rows} requirements")
    return OK


def _changes(before: Path, after: Path, output: Path | None) -> int:
    from conformance.reports.changes import compare
    from conformance.reports.changes_pages import headline, pages

    changes = compare(read_report(before), read_report(after))
    _write_or_print(output, pages(changes))
    if output is not None:
        print(headline(changes))
    return FAILED if changes.worse else OK


def _write_or_print(output: Path | None, texts: Mapping[str, str]) -> None:
    if output is None:
        print(texts[SUMMARY], end="")
        return
    _refuse_foreign_stream(output, [])
    _forget(output)
    _write(output, texts)


def _refuse_foreign_stream(folder: Path, ours: Sequence[Path]) -> None:
    """Pages beside a stream are taken for pages of it."""
    if (folder / STREAM).exists() and not any(same_report(folder, path) for path in ours):
        raise Mistake(f"--output: {folder} holds another report, choose another folder")


def _forget(folder: Path) -> None:
    try:
        if folder.is_dir():
            forget_pages(folder)
    except OSError as error:
        raise Mistake(_not_written(folder, error)) from None


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    try:
        write_pages(folder, texts)
    except OSError as error:
        raise Mistake(_not_written(folder, error)) from None


def _not_written(folder: Path, error: OSError) -> str:
    return f"--output: cannot write to {folder}: {error.strerror or error}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
