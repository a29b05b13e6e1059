"""Several implementations side by side: where they differ, or a refusal to compare."""

import pytest
from html_pages import problems, read_page
from made_reports import CORE, EXTENDED, SUITE, diagnosed, ended, report_of, saved, three
from test_reports_page import HOSTILE

from conformance.__main__ import main
from conformance.reports import reader
from conformance.reports.several import side_by_side
from conformance.reports.several_pages import page, summary


def named(report, name):
    report.header["implementation"]["name"] = name
    return report


def three_implementations():
    return [
        named(three("pass", "pass", "pass"), "first"),
        named(three("pass", "fail", "not_offered"), "second"),
        named(three("pass", "known_failure", "declined"), "third"),
    ]


def shown(reports):
    return side_by_side([(f"folder{i}", report) for i, report in enumerate(reports)])


def test_where_they_disagree_comes_first():
    several = shown(three_implementations())
    assert [row.id for row in several.disagreements] == [CORE[1]]
    assert several.checked_differently.keys() == {("pass", "not_offered", "declined")}
    made = page(several)
    assert problems(made) == []
    headings = [text for _, text in read_page(made).headings]
    assert headings[:3] == [
        "Conformance of 3 implementations",
        "Where they disagree",
        "Checked for some of them",
    ]


def test_the_summary_has_verdicts_and_disagreements():
    text = summary(shown(three_implementations()))
    assert "| `second` | fail | 1 of 2 | 0 of 1 |" in text
    assert f"| `{CORE[1]}` | ✓ passed | ✗ failed | ⚑ known failure |" in text
    told = "`first` passed, `second` not offered, `third` declined"
    assert f"- 1: {told} (`{EXTENDED[0]}`)" in text


def test_what_all_break_is_told_apart_from_disagreement():
    several = shown([three("fail", "pass", "pass"), three("fail", "pass", "pass")])
    assert [row.id for row in several.broken_by_all] == [CORE[0]]
    assert not several.disagreements
    assert "### Broken by all" in summary(several)
    assert "Broken by all" in read_page(page(several)).text


def test_a_diagnosis_stands_beside_the_failure():
    failing = [
        ended(slug, "fail" if slug == CORE[0] else "pass", diagnosis=diagnosed("bug-one"))
        for slug in SUITE
    ]
    several = shown([three("pass", "pass", "pass"), report_of(failing, SUITE)])
    assert "✗ failed looks like bug-one" in read_page(page(several)).text
    assert "✗ failed (`bug-one`)" in summary(several)


def test_every_requirement_of_every_report_is_there_selected_or_not():
    part = report_of([ended(CORE[0], "pass")], SUITE)
    several = shown([three("pass", "pass", "pass"), part])
    assert [row.id for row in several.rows] == list(SUITE)
    assert several.rows[2].pattern == ("pass", "deselected")


def test_nothing_ranks():
    made = page(shown(three_implementations())).lower()
    assert "score" not in made
    assert "winner" not in made
    assert "%" not in made.split("</style>")[1]


def test_the_same_implementation_twice_is_told_apart_by_its_folder():
    several = shown([three("pass", "pass", "pass"), three("fail", "pass", "pass")])
    assert several.names == ("x (folder0)", "x (folder1)")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_becomes_markup(text):
    several = shown([named(three("pass", "fail", "pass"), text), three("pass", "pass", "pass")])
    assert problems(page(several)) == []


def test_three_runs_of_a_whole_suite_make_a_page_that_stays_small():
    slugs = [f"contract_{i % 22}.topic.rule-number-{i}" for i in range(1299)]
    reports = [
        named(
            report_of([ended(slug, "pass" if i % n else "fail") for i, slug in enumerate(slugs)]),
            f"i{n}",
        )
        for n in (2, 3, 5)
    ]
    several = shown(reports)
    assert len(page(several)) < 900_000
    assert problems(page(several)) == []


def other_version(report):
    report.header["suite_version"] = "9.9"
    return report


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (other_version(three("pass", "pass", "pass")), "is of suite version"),
        (report_of([ended(CORE[0], "pass")]), f"{CORE[1]} is not the same in both"),
        (
            report_of([ended(s, "pass") for s in SUITE], dict.fromkeys(SUITE, "core")),
            f"{EXTENDED[0]} is not the same in both",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, other, said):
    one = saved(three("pass", "pass", "pass"), tmp_path / "one")
    two = saved(other, tmp_path / "two")
    assert main(["report", str(one), str(two), "--output", str(tmp_path / "out")]) == 4
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_the_command_writes_pages_or_prints_markdown(tmp_path, capsys):
    folders = [
        str(saved(report, tmp_path / report.header["implementation"]["name"]))
        for report in three_implementations()
    ]
    assert main(["report", *folders, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "3 implementations differ in 2 of 3 requirements\n"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "summary.md"]
    assert main(["report", *folders]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "summary.md").read_text()


def test_pages_of_several_are_not_put_beside_the_stream_of_one(tmp_path, capsys):
    folders = [str(saved(three("pass", "pass", "pass"), tmp_path / n)) for n in ("a", "b")]
    assert main(["report", *folders, "--output", folders[0]]) == 4
    assert "holds another report" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "a").iterdir()] == [reader.STREAM]
