"""From an empty folder to a gate: ``init``, an adapter, a verdict, a known failure, a mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import environment, pytest_run
from toy_repository import fill_in, mend, plant, with_init

ALL = ("--pyargs", "conformance.test_attention", "--smoke")
"""The suite's own files, as installed; its few requirements for a start keep this short."""
OWN = ("tests", "--smoke")
"""The tests of the repository."""

ENTRY = """
[[tool.conformance.known_failures]]
requirement = "{slug}"
reason = "the mask is anchored at the first key"
issue = "example/toy#1"
expires = 2999-12-31
looks_like = "attn-causal-top-left-with-cache"
"""


@pytest.fixture
def repository(tmp_path):
    """A repository whose adapter calls its code."""
    fill_in(with_init(tmp_path))
    return tmp_path


def run(folder, *arguments):
    return pytest_run(folder, *arguments, "--conformance-report", "out")


def test_an_adapter_that_is_not_filled_in_is_red(tmp_path):
    run_ = run(with_init(tmp_path), *ALL)
    assert run_.status == 6, run_.text
    assert "attention: call your code here" in run_.out
    assert run_.report().header["implementation"]["name"] == "conformance_adapter"


@pytest.mark.parametrize("way", [ALL, OWN], ids=["installed suite", "own tests"])
def test_a_right_adapter_is_green_and_what_must_run_ran(repository, way):
    run_ = run(repository, *way)
    assert run_.status == 0, run_.text
    report = run_.report()
    assert report.footer["verdict"] == "partial"
    assert len(report.header["required"]) == 8
    ended = {record["slug"]: record["outcome"] for record in report.records}
    assert {ended[slug] for slug in report.header["required"]} == {"pass"}


def test_own_tests_run_where_the_folder_is_not_on_the_path(repository):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "tests", "--smoke", "-p", "no:cacheprovider"],
        cwd=repository,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "verdict partial" in done.stdout


@pytest.mark.parametrize("way", [ALL, OWN], ids=["installed suite", "own tests"])
def test_a_mistake_is_red_and_named(repository, way):
    plant(repository)
    run_ = run(repository, *way)
    assert run_.status == 1, run_.text
    assert "attention.causal.aligned-to-last-key (core): wrong keys" in run_.out


def test_what_must_run_cannot_be_deselected(repository):
    run_ = run(repository, "tests", "-k", "attention.gqa.query-head-reads-its-group")
    assert run_.status == 6, run_.text
    assert "too few executed: 7 of 8 required" in run_.verdict


def test_a_known_failure_is_green_until_it_is_mended(repository):
    plant(repository)
    failed = [r["slug"] for r in run(repository, *ALL).report().records if r["outcome"] == "fail"]
    assert failed
    settings = repository / "pyproject.toml"
    entries = "".join(ENTRY.format(slug=slug) for slug in failed)
    settings.write_text(settings.read_text() + entries)

    known = run(repository, *ALL)
    assert known.status == 0, known.text
    assert known.report().footer["counts"]["outcomes"]["known_failure"] == len(failed)

    mend(repository)
    mended = run(repository, *ALL)
    assert mended.status == 1, mended.text
    assert "known failure passes: remove its entry" in mended.out


def test_a_gate_on_a_machine_without_a_gpu_does_not_ask_for_what_only_a_gpu_can_hold(tmp_path):
    """One list in ``require`` serves both gates, also where it names a whole contract."""
    require = '[tool.conformance]\nrequire = ["rotary.layout.half", "rotary.large.*"]\n'
    (tmp_path / "pyproject.toml").write_text(require)
    run_ = run(tmp_path, "--pyargs", "conformance.test_rotary", "-k", "rotary.layout.half")
    assert run_.status == 0, run_.text
    assert run_.report().header["required"] == ["rotary.layout.half"]
