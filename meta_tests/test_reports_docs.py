"""docs/reports.md: its commands run as written, and its tables are those of the code."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from command_line import ONE, ROOT, environment, pytest_run, start
from made_reports import saved, three
from test_readme import block_that_starts, code_blocks

from conformance.reports import changes
from conformance.reports.files import PAGES
from conformance.reports.outcomes import ONE as SINGLE
from conformance.reports.page import SYMBOLS, VERDICTS
from conformance.reports.reader import SCHEMA_VERSION, STREAM

PAGE = (ROOT / "docs" / "reports.md").read_text("utf-8")

SELECTION = f"{ONE} or attention.full.sees-every-key"
"""Two requirements in place of all, to be quick."""


def rows(*heads):
    """The rows of the table that has these heads, as lists of cells."""
    lines = PAGE.splitlines()
    begin = lines.index(f"| {' | '.join(heads)} |")
    found = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def run(command, folder):
    """A shell command of the page, in a folder, as a user of the installed package gives it."""
    variables = environment()
    variables["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{variables['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )


def pytest_as_written(command, folder):
    """A pytest command of the page, of the selected requirements alone."""
    program, *arguments = shlex.split(command)
    assert program == "pytest"
    output = Path(tempfile.mkdtemp(dir=folder))
    return pytest_run(output, *arguments, "-k", SELECTION, cwd=folder)


@pytest.fixture
def adapter_folder(tmp_path):
    """A folder with the README's adapter."""
    (tmp_path / "my_adapter.py").write_text(block_that_starts("python", "# my_adapter.py"))
    return tmp_path


def test_a_run_leaves_every_file_that_the_page_names(adapter_folder):
    command, *_ = code_blocks("sh", PAGE)
    done = pytest_as_written(command.strip(), adapter_folder)
    assert done.status == 0, done.text
    assert done.verdict.startswith("partial: 2 of "), done.text
    named = set(
        re.findall(r"`([\w.]+)`", " ".join(cells[0] for cells in rows("file", "what it is for")))
    )
    assert named == {STREAM, *PAGES}
    assert {path.name for path in (adapter_folder / "out").iterdir()} == named

    reading = block_that_starts("python", "from conformance.reports.reader", PAGE)
    done = run(f"{sys.executable} -c '{reading}'", adapter_folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    again = re.search(r"`(python -m conformance report out)`", PAGE)[1]
    (adapter_folder / "out" / "report.html").unlink()
    assert run(again, adapter_folder).returncode == 0
    assert (adapter_folder / "out" / "report.html").is_file()


def test_a_split_run_merges_as_written(adapter_folder):
    *parts, merge = (
        block_that_starts(
            "sh", "pytest --pyargs conformance --impl my_adapter --conformance-part", PAGE
        )
        .strip()
        .splitlines()
    )
    assert len(parts) == 4
    runs = [start(object(), partial(pytest_as_written, part, adapter_folder)) for part in parts]
    statuses = [found.result().status for found in runs]
    assert set(statuses) <= {0, 6}, statuses  # some parts have none of the selected two
    done = run(f"{merge} --partial", adapter_folder)
    assert done.returncode == 0, done.stderr
    assert "partial: 2 of " in done.stdout
    assert {path.name for path in (adapter_folder / "whole").iterdir()} == {STREAM, *PAGES}


def test_comparing_commands_run_as_written(tmp_path):
    saved(three("pass", "pass", "pass"), tmp_path / "reference/out")
    saved(three("pass", "pass", "declined"), tmp_path / "torch-sdpa/out")
    saved(three("pass", "pass", "pass"), tmp_path / "base/out")
    saved(three("pass", "fail", "pass"), tmp_path / "head/out")
    several, changed = [
        b for b in code_blocks("sh", PAGE) if b.startswith("python -m conformance report")
    ]
    assert run(several, tmp_path).returncode == 0
    assert (tmp_path / "matrix/report.html").is_file()
    assert run(changed, tmp_path).returncode == 1
    assert "Worse: 1 newly failing." in (tmp_path / "changes/summary.md").read_text()


def test_every_verdict_and_outcome_is_explained():
    assert [cells[0] for cells in rows("verdict", "it means", "what to do")] == [
        f"{symbol} {verdict}" for verdict, (symbol, _) in VERDICTS.items()
    ]
    assert {cells[1]: cells[0] for cells in rows("sign", "outcome", "it means")} == {
        SINGLE[end]: symbol for end, symbol in SYMBOLS.items()
    }


def test_every_kind_of_change_stands_in_its_column():
    worse, neither, better = (
        {
            kind
            for cells in rows("worse", "neither", "better")
            for kind in changes.MEANINGS
            if cells[column].startswith(kind)
        }
        for column in range(3)
    )
    assert worse == changes.WORSE
    assert better == changes.BETTER
    assert neither == changes.MEANINGS.keys() - changes.WORSE - changes.BETTER


def test_the_version_of_the_schema_is_the_one_on_the_page():
    assert f"is the version: {SCHEMA_VERSION}." in PAGE


def test_the_browser_check_says_that_there_is_no_browser(tmp_path):
    command = [sys.executable, str(ROOT / "meta_tests" / "browser_check.py")]
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4
    assert done.stderr.startswith("browser_check: none of chromium")
    assert len(done.stderr.splitlines()) == 1
