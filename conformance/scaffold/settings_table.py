"""The table ``[tool.conformance]`` at the end of a ``pyproject.toml`` that stays as it is otherwise."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping

from conformance.scaffold.adapter import MODULE


class TableError(ValueError):
    """A pyproject.toml that cannot be read, or cannot take the table; the message is one line."""


def table(contracts: Iterable[str]) -> str:
    """The table for an adapter of ``contracts``; it requires what shows that each is wired right."""
    from conformance.harness.requirement import all_requirements

    contracts = list(contracts)
    required = [r.slug for r in all_requirements().values() if r.smoke and r.contract in contracts]
    lines = "".join(f"    {json.dumps(slug)},\n" for slug in required)
    return (
        "[tool.conformance]\n"
        f"implementation = {json.dumps(MODULE)}\n"
        "# A run in which one of these did not run is red. Contracts, requirements or globs:\n"
        f"# {json.dumps(contracts[0])} would be everything of that contract.\n"
        f"require = [\n{lines}]\n"
    )


def has_table(document: Mapping[str, object]) -> bool:
    """Whether a parsed pyproject.toml configures the suite already."""
    tool = document.get("tool")
    return isinstance(tool, Mapping) and "conformance" in tool


def parse(content: bytes) -> dict[str, object]:
    """A pyproject.toml; :class:`TableError` where it is none."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TableError(f"pyproject.toml: {' '.join(str(error).split())}") from None


def appended(content: bytes, addition: str) -> bytes:
    """``content`` with the table behind it, in its own line ends; every byte of it stays."""
    newline = "\r\n" if b"\r\n" in content else "\n"
    between = "" if not content else "\n" if content.endswith(b"\n") else "\n\n"
    whole = content + (between + addition).replace("\n", newline).encode()
    try:
        tomllib.loads(whole.decode("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TableError(
            f"pyproject.toml cannot take a table [tool.conformance]: {error}"
        ) from None
    return whole
