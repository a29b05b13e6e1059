"""What the user asked for: ``[tool.conformance]`` of the pyproject.toml in pytest's root folder.

Strict, because a misspelt ``require`` would be a check that no one makes. Imports no torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from conformance.harness.ledger import Entry, LedgerError, parse_entries
from conformance.harness.resolve import close

KEYS = ("implementation", "require", "known_failures")

TABLES = ("benchmarks",)
"""Tables of other parts of the suite, which read them themselves."""


class SettingsError(ValueError):
    """A pyproject.toml that cannot be used; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """The table ``[tool.conformance]``."""

    implementation: str | None = None
    require: tuple[str, ...] = ()
    known_failures: tuple[Entry, ...] = ()


def read_settings(root: Path) -> Settings:
    """The settings in ``root``; empty where there is no such file or table."""
    file = root / "pyproject.toml"
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"pyproject.toml: {error}") from None
    table = document.get("tool", {}).get("conformance", {})
    if not isinstance(table, Mapping):
        raise SettingsError("pyproject.toml: tool.conformance must be a table")
    for key in table:
        if key not in (*KEYS, *TABLES):
            hint = close(key, (*KEYS, *TABLES))
            raise SettingsError(f"pyproject.toml: tool.conformance: unknown key {key!r}{hint}")
    implementation = table.get("implementation")
    if implementation is not None and not (isinstance(implementation, str) and implementation):
        raise SettingsError("pyproject.toml: tool.conformance.implementation must be a string")
    require = table.get("require", [])
    if not isinstance(require, list) or not all(isinstance(entry, str) for entry in require):
        raise SettingsError("pyproject.toml: tool.conformance.require must be a list of strings")
    try:
        entries = parse_entries(
            table.get("known_failures", []), "pyproject.toml", "tool.conformance.known_failures"
        )
    except LedgerError as error:
        raise SettingsError(str(error)) from None
    return Settings(implementation, tuple(require), tuple(entries))


def required_slugs(require: Iterable[str], slugs: Iterable[str]) -> tuple[str, ...]:
    """The slugs that entries of ``require`` (contracts, slugs, globs) name."""
    slugs = list(slugs)
    contracts = {slug.split(".")[0] for slug in slugs}
    found: dict[str, None] = {}
    for entry in require:
        pattern = f"{entry}.*" if entry in contracts else entry
        matches = [slug for slug in slugs if fnmatchcase(slug, pattern)]
        if not matches:
            raise SettingsError(
                f"pyproject.toml: tool.conformance.require: {entry!r} matches no requirement"
                f"{close(entry, [*contracts, *slugs])}"
            )
        found.update(dict.fromkeys(matches))
    return tuple(found)
