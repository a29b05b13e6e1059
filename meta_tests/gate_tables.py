"""The tables of docs/regression_gate.md.

``PYTHONPATH=. python meta_tests/gate_tables.py`` simulates them anew and writes them into the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from markdown_tables import rewritten
from simulated_bounds import table_of_asymmetry, table_of_bias, table_of_pairs, table_of_rules
from simulated_sessions import (
    table_of_broken,
    table_of_detection,
    table_of_false_alarms,
    table_of_margins,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "regression_gate.md"

TABLES: dict[str, Callable[[], str]] = {
    "rules": table_of_rules,
    "pairs": table_of_pairs,
    "bias": table_of_bias,
    "asymmetry": table_of_asymmetry,
    "false alarms": table_of_false_alarms,
    "detection": table_of_detection,
    "margins": table_of_margins,
    "broken": table_of_broken,
}
"""By the name in the page's comments."""


def main() -> None:
    """Write the tables into the page."""
    tables = {name: table() for name, table in TABLES.items()}
    PAGE.write_text(rewritten(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
