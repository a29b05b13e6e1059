"""``--conformance-part K/N``: the parts of a split run are disjoint, and together they are the run."""

from __future__ import annotations

import pytest
from command_line import ROOT, pytest_run, start, suite_run

SELECTION = "attention.gqa or attention.scale"


def part(tmp_path_factory, k, n):
    """A run of one part, with its report."""
    folder = tmp_path_factory.mktemp("part")
    more = ("-k", SELECTION, f"--conformance-part={k}/{n}") if n else ("-k", SELECTION)
    return suite_run(folder, "--smoke", *more, only="")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The whole run and its three parts."""
    asked = [(0, 0), (1, 3), (2, 3), (3, 3)]
    begun = [start(("part", *which), lambda w=which: part(tmp_path_factory, *w)) for which in asked]
    return [run.result() for run in begun]


def test_parts_are_disjoint_and_together_the_run(runs):
    whole, *parts = (run.report() for run in runs)
    planned = [slug for report in parts for slug in report.header["planned"]]
    assert len(planned) == len(set(planned))
    assert set(planned) == set(whole.header["planned"])
    assert all(report.header["suite"] == whole.header["suite"] for report in parts)


def test_a_part_counts_the_others_as_deselected(runs):
    whole, first, *_ = (run.report() for run in runs)
    counts = first.footer["counts"]
    assert counts["suite"] == whole.footer["counts"]["suite"]
    assert counts["deselected"] == counts["suite"] - counts["planned"]


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "/4", "1/", "one/2", "-1/2", "1/0"])
def test_a_part_that_there_is_not_is_a_usage_error_in_a_line(tmp_path, part):
    run = pytest_run(tmp_path, str(ROOT / "conformance"), f"--conformance-part={part}")
    assert run.status == 4, run.text
    assert f"--conformance-part: '{part}' is not a part such as 1/4" in run.err
    assert "Traceback" not in run.err
