"""Numbers and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """A share as a percentage of two digits."""
    if share is None:
        return "–"
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.0%}"


def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    return [f"| {line} |" for line in [*lines, *(" | ".join(row) for row in cells)]]
