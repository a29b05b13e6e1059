"""The Hypothesis profiles: which of them draw the same cases each time, wherever they run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import BOUND, ROOT, environment

TOLD = """
import json
from conformance.harness.profiles import PROFILES
print(json.dumps({name: profile.derandomize for name, profile in PROFILES.items()}))
"""


@pytest.mark.parametrize("variables", [{}, {"CI": "true"}], ids=["at-home", "in-ci"])
def test_the_gate_repeats_itself_and_a_nightly_run_looks_elsewhere(variables):
    """Hypothesis repeats itself by default where ``CI`` is set; a nightly run is of no use then."""
    told = subprocess.run(
        [sys.executable, "-c", TOLD],
        cwd=ROOT,
        env={**{k: v for k, v in environment().items() if k != "CI"}, **variables},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=True,
    )
    assert json.loads(told.stdout) == {
        "gate": True,
        "smoke": True,
        "explore": False,
        "nightly": False,
    }
