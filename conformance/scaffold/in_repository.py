"""The tests by which a repository runs the requirements among its own: an import and a fixture."""

from __future__ import annotations

from collections.abc import Iterable

from conformance.scaffold.adapter import MODULE

FIXTURE = f'''"""The implementation that the conformance suite holds to its requirements."""

import sys
from pathlib import Path

import pytest

# A plain ``pytest`` looks for modules beside the tests, and not in the folder above them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def implementation():
    """What is under test: any object with some of the contracts' methods."""
    import {MODULE}

    return {MODULE}
'''
"""The text of ``tests/conftest.py``."""


def tests(contracts: Iterable[str]) -> str:
    """The text of ``tests/test_conformance.py``: the requirements of ``contracts``."""
    lines = (f"from conformance.test_{name} import *" for name in sorted(contracts))
    return '"""The requirements of the conformance suite, as tests of this repository."""\n\n' + (
        "\n".join(lines) + "\n"
    )
