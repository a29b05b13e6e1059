"""The files of a report beside its stream: none of them outlives the run it is of, or is there half."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from conformance.reports.reader import STREAM
from reference_impl.atomic_files import write_atomically

PAGE, SUMMARY = "report.html", "summary.md"
BADGE_IMAGE, BADGE_DATA = "badge.svg", "badge.json"

PAGES = (PAGE, SUMMARY, BADGE_IMAGE, BADGE_DATA)
"""Everything that is made of a stream."""


def forget_pages(folder: Path) -> None:
    """Remove the pages of an earlier run; OSError where that cannot be."""
    for name in PAGES:
        (folder / name).unlink(missing_ok=True)


def write_pages(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write pages by name into a folder that is made where it is missing; OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        encoded = text.encode("utf-8", "backslashreplace")
        write_atomically(folder / name, lambda file, encoded=encoded: file.write(encoded))
    return [folder / name for name in texts]


def same_report(folder: Path, path: Path) -> bool:
    """Whether the report that ``path`` names is the one of ``folder``."""
    file = path / STREAM if path.is_dir() else path
    return file.resolve() == (folder / STREAM).resolve()
