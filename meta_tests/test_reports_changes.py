"""What changed between two runs, what of it is worse, and the command that says so."""

import pytest
from html_pages import problems, read_page
from made_reports import CORE, SUITE, diagnosed, ended, report_of, saved, three
from test_reports_page import HOSTILE

from conformance.__main__ import main
from conformance.reports import changes, reader
from conformance.reports.changes import compare
from conformance.reports.changes_pages import headline, page, summary
from conformance.reports.files import PAGES


def one(outcome, reason="because", **fields):
    """A report whose first requirement ended so, and the others passed."""
    records = [ended(CORE[0], outcome, reason, **fields)]
    return report_of([*records, *(ended(slug, "pass") for slug in list(SUITE)[1:])], SUITE)


ABSENT = report_of([ended(slug, "pass") for slug in list(SUITE)[1:]])
DESELECTED = report_of([ended(slug, "pass") for slug in list(SUITE)[1:]], SUITE)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (one("pass"), one("fail"), changes.NEWLY_FAILING),
        (one("not_offered"), one("fail"), changes.NEWLY_FAILING),
        (one("known_failure"), one("fail"), changes.NEWLY_FAILING),
        (one("known_failure"), one("ledger_mismatch"), changes.NEWLY_FAILING),
        (one("pass"), one("error"), changes.NEWLY_FAILING),
        (ABSENT, one("fail"), changes.NEWLY_FAILING),
        (one("pass"), one("known_failure"), changes.NOW_KNOWN),
        (one("not_offered"), one("known_failure"), changes.NOW_KNOWN),
        (one("fail"), one("known_failure"), changes.TOLERATED),
        (one("pass"), one("declined"), changes.NO_LONGER_CHECKED),
        (one("pass"), one("not_offered"), changes.NO_LONGER_CHECKED),
        (one("pass"), one("inconclusive"), changes.NO_LONGER_CHECKED),
        (one("pass"), one("not_run"), changes.NO_LONGER_CHECKED),
        (one("fail"), one("declined"), changes.NO_LONGER_CHECKED),
        (one("known_failure"), one("not_run"), changes.NO_LONGER_CHECKED),
        (one("pass"), DESELECTED, changes.NO_LONGER_CHECKED),
        (one("pass"), ABSENT, changes.NO_LONGER_CHECKED),
        (one("pass"), one("pass", declined={"no bfloat16": 2}), changes.DECLINES_MORE),
        (one("fail"), one("pass"), changes.FIXED),
        (one("error"), one("pass"), changes.FIXED),
        (one("known_failure"), one("pass"), changes.FIXED),
        (one("declined"), one("pass"), changes.NEWLY_CHECKED),
        (ABSENT, one("pass"), changes.NEWLY_CHECKED),
        (
            one("fail", diagnosis=diagnosed("a")),
            one("fail", diagnosis=diagnosed("b")),
            changes.FAILS_DIFFERENTLY,
        ),
        (
            one("fail", diagnosis=diagnosed("a", "b")),
            one("fail", diagnosis=diagnosed("a")),
            changes.FAILS_DIFFERENTLY,
        ),
        (one("fail"), one("error"), changes.FAILS_DIFFERENTLY),
        (
            one("known_failure", diagnosis=diagnosed("a")),
            one("known_failure", diagnosis=diagnosed("b")),
            changes.FAILS_DIFFERENTLY,
        ),
        (one("declined"), one("not_offered"), changes.UNCHECKED_DIFFERENTLY),
        (one("declined"), one("declined", "for another reason"), changes.UNCHECKED_DIFFERENTLY),
        (one("pass"), one("pass", comparisons={"exact": 3}), changes.OTHER_COUNTS),
        (one("pass"), one("pass", executed=3), changes.OTHER_COUNTS),
        (
            one("fail", diagnosis=diagnosed("a", "b")),
            one("fail", diagnosis=diagnosed("b", "a")),
            None,
        ),
        (one("fail", "at 3"), one("fail", "at 4"), None),
        (one("pass", declined={"x": 2}), one("pass", declined={"x": 1}), None),
        (one("pass"), one("pass", duration=9.0, closest=0.5), None),
        (one("declined"), one("declined"), None),
        (ABSENT, ABSENT, None),
    ],
)
def test_what_changed(before, after, kind):
    found = [(change.id, change.kind) for change in compare(before, after).changes]
    assert found == ([(CORE[0], kind)] if kind else [])
    worse = (changes.NEWLY_FAILING, changes.NOW_KNOWN, changes.NO_LONGER_CHECKED)
    assert bool(compare(before, after).worse) is (kind in (*worse, changes.DECLINES_MORE))


def test_every_kind_is_worse_or_better_or_neither():
    assert changes.MEANINGS.keys() > changes.WORSE | changes.BETTER
    assert not changes.WORSE & changes.BETTER


def test_a_run_in_which_less_was_reported_is_worse():
    lost = report_of([ended(slug, "pass") for slug in list(SUITE)[1:]], SUITE, list(SUITE))
    assert [c.after for c in compare(one("pass"), lost).worse] == ["never reported"]


def test_the_pages_say_what_changed_and_why():
    found = compare(one("pass"), one("fail", "wrong keys", diagnosis=diagnosed("bug-one")))
    assert headline(found) == "Worse: 1 newly failing."
    text = summary(found)
    assert f"| `{CORE[0]}` | passed | failed | `looks like bug-one; wrong keys` |" in text
    assert "| core requirements passed | 2 of 2 | 1 of 2 |" in text
    assert problems(page(found)) == []
    shown = read_page(page(found)).text
    assert "✗ worse" in shown
    assert "looks like bug-one; wrong keys" in shown


def test_pages_of_no_change_are_whole():
    found = compare(one("pass"), one("pass"))
    assert headline(found) == "Nothing changed."
    assert problems(page(found)) == []
    assert "✓ not worse" in read_page(page(found)).text
    assert headline(compare(one("fail"), one("pass"))) == "Nothing became worse: 1 fixed."


def test_in_what_the_runs_themselves_differ_is_said():
    after = one("pass")
    after.header["environment"]["torch"] = "9"
    after.header["profile"] = "nightly"
    assert compare(one("pass"), after).notes == [
        "profile: gate before, nightly now",
        "torch: 1 before, 9 now",
    ]
    assert compare(ABSENT, one("pass")).notes == ["1 requirements are new in the suite"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text):
    records = {"diagnosis": diagnosed(text, seen=[text])}
    found = compare(one("pass"), one("fail", text, **records))
    assert problems(page(found)) == []
    assert problems(page(compare(one("pass"), one("pass", declined={text: 1})))) == []


def test_a_summary_of_very_many_changes_fits_a_comment():
    before = report_of([ended(f"rule.a.n{i}", "pass") for i in range(1299)])
    after = report_of([ended(f"rule.a.n{i}", "fail", "ü" * 900) for i in range(1299)])
    text = summary(compare(before, after))
    assert len(text.encode()) < 60_000
    assert "1299" in text


# The command


def run(tmp_path, before, after, *arguments):
    """The exit status of ``report --before X --after Y``."""
    folders = [str(saved(r, tmp_path / n)) for r, n in ((before, "before"), (after, "after"))]
    return main(["report", "--before", folders[0], "--after", folders[1], *arguments])


@pytest.mark.parametrize(
    ("after", "status"),
    [(one("pass"), 0), (one("fail"), 1), (one("declined"), 1), (one("pass", executed=9), 0)],
)
def test_the_exit_status_is_1_where_something_is_worse(tmp_path, capsys, after, status):
    assert run(tmp_path, one("pass"), after, "--output", str(tmp_path / "out")) == status
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "summary.md"]
    printed = capsys.readouterr().out
    assert run(tmp_path, one("pass"), after) == status
    assert printed.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--before", "{0}"],
        ["--after", "{0}"],
        ["{0}", "--before", "{0}", "--after", "{0}"],
        ["{0}/nothing"],
        ["{0}", "{0}/nothing"],
        ["--before", "{0}", "--after", "{0}/nothing"],
        ["{0}", "--output", "{0}/report.jsonl"],
        ["{0}", "--output", "{0}/report.jsonl/below"],
        ["{0}", "--output", "{1}"],
        ["--before", "{0}", "--after", "{1}", "--output", "{1}"],
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, arguments):
    folders = [saved(three("pass", "pass", "pass"), tmp_path / name) for name in ("a", "b")]
    assert main(["report", *(each.format(*folders) for each in arguments)]) == 4
    captured = capsys.readouterr()
    assert captured.err.startswith("conformance report: ")
    assert len(captured.err.splitlines()) == 1
    assert not captured.out
    for folder in folders:
        assert [path.name for path in folder.iterdir()] == [reader.STREAM]


def test_a_report_is_shown_beside_its_stream_or_elsewhere(tmp_path, capsys):
    folder = saved(three("pass", "fail", "pass"), tmp_path / "a")
    assert main(["report", str(folder / reader.STREAM)]) == 0
    assert capsys.readouterr().out == "x: fail: 1 of 3 requirements failed\n"
    assert sorted(p.name for p in folder.iterdir()) == sorted([reader.STREAM, *PAGES])
    assert main(["report", str(folder), "--output", str(tmp_path / "b")]) == 0
    for name in PAGES:
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
