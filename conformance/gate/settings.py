"""What the user sets of the gate: ``[tool.conformance.benchmarks]`` of the pyproject.toml.

``only`` and ``accept`` (globs), ``detect`` and ``margin`` (percent), ``overrides``: each is explained
in docs/regression_gate.md. Strict, because a misspelt key would be a check that no one makes. The
command line goes before it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from conformance.gate.sides import GateError
from conformance.harness.resolve import close

TABLE = "tool.conformance.benchmarks"
LISTS, SHARES = ("only", "accept"), ("detect", "margin")


@dataclass(frozen=True)
class Override:
    """Another share for some benchmarks; None leaves it."""

    benchmark: str
    """A glob."""
    detect: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class GateSettings:
    """The table; shares are fractions."""

    only: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()
    detect: float | None = None
    margin: float | None = None
    overrides: tuple[Override, ...] = ()

    def share(self, name: str, benchmark: str) -> float | None:
        """``detect`` or ``margin`` of a benchmark: the last override that matches and has it."""
        for override in reversed(self.overrides):
            value = getattr(override, name)
            if value is not None and fnmatchcase(benchmark, override.benchmark):
                return value
        return getattr(self, name)


def read_gate_settings(root: Path) -> GateSettings:
    """The settings in ``root``; empty where there is no such file or table. :class:`GateError`."""
    try:
        document = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    except FileNotFoundError:
        return GateSettings()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GateError(f"pyproject.toml: {error}") from None
    table = document.get("tool", {}).get("conformance", {}).get("benchmarks", {})
    _check_keys(table, TABLE, (*LISTS, *SHARES, "overrides"))
    overrides = table.get("overrides", [])
    if not isinstance(overrides, list):
        raise GateError(f"pyproject.toml: {TABLE}.overrides must be a list of tables")
    return GateSettings(
        **{name: _globs(table, name) for name in LISTS},
        **{name: _share(table, name, TABLE) for name in SHARES},
        overrides=tuple(
            _override(entry, f"{TABLE}.overrides[{n}]") for n, entry in enumerate(overrides)
        ),
    )


def _override(entry: Any, where: str) -> Override:
    _check_keys(entry, where, ("benchmark", *SHARES))
    if not isinstance(entry.get("benchmark"), str):
        raise GateError(f"pyproject.toml: {where}.benchmark must be a string")
    return Override(entry["benchmark"], **{name: _share(entry, name, where) for name in SHARES})


def _check_keys(table: Any, where: str, known: tuple[str, ...]) -> None:
    if not isinstance(table, Mapping):
        raise GateError(f"pyproject.toml: {where} must be a table")
    for key in table:
        if key not in known:
            raise GateError(f"pyproject.toml: {where}: unknown key {key!r}{close(key, known)}")


def _globs(table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = table.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise GateError(f"pyproject.toml: {TABLE}.{name} must be a list of strings")
    return tuple(found)


def _share(table: Mapping[str, Any], name: str, where: str) -> float | None:
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 100:
        expected = "a number of percent above 0 and below 100"
        raise GateError(f"pyproject.toml: {where}.{name} is {value!r}, expected {expected}")
    return value / 100
