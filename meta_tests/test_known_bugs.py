"""Every documented bug is planted and caught, by the requirement whose rule it breaks."""

from __future__ import annotations

import json

import pytest
import torch

from conformance.harness import data
from conformance.harness.kill_matrix import FEWER_CASES, as_data, failures, row
from conformance.harness.memo import keep_whole_gate
from conformance.known_bugs import NOT_EXPRESSIBLE, all_known_bugs

BUGS = all_known_bugs()
RECORDED = data.kill_matrix()


def test_every_catalogue_entry_is_planted_or_explained():
    planted = {bug.entry for bug in BUGS.values()}
    assert planted | set(NOT_EXPRESSIBLE) == set(data.catalogue())
    assert planted & set(NOT_EXPRESSIBLE) == set()
    assert all(entry in BUGS for entry in planted), "the plain id of an entry is planted"


def test_the_recorded_matrix_has_every_planted_bug():
    assert sorted(RECORDED) == sorted(BUGS), "run python fixtures/regenerate.py"


@pytest.fixture(scope="module", autouse=True)
def many_implementations_meet_the_same_cases():
    torch.set_num_threads(1)
    keep_whole_gate()


@pytest.mark.parametrize("id", BUGS)
def test_planted_bug_is_caught(id):
    """The gate catches the bug by its rule, as is on record."""
    bug = BUGS[id]
    assert bug.breaks in RECORDED[id]["caught_by"], "run python fixtures/regenerate.py"
    caught = failures(getattr(bug.make(), bug.contract), bug.contract, only=(bug.breaks,))
    assert [kill.requirement for kill in caught] == [bug.breaks]


def pytest_generate_tests(metafunc):
    """Whole rows of every bug with ``--hypothesis-profile=nightly``, by day of a few."""
    if "recorded_row_of" in metafunc.fixturenames:
        nightly = metafunc.config.getoption("--hypothesis-profile") == "nightly"
        metafunc.parametrize("recorded_row_of", list(BUGS) if nightly else by_day())


def by_day() -> list[str]:
    """One bug of each contract whose cases are quick: rows of all took 860 s of processor time."""
    first = {bug.contract: id for id, bug in reversed(BUGS.items())}
    return [id for contract, id in first.items() if contract not in FEWER_CASES]


def test_the_recorded_row_is_what_the_gate_does(recorded_row_of):
    found = as_data([row(BUGS[recorded_row_of])])[recorded_row_of]
    assert json.loads(json.dumps(found)) == RECORDED[recorded_row_of], (
        "run python fixtures/regenerate.py and read the diff"
    )
