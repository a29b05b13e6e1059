"""Known failures: written down with a reason and an end date, and strict.

Entries are ``[[tool.conformance.known_failures]]`` in the user's pyproject.toml, and
``[[known_failures]]`` in ``conformance/implementations/known_failures.toml`` for bundled adapters.
A requirement with an entry must fail, and as the entry says; passing, failing differently and
expired entries are red, and an entry that means nothing is a usage error. Imports no torch itself.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.harness.records import (
    DECLINED,
    FAIL,
    KNOWN_FAILURE,
    LEDGER_MISMATCH,
    NOT_OFFERED,
    PASS,
)
from conformance.harness.resolve import close

NEEDED = {"requirement": str, "reason": str, "issue": str, "expires": datetime.date}
OPTIONAL = {"kind": str, "looks_like": str, "implementation": str, "device": str}

DEVICES = ("cpu", "cuda")

BUNDLED_FILE = Path(__file__).resolve().parents[1] / "implementations" / "known_failures.toml"


class LedgerError(ValueError):
    """A ledger that cannot be used; the message names file, entry and key in one line."""


@dataclass(frozen=True)
class Entry:
    """One known failure."""

    requirement: str
    reason: str
    issue: str
    expires: datetime.date
    kind: str | None = None
    """The kind of failure, as the report gives it (``wrong values``)."""
    looks_like: str | None = None
    """Id of the planted bug that fails in the same way."""
    implementation: str | None = None
    """The implementation that the entry is about; None for whichever is tested."""
    device: str | None = None
    """The device that the requirement fails on; None for any."""
    where: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry as a report shows it."""
        return {
            "reason": self.reason,
            "issue": self.issue,
            "expires": self.expires.isoformat(),
            "kind": self.kind,
            "looks_like": self.looks_like,
        }


def parse_entries(tables: object, file: str, key: str) -> list[Entry]:
    """The entries of one file; :class:`LedgerError` for whatever is wrong with one."""
    if not isinstance(tables, list):
        raise LedgerError(f"{file}: {key} must be an array of tables, written [[{key}]]")
    return [_entry(table, f"{file}: {key} entry {n}") for n, table in enumerate(tables, 1)]


def _entry(table: object, where: str) -> Entry:
    if not isinstance(table, Mapping):
        raise LedgerError(f"{where} is not a table")
    if isinstance(table.get("requirement"), str):
        where = f"{where} ({table['requirement']})"
    known = {**NEEDED, **OPTIONAL}
    for key in table:
        if key not in known:
            raise LedgerError(f"{where}: unknown key {key!r}{close(key, known)}")
    for key in NEEDED:
        if key not in table:
            raise LedgerError(f"{where}: key {key!r} is missing")
    for key, value in table.items():
        if not isinstance(value, known[key]) or isinstance(value, datetime.datetime):
            wanted = "a date such as 2030-01-31, unquoted" if key == "expires" else "a string"
            raise LedgerError(f"{where}: key {key!r} must be {wanted}, not {value!r}")
        if isinstance(value, str) and not value.strip():
            raise LedgerError(f"{where}: key {key!r} is empty")
    if table.get("device") not in (None, *DEVICES):
        raise LedgerError(f"{where}: key 'device' must be {' or '.join(map(repr, DEVICES))}")
    return Entry(**table, where=where)


def bundled_entries(file: Path = BUNDLED_FILE) -> list[Entry]:
    """The known failures of the bundled adapters."""
    if not file.is_file():
        return []
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LedgerError(f"{file.name}: {error}") from None
    unknown = document.keys() - {"known_failures"}
    if unknown:
        raise LedgerError(f"{file.name}: unknown key {min(unknown)!r}")
    entries = parse_entries(document.get("known_failures", []), file.name, "known_failures")
    for entry in entries:
        if entry.implementation is None:
            raise LedgerError(f"{entry.where}: key 'implementation' is missing")
    return entries


def select(
    entries: Iterable[Entry],
    implementation: str,
    slugs: Iterable[str],
    bugs: Callable[[], Iterable[str]],
    device: str = "cpu",
) -> dict[str, Entry]:
    """The entries that are about ``implementation`` on ``device``, by slug.

    All entries are checked against what there is.
    ``bugs`` gives the ids of the planted bugs; it is called only where an entry names one.
    """
    slugs = list(slugs)
    by_slug: dict[str, Entry] = {}
    seen: dict[tuple[str, str | None, str | None], Entry] = {}
    for entry in entries:
        if entry.requirement not in slugs:
            raise LedgerError(
                f"{entry.where}: there is no requirement {entry.requirement!r}"
                f"{close(entry.requirement, slugs)}"
            )
        if entry.looks_like is not None:
            known = list(bugs())
            if entry.looks_like not in known:
                raise LedgerError(
                    f"{entry.where}: key 'looks_like': there is no planted bug {entry.looks_like!r}"
                    f"{close(entry.looks_like, known)}"
                )
        same = (entry.requirement, entry.implementation, entry.device)
        if same in seen:
            raise LedgerError(f"{entry.where} repeats {seen[same].where}")
        seen[same] = entry
        if entry.implementation not in (None, implementation):
            continue
        if entry.device not in (None, device):
            continue
        if entry.requirement in by_slug:
            raise LedgerError(f"{entry.where} repeats {by_slug[entry.requirement].where}")
        by_slug[entry.requirement] = entry
    return by_slug


def settle(
    entry: Entry,
    outcome: str,
    kind: str | None,
    *,
    today: datetime.date,
    kind_of_bug: Callable[[str], str | None],
) -> tuple[str, str]:
    """Outcome and reason of a requirement that has an entry, from how it ended by itself.

    ``kind`` is the kind of its failure; ``kind_of_bug`` runs the requirement against a planted bug
    and gives the kind of failure, None where the bug does not fail it.
    """
    if outcome in (PASS, NOT_OFFERED, DECLINED):
        ended = {PASS: "passes", NOT_OFFERED: "is not offered", DECLINED: "is declined"}[outcome]
        return LEDGER_MISMATCH, f"known failure {ended}: remove its entry ({entry.where})"
    if outcome != FAIL:  # a broken harness or missing hardware says nothing about the entry
        return outcome, ""
    if today > entry.expires:
        return LEDGER_MISMATCH, f"known failure expired on {entry.expires} ({entry.where}): {kind}"
    if entry.kind is not None and kind != entry.kind:
        return LEDGER_MISMATCH, (
            f"fails differently: {kind}, where the ledger expects {entry.kind} ({entry.where})"
        )
    if entry.looks_like is not None:
        expected = kind_of_bug(entry.looks_like)
        if expected is None:
            return LEDGER_MISMATCH, (
                f"fails differently: {kind}, while {entry.looks_like} passes ({entry.where})"
            )
        if expected != kind:
            return LEDGER_MISMATCH, (
                f"fails differently: {kind}, while {entry.looks_like} fails with {expected} "
                f"({entry.where})"
            )
    return KNOWN_FAILURE, f"{entry.reason} ({entry.issue}, expires {entry.expires})"
