"""The summary for a pull request: it says what the page says, fits, and breaks out of nothing."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from made_reports import diagnosed, ended, report_of, three
from test_reports_page import HOSTILE, everything

from conformance.harness.verdict import WORDS
from conformance.reports.badge import COLOURS, badge_data, badge_files
from conformance.reports.changes import compare
from conformance.reports.changes_pages import summary as summary_of_changes
from conformance.reports.markdown import LIMIT, cell, code, escaped, fitting, table
from conformance.reports.several import side_by_side
from conformance.reports.several_pages import summary as summary_of_several
from conformance.reports.summary import summary_markdown

MARKDOWN = (
    *HOSTILE,
    "a | b\n# title",
    "`code` ``` and ```more",
    "[link](https://evil.example)",
    "![image](https://evil.example/x.png)",
    "@everyone example/repo#12 #34",
    "` <b>out</b> [link](https://evil.example) @you #7",
    "- item\n\n| a | b |\n|---|---|",
    "*bold* _under_ ~~gone~~ \\",
)


def without_code(text):
    """A text without what stands in code, where nothing is markup."""
    return re.sub(r"(?<!\\)`[^`\n]*`", "", text)


def assert_harmless(text):
    bare = without_code(text)
    assert not re.search(r"(?<!\\)`", bare), "a span of code is open"
    assert not re.search(r"<(?!/?(?:details|summary)\b)", bare), "HTML"
    assert not re.search(r"(?<!\\)\]\(", bare), "a link"
    assert not re.search(r"@\w|#\d", bare), "a mention or a reference"
    for line in text.split("\n"):
        assert not line.startswith("#") or re.match(r"#{2,3} [A-Z]", line), line


def test_summary_shows_counts_failures_and_what_was_not_checked():
    text = summary_markdown(three("pass", "fail", "not_offered"))
    assert text.startswith("## Conformance: fail\n")
    assert "| passed | 1 of 2 | 0 of 1 |" in text
    assert "- `rule.a.two`: `because`" in text
    assert "- not offered, 1: `because` (`rule.b.one`)" in text


def test_failures_are_grouped_by_diagnosis_as_on_the_page():
    text = summary_markdown(everything())
    titles = re.findall(r"^\*\*(.*)\*\* \((\d+) of 8 failed\)$", text, re.M)
    assert titles == [
        ("Looks like `bug-one`", "2"),
        ("Ambiguous: `bug-one` or `bug-two and bug-three`", "1"),
        ("No known bug fits; what was seen", "1"),
        ("Not explained", "2"),
        ("Not as in the ledger of known failures", "1"),
        ("The harness broke: nothing is said about the implementation", "1"),
    ]
    assert "does bug-one. Correct: Not bug-one. Source: paper 7." in text
    assert "- `rule.diagnosed.n3`: `wrong` `only row 3 differs`" in text
    for record in everything().records:
        assert record["outcome"] == "pass" or f"`{record['id']}`" in text


@pytest.mark.parametrize("text", MARKDOWN)
def test_no_text_of_an_implementation_becomes_markdown(text):
    diagnosis = diagnosed(text, (text, text))
    ledger = {"reason": text, "issue": text, "expires": text, "kind": None, "looks_like": None}
    made = report_of(
        [
            ended("rule.a.one", "fail", text, diagnosis=diagnosis),
            ended("rule.a.two", "fail", text, diagnosis=diagnosed(seen=[text])),
            ended("rule.a.three", "known_failure", text, ledger=ledger),
            ended("rule.a.four", "declined", text),
            ended("rule.a.five", "pass", executed=1, declined={text: 1}),
        ],
        implementation={"name": text, "version": text, "file": None, "chosen_by": "--impl"},
    )
    made.header["environment"]["platform"] = text
    calm = three("pass", "pass", "pass", implementation=made.header["implementation"])
    same = {"suite": made.header["suite"], "implementation": made.header["implementation"]}
    passed = report_of([ended(s, "pass") for s in made.header["suite"]], **same)
    assert_harmless(summary_markdown(made))
    assert_harmless(summary_of_changes(compare(calm, made)))
    assert_harmless(summary_of_several(side_by_side([("a", passed), ("b", made)])))


def test_the_check_of_markdown_sees_what_it_is_there_for():
    calm = summary_markdown(three("pass", "pass", "pass"))
    assert_harmless(calm)
    for text in ("<b>", "a ` b", "[a](b)", "@you", "see #12", "\n# title"):
        with pytest.raises(AssertionError):
            assert_harmless(calm + text)


@pytest.mark.parametrize("text", ["`", "a`b", "``", "`a` b", "ends`", "\n"])
def test_code_ends_where_it_is_meant_to(text):
    made = code(text)
    assert made == "*(empty)*" or (made[0], made[-1], made.count("`")) == ("`", "`", 2)


def test_a_bar_does_not_end_a_cell():
    assert table(("a", "b"), [(code("x|y"), escaped("p|q"))])[2] == "| `x\\|y` | p\\|q |"
    assert cell("a\\|b") == "a\\|b"


def test_a_summary_fits_a_comment_however_much_fails():
    records = [
        ended(f"rule.a.n{i}", "fail", "ü" * 5000, diagnosis=diagnosed(f"bug-{i}", seen=["x" * 500]))
        for i in range(1299)
    ]
    text = summary_markdown(report_of(records))
    assert len(text.encode()) <= LIMIT
    assert text.startswith("## Conformance: fail")
    assert "1299 of 1299" in text
    named, (rest,) = text.count("**Looks like"), re.findall(r"and (\d+) more failed, of", text)
    assert named >= 3
    assert named + int(rest) == 1299


def test_a_summary_says_how_much_it_leaves_out():
    records = [ended(f"rule.a.n{i}", "fail", "a | b\n# title" + "x" * 5000) for i in range(300)]
    text = summary_markdown(report_of(records))
    assert len(text) < 20_000
    assert "and 260 more" in text


def test_what_does_not_fit_however_little_is_shown_is_cut_off_at_a_line():
    text = fitting(lambda most: "ü" * 99 + "\n" + "a line\n" * 20_000)
    assert len(text.encode()) <= LIMIT
    assert text.endswith("a line\n\n… the rest is in report.html.\n")


def test_numerics_stand_in_the_summary():
    text = summary_markdown(three("pass", "pass", "pass"), ["### Numerics", "", "- worse", ""])
    assert "\n### Numerics\n\n- worse\n" in text


# The badge


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (("pass", "pass", "pass"), "pass, 2 of 2 core"),
        (("pass", "fail", "pass"), "fail, 1 of 2 core"),
        (("pass", "not_offered", "pass"), "partial, 1 of 2 core"),
        (("pass", "inconclusive", "pass"), "inconclusive, 1 of 2 core"),
    ],
)
def test_the_badge_is_the_verdict_with_its_denominator(outcomes, message):
    verdict = three(*outcomes).verdict
    files = badge_files(verdict)
    data = json.loads(files["badge.json"])
    assert data == {
        "schemaVersion": 1,
        "label": "conformance",
        "message": message,
        "color": COLOURS[verdict.verdict],
    }
    image = ET.fromstring(files["badge.svg"])
    assert image.get("aria-label") == f"conformance: {message}"
    assert [t.text for t in image.iter("{http://www.w3.org/2000/svg}text")] == [
        "conformance",
        message,
    ]
    assert "href" not in files["badge.svg"]


def test_white_letters_are_readable_on_every_colour_of_the_badge():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear))

    for colour in COLOURS.values():
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5


def test_words_of_outcomes_need_no_escaping():
    assert all(escaped(word) == word for word in WORDS.values())
    assert badge_data(three("pass", "pass", "pass").verdict)["message"].isascii()
