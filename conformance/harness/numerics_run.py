"""The numerics ledger in one run: its options, its files, and what the run says of it at the end.

Lives in the process that reports. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.harness.numerics import (
    FACTOR,
    NEGLIGIBLE,
    Comparison,
    Entry,
    NumericsError,
    Recording,
    Row,
    compare,
    must_match,
    parse,
)
from conformance.harness.verdict import FAILED, OK, TOO_FEW, USAGE

if TYPE_CHECKING:
    import pytest

ATTRIBUTE = "conformance_numerics"
"""Attribute of pytest's report that carries the comparisons of a requirement, from workers too."""

MOST_ROWS = 40
"""Rows of the table that are shown before it says how many more there are."""

CLOSEST = 3
"""Rows that are shown where none is worse."""

UNFINISHED = (2, 3)
"""pytest's exit statuses of a run that was interrupted or broke: it is no base for another."""

Line = tuple[str, str]
"""Colour ('' for none) and text."""


class NumericsRun:
    """Gathers what requirements measured; at the end records it, checks it, or both."""

    def __init__(self, record: str | None, check: str | None, factor: float | None = None) -> None:
        """Read the base and make sure of the place to write to; NumericsError where that fails."""
        if record and check and Path(record).resolve() == Path(check).resolve():
            raise NumericsError(
                f"--numerics-record and --numerics-check are both {check}: a base would be "
                "replaced by the run that is checked with it"
            )
        if factor and not check:
            raise NumericsError("--numerics-factor needs a base: --numerics-check FILE")
        self.record = record
        self.check = check
        self.factor = factor or FACTOR
        # Absolute from the start: a test may change the working directory.
        self.base = read_base(Path(check).absolute()) if check else None
        self.target = writable(Path(record).absolute()) if record else None
        self.made_by: Mapping[str, Any] = {}
        self.planned: tuple[str, ...] = ()
        self.entries: dict[str, Entry] = {}
        self.comparison: Comparison | None = None
        self.lines: list[Line] = []
        """What the terminal shows, once the run has ended."""

    def begin(self, made_by: Mapping[str, Any], planned: Iterable[str]) -> None:
        """Take what the run is; NumericsError where the base cannot be held against it."""
        if self.base is not None:
            must_match(self.base, made_by, self.check)
        self.made_by, self.planned = made_by, tuple(planned)

    def take(self, id: str, entry: Entry | None) -> None:
        """Take the comparisons of a requirement that passed."""
        if entry:
            self.entries[id] = entry

    def finish(self, exitstatus: int) -> int:
        """Compare and write, and give the exit status of the run, which is never made better."""
        head = Recording(self.made_by, self.entries)
        ours = [self._check(head) if self.base else OK]
        if self.target is not None:
            ours.append(self._record(head, exitstatus))
        return exitstatus or next((status for status in ours if status), OK)

    def _check(self, head: Recording) -> int:
        self.comparison = compare(self.base, head, self.planned, self.factor)
        self.lines += comparison_lines(self.comparison, self.check)
        if not self.comparison.common:
            return TOO_FEW
        return FAILED if self.comparison.worse else OK

    def _record(self, head: Recording, exitstatus: int) -> int:
        if exitstatus in UNFINISHED:
            self.lines.append(("red", "numerics  not recorded: the run did not end"))
            return OK
        if not head.comparisons:
            why = "no requirement that passed compares values with the oracle"
            self.lines.append(("red", f"numerics  not recorded: {why}"))
            return TOO_FEW
        try:
            write(self.target, head.text())
        except OSError as error:
            why = f"cannot write {self.record}: {error.strerror or error}"
            self.lines.append(("red", f"numerics  not recorded: {why}"))
            return USAGE
        counted = f"{head.comparisons} comparisons of {_requirements(len(self.entries))}"
        self.lines.append(("", f"numerics  recorded {counted} in {self.record}"))
        return OK

    def summary(self) -> dict[str, Any] | None:
        """Counts of the check for the footer of the report; None where nothing was checked."""
        if self.comparison is None:
            return None
        return {
            "base": str(self.check),
            "factor": self.factor,
            "worse": len({row.id for row in self.comparison.worse}),
            "requirements": self.comparison.requirements,
            "common": self.comparison.common,
            "only_base": self.comparison.only_base,
            "only_head": self.comparison.only_head,
        }

    def markdown(self) -> list[str]:
        """Lines of Markdown for the summary of the run."""
        if not self.lines:
            return []
        said = [text.removeprefix("numerics").strip() for _, text in self.lines if _is_said(text)]
        lines = ["### Numerics", "", *(f"- {text}" for text in said), ""]
        rows = _shown(self.comparison) if self.comparison else []
        if rows:
            lines += [
                "| requirement | lane | statistic | base | head | factor |",
                "|---|---|---|---:|---:|---:|",
                *(
                    f"| `{row.id}` | {row.lane} | {row.statistic} | {row.base:.3g} | "
                    f"{row.head:.3g} | {row.factor:.2f} |"
                    for row in rows
                ),
                "",
            ]
        return lines


def asks_for_numerics(config: pytest.Config) -> bool:
    """Whether the errors of comparisons are to be recorded or checked."""
    return any(map(config.getoption, ("numerics_record", "numerics_check", "numerics_factor")))


def read_base(path: Path) -> Recording:
    """The recording in a file; NumericsError in one line where there is none."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise NumericsError(
            f"--numerics-check: there is no file {path}; make it with --numerics-record"
        ) from None
    except UnicodeDecodeError:
        raise NumericsError(
            f"--numerics-check: {path} is not a file of --numerics-record (no text)"
        ) from None
    except OSError as error:
        raise NumericsError(
            f"--numerics-check: cannot read {path}: {error.strerror or error}"
        ) from None
    return parse(text, path)


def writable(path: Path) -> Path:
    """``path``, whose folder is made where needed; NumericsError where no file can be written."""
    wrong = lambda why: NumericsError(f"--numerics-record: cannot write {path}: {why}")
    if path.exists() and not path.is_file():
        raise wrong("it is not a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrong(error.strerror or error) from None
    if not os.access(path.parent, os.W_OK):
        raise wrong("its folder is not writable")
    return path


def write(path: Path, text: str) -> None:
    """Write a whole file or none: a base that is cut off must not take an older one's place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def comparison_lines(found: Comparison, base: str) -> list[Line]:
    """What the terminal shows of a comparison with the file ``base``."""
    notes = [("yellow", f"numerics  {text}") for text in found.differences]
    apart = f"{found.only_base} comparisons only in the base, {found.only_head} only in this run"
    if not found.common:
        return [("red", f"numerics  nothing in common with {base}: {apart}"), *notes]
    worse = len({row.id for row in found.worse})
    verdict = (
        f"numerics  worse in {worse} of {_requirements(found.requirements)}: limit "
        f"{found.limit:g} times the base, {found.common} comparisons in common"
    )
    lines = [("red" if worse else "green", verdict)]
    if found.only_base or found.only_head:
        lines.append(("yellow", f"numerics  not compared: {apart}"))
    return [*lines, *notes, *(("", text) for text in table(found))]


def table(found: Comparison) -> list[str]:
    """The rows that are worse, or else the closest to it, as lines of equal width."""
    rows = _shown(found)
    if not rows:
        return []
    width = max(len("requirement"), *(len(row.id) for row in rows))
    least = ", ".join(f"{share:g} ({lane})" for lane, share in NEGLIGIBLE.items())
    lines = [
        f"  errors as shares of the floor; less than {least} counts as that",
        f"  {'requirement':<{width}}  {'lane':<9}  {'statistic':<16}"
        f"{'base':>9}{'head':>9}{'factor':>9}",
        *(
            f"  {row.id:<{width}}  {row.lane:<9}  {row.statistic:<16}"
            f"{row.base:>9.3g}{row.head:>9.3g}{row.factor:>9.2f}"
            for row in rows
        ),
    ]
    more = len(found.worse) - len(rows)
    return [*lines, f"  … and {more} more"] if more > 0 else lines


def _shown(found: Comparison) -> list[Row]:
    if found.worse:
        return list(found.worse[:MOST_ROWS])
    return [row for row in found.rows[:CLOSEST] if row.factor > 1]


def _is_said(text: str) -> bool:
    """Whether a line of the terminal is a sentence, not one of the table."""
    return text.startswith("numerics")


def _requirements(number: int) -> str:
    return f"{number} requirement{'s' * (number != 1)}"
