"""The page of the kill matrix: what it says is what was measured, and it is up to date."""

from __future__ import annotations

import re

import pytest
from command_line import ROOT

from conformance.__main__ import bugs, main, requirements
from conformance.harness.data import kill_matrix
from conformance.kill_matrix_page import cell, page, source_cell

COMMITTED = (ROOT / "docs/kill_matrix.md").read_text("utf-8")
AGAIN = "write it anew: python -m conformance bugs --matrix docs/kill_matrix.md"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page as the command writes it."""
    file = tmp_path_factory.mktemp("matrix") / "page.md"
    assert main(["bugs", "--matrix", str(file)]) == 0
    return file.read_text("utf-8")


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of all lines of tables with so many columns, but for their headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    tables = [[cell.strip() for cell in line] for line in cells if len(line) == columns]
    return [line for line in tables if not line[0].startswith(("bug", "-"))]


def test_the_committed_page_is_what_the_command_writes(written):
    assert written == COMMITTED, AGAIN


def test_every_bug_has_a_row_with_what_was_measured():
    measured = kill_matrix()
    shown = {row[0].strip("`"): row for row in rows(COMMITTED, 7)}
    assert set(shown) == set(measured)
    for id, bug in measured.items():
        _, what, _, breaks, number, others, alone = shown[id]
        assert what
        assert f"{bug['contract']}.{breaks.strip('`')}" == bug["breaks"]
        assert int(number) == len(bug["caught_by"])
        assert alone == ("yes" if bug["without_precision_lane"] else "no")
        named = {f"{bug['contract']}.{slug}" for slug in re.findall(r"`([^`]+)`", others)}
        assert named < set(bug["caught_by"])
        more = int((re.findall(r"(\d+) more", others) or [0])[0])
        assert 1 + len(named) + more == len(bug["caught_by"])


def test_every_requirement_stands_once_by_the_number_of_bugs_that_it_catches():
    text = COMMITTED[COMMITTED.index("## Requirements") :]
    caught = {row["slug"]: 0 for row in requirements()}
    for bug in kill_matrix().values():
        for slug in bug["caught_by"]:
            caught[slug] += 1
    many = text[: text.index("### That catch one")]
    found = {}
    for number, count, names in rows(many, 3):
        slugs = re.findall(r"`([^`]+)`", names)
        assert len(slugs) == int(count)
        found |= dict.fromkeys(slugs, int(number))
    one = text[text.index("### That catch one") : text.index("### That no planted bug")]
    found |= {slug: 1 for slug, _ in re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", one, re.M)}
    none = text[text.index("### That no planted bug") :]
    for contract, count, names in re.findall(r"^- (\w+), (\d+): (.*)$", none, re.M):
        slugs = [f"{contract}.{short}" for short in re.findall(r"`([^`]+)`", names)]
        assert len(slugs) == int(count)
        found |= dict.fromkeys(slugs, 0)
    assert found == caught


def test_the_introduction_counts_what_the_tables_hold():
    flat = " ".join(COMMITTED.split())
    none = COMMITTED[COMMITTED.index("### That no planted bug") :]
    uncaught = sum(map(int, re.findall(r"^- \w+, (\d+): ", none, re.M)))
    assert f"The other {uncaught} fail for none of these bugs" in flat
    assert f"{none.count('(GPU)')} of them run on a GPU alone" in flat
    assert f"{len(rows(COMMITTED, 7))} documented bugs are planted" in flat


def test_a_bug_that_nothing_catches_and_one_that_is_not_planted_are_shown():
    bug = {**bugs()[0], "caught_by": [], "without_precision_lane": False}
    unmeasured = {**bugs()[1], "caught_by": None, "without_precision_lane": None}
    other = {**bug, "id": "x-y", "status": "not expressible", "reason": "no contract | has it"}
    text = page([bug, unmeasured, other], requirements())
    assert f"| `{bug['id']}` |" in text
    assert "| **0** | nothing | no |" in text
    assert "|  | not measured |  |" in text
    assert r"| no contract \| has it |" in text
    assert "2 documented bugs are planted over the reference; 0 are caught, 0 of them" in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("onnx/onnx#8068", "[onnx/onnx#8068](https://github.com/onnx/onnx/issues/8068)"),
        ("a_b/c.d:file_x.py", r"a\_b/c.d:file\_x.py"),
        ("see a/b#1; c/d", "see [a/b#1](https://github.com/a/b/issues/1); c/d"),
        ("none found", "none found"),
        (None, ""),
    ],
)
def test_issues_are_links_and_other_sources_are_text(source, shown):
    assert source_cell(source) == shown


def test_a_cell_cannot_break_out_of_its_table():
    assert cell("a | b\n<b> *c* `d` [e](f)") == r"a \| b \<b\> \*c\* \`d\` \[e\](f)"


def test_a_page_that_cannot_be_written_is_said_in_a_line(tmp_path, capsys):
    assert main(["bugs", "--matrix", str(tmp_path / "no" / "page.md")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--matrix" in error
    assert "No such file or directory" in error
    assert not list(tmp_path.iterdir())
