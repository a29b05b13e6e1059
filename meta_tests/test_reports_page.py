"""The page of a run: whole, self-contained, hostile texts escaped, and nothing left out."""

import re

import pytest
from html_pages import problems, read_page
from made_reports import (
    CORE,
    EXTENDED,
    MEASURED,
    SUITE,
    diagnosed,
    ended,
    item,
    report_of,
    three,
)

from conformance.harness import verdict
from conformance.harness.records import OUTCOMES, make_record
from conformance.reports import page as pages
from conformance.reports import plots
from conformance.reports.page import SYMBOLS, page

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script src=//evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "]]>--><!-- {{ 7 * 7 }} {% raw %}",
    "</pre></details></main><iframe src=javascript:alert(1)>",
    "\x00\x1b[31m\u202egnp.exe\ud83d",
    "javascript:alert(1)",
)


def many(outcomes, suite_size):
    """A report of so many requirements that end in turn as ``outcomes`` say."""
    slugs = [f"contract_{i % 22}.topic-{i % 7}.rule-number-{i}" for i in range(suite_size)]
    return report_of([ended(slug, outcomes[i % len(outcomes)]) for i, slug in enumerate(slugs)])


def everything():
    """A report with an example of all that a page can show."""
    records = [ended(f"rule.outcome.{o.replace('_', '-')}", o, f"why {o}") for o in OUTCOMES]
    failure = {
        **ended(CORE[0], "fail")["failure"],
        "rule": "Rules rule.",
        "source": "paper 3",
        "case": "Case(x=1)",
        "details": ["row 3 of 8"],
        "reproduction": ["import torch", "print(out)"],
        "measured": MEASURED,
    }
    for number, diagnosis in enumerate(
        (
            diagnosed("bug-one"),
            diagnosed("bug-one"),
            diagnosed("bug-one", ("bug-two", "bug-three")),
            diagnosed(seen=["only row 3 differs"], note="stopped after 10 s"),
            None,
        )
    ):
        slug = f"rule.diagnosed.n{number}"
        records.append(ended(slug, "fail", "wrong", failure=failure, diagnosis=diagnosis))
    ledger = {
        "reason": "known for long",
        "issue": "https://example.org/7",
        "expires": "2027-01-31",
        "kind": None,
        "looks_like": "bug-nine",
    }
    records.append(ended("rule.ledger.known", "known_failure", "known", ledger=ledger))
    records.append(
        ended(
            "rule.near.limit",
            "pass",
            closest=0.93,
            drawn=4,
            executed=3,
            declined={"no bfloat16": 1},
            comparisons={"semantic": 3},
        )
    )
    suite = {r["slug"]: r["level"] for r in records} | {"rule.not.selected": "core"}
    planned = [r["id"] for r in records] + ["rule.never.reported"]
    return report_of(records, suite | {"rule.never.reported": "core"}, planned)


def test_the_page_with_everything_is_whole_and_accessible():
    assert problems(page(everything())) == []


@pytest.mark.parametrize(
    "outcomes",
    [("pass", "pass", "pass"), ("not_offered",) * 3, ("error", "not_run", "declined")],
)
def test_pages_with_little_on_them_are_whole(outcomes):
    assert problems(page(three(*outcomes))) == []


def test_the_page_says_everything_that_is_known():
    text = read_page(page(everything())).text
    for said in (
        *("Rules rule.", "paper 3", "Case(x=1)", "row 3 of 8", "import torch print(out)"),
        *("only row 3 differs", "stopped after 10 s", "largest error", "0.41", "not finite"),
        *(
            "does bug-one.",
            "Correct: Not bug-one.",
            "Documented in paper 7",
            "bug-two and bug-three",
        ),
        *("known for long", "https://example.org/7", "2027-01-31", "bug-nine"),
        *("0.93", "no bfloat16", "rule.not.selected", "rule.never.reported", "why declined"),
        *("1 of 3 above the limit; largest 0.41 at 1", "--impl x"),
    ):
        assert said in text, said


def test_failures_are_grouped_in_order_of_how_much_is_known():
    headings = [t for level, t in read_page(page(everything())).headings if level == 3]
    assert headings[:6] == [
        "Looks like bug-one 2 of 8 failures",
        "Ambiguous: bug-one or bug-two and bug-three 1 of 8 failures",
        "No known bug fits; what was seen 1 of 8 failures",
        "Not explained 2 of 8 failures",
        "Not as in the ledger of known failures 1 of 8 failures",
        "The harness broke: nothing is said about the implementation 1 of 8 failures",
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_an_implementation_becomes_markup(text):
    failure = {
        "kind": text,
        "lane": "exact",
        "summary": text,
        "details": [text],
        "case": text,
        "reproduction": [text],
        "rule": text,
        "source": text,
        "measured": {
            **MEASURED,
            "name": text,
            "statistics": [{"name": text, "value": 1.0, "limit": 2.0}],
            "profiles": [{"axis": text, "errors": [1.0]}],
        },
    }
    diagnosis = diagnosed(text, (text, text), seen=[text], note=text)
    alone = {**diagnosis, "named": []}
    ledger = {"reason": text, "issue": text, "expires": text, "kind": text, "looks_like": text}
    records = [
        ended("rule.a.one", "fail", text, failure=failure, diagnosis=diagnosis),
        ended("rule.a.two", "fail", text, failure=failure, diagnosis=alone),
        ended("rule.a.three", "known_failure", text, failure=failure, ledger=ledger),
        ended("rule.a.four", "declined", text),
        ended("rule.a.five", "pass", executed=1, declined={text: 1}),
    ]
    report = report_of(
        records,
        implementation={"name": text, "version": text, "file": text, "chosen_by": "--impl"},
        seed=text,
    )
    report.header["environment"].update(platform=text, variables={"CONFORMANCE_X": text})
    made = page(report)
    assert problems(made) == []
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    assert read_page(made).text.count(" ".join(shown.split())) >= 20


def test_the_checker_of_pages_sees_what_it_is_there_for():
    """Without escaping, every hostile text with markup is found."""
    made = page(three("pass", "fail", "pass"))
    for text in [text for text in HOSTILE if "<" in text]:
        assert problems(made.replace("<main>", f"<main>{text}")), text
    assert problems(made.replace('href="#contracts"', 'href="javascript:x"'))
    assert problems(made.replace(' scope="col"', ""))


def test_nothing_may_load_whatever_is_on_the_page():
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page(everything()))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_every_failure_is_on_the_page_and_the_page_stays_bounded():
    report = many(("fail",), 1299)
    made = page(report)
    assert problems(made) == []
    assert {record["id"] for record in report.records} <= set(read_page(made).attributes("id"))
    assert made.count("Run this requirement again") == pages.SHOWN_WHOLE
    assert len(made) < 1_000_000


def test_every_group_of_failures_is_shown_with_examples():
    records = [ended(f"rule.a.n{i}", "fail", diagnosis=diagnosed("common")) for i in range(200)]
    records += [ended(f"rule.b.n{i}", "fail", diagnosis=diagnosed("rare")) for i in range(4)]
    found = pages.whole(records)
    assert [(len(group.records), shown) for group, shown in found] == [(200, 120), (4, 3)]


@pytest.mark.parametrize("outcome", ["pass", "not_offered"])
def test_the_page_of_a_run_of_the_whole_suite_is_small(outcome):
    report = many((outcome,), 1299)
    for record in report.records:
        record.update(drawn=20, executed=20, closest=0.4567, comparisons={"semantic": 20})
    made = page(report_of(report.records))
    assert len(made.encode()) < 400_000


def test_every_outcome_has_a_symbol_of_its_own():
    assert SYMBOLS.keys() == verdict.WORDS.keys()
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


def test_contracts_count_requirements_and_not_records():
    """A requirement on two devices is one of the suite's, and its failure on one of them counts."""
    records = [
        ended(CORE[0], "pass"),
        make_record(item(CORE[0], "cuda"), "not_run", "no GPU", duration=0),
        ended(CORE[1], "pass"),
        ended(CORE[1], "fail", device="cuda"),
    ]
    report = report_of(records, dict.fromkeys(CORE, "core"))
    (contract,) = pages.by_contract(report)
    assert (contract.of("core", "pass"), contract.of("core", "fail")) == (1, 1)
    assert contract.suite("core") == 2


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "pytest --pyargs conformance --impl x"),
        ({"smoke": True, "profile": "smoke"}, "pytest --pyargs conformance --impl x --smoke"),
        (
            {"profile": "nightly", "seed": "7"},
            "pytest --pyargs conformance --impl x --hypothesis-profile nightly --hypothesis-seed=7",
        ),
        (
            {"implementation": {"name": "a b;c", "version": None, "file": None, "chosen_by": "x"}},
            "pytest --pyargs conformance --impl 'a b;c'",
        ),
        (
            {
                "implementation": {
                    "name": "the fixture",
                    "version": None,
                    "file": None,
                    "chosen_by": "fixture",
                }
            },
            "pytest",
        ),
    ],
)
def test_the_command_that_runs_it_again(changes, command):
    assert pages.command_line(three("pass", "pass", "pass", **changes).header) == command


def test_the_command_keeps_device_and_variables():
    header = three("pass", "pass", "pass").header
    header["environment"].update(device="a GPU", variables={"CONFORMANCE_X": "a b"})
    assert pages.command_line(header, "rule.a.one") == (
        "CONFORMANCE_X='a b' pytest --pyargs conformance --impl x -m gpu -k rule.a.one"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.41234, "0.412"),
        (1e-9, "1e-09"),
        (999.4, "999"),
        (9034.0, "9,030"),
        (-45678, "-45,700"),
        (2.5e6, "2.5e+06"),
        (None, "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_are_shown_in_three_digits(value, shown):
    assert pages.number(value) == shown


# Plots

LINES = ("limit", "floor")


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (2.0, 1.0, 2.0),
        (-2.0, 1.0, 2.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, float("inf")),
        (None, 1.0, float("inf")),
        (float("nan"), 1.0, float("inf")),
        (1.0, None, float("inf")),
    ],
)
def test_ratio_of_a_statistic_to_its_limit(value, limit, expected):
    assert plots.ratio(value, limit) == expected


def test_what_is_over_the_limit_is_drawn_right_of_its_line_and_filled():
    axis = plots.axis_of([0.01, 300.0])
    assert axis == (-2, 3)
    limit = float(re.search(r'class="limit" d="M([\d.]+)', plots.statistic_row(1.0, axis))[1])
    places = []
    for ratio, state in ((0.01, "within"), (1.0, "within"), (1.1, "over"), (300.0, "over")):
        drawn = plots.statistic_row(ratio, axis)
        assert f'class="dot {state}"' in drawn
        places.append(float(re.search(r'cx="([\d.]+)"', drawn)[1]))
    assert places == sorted(places)
    assert places[0] < limit == places[1] < places[2] < places[3] <= plots.WIDTH
    assert 'class="dot over"' in plots.statistic_row(float("inf"), axis)


def test_the_floor_is_drawn_left_of_the_limit_and_below_it():
    axis = plots.axis_of([0.01, 300.0])
    drawn = plots.statistic_row(2.0, axis, 0.25)
    at = {kind: float(re.search(rf'class="{kind}" d="M([\d.]+)', drawn)[1]) for kind in LINES}
    assert at["floor"] < at["limit"]
    drawn = plots.profile_bars([1e-7, 1.0], 1e-3, 2e-4)
    at = {kind: float(re.search(rf'class="{kind}" d="M0 ([\d.]+)', drawn)[1]) for kind in LINES}
    assert 0 < at["limit"] < at["floor"] < 48
    for none in (plots.statistic_row(2.0, axis), plots.profile_bars([1.0], 1e-3)):
        assert 'class="floor"' not in none


def test_bars_of_a_long_profile_keep_its_largest_errors():
    errors = [0.0] * 1000
    errors[777] = 5.0
    bars = plots.binned(errors)
    assert len(bars) <= plots.MOST_BARS
    assert sorted(bars)[-2:] == [0.0, 5.0]
    assert plots.profile_bars(errors, 1e-6).count('class="over"') == 1


@pytest.mark.parametrize("limit", [None, 0.0, 1e-6, 1e300])
@pytest.mark.parametrize("errors", [[0.0], [None, None], [1e-300, 1e300], [0.3] * 65])
def test_every_profile_can_be_drawn_inside_its_box(errors, limit):
    drawn = plots.profile_bars(errors, limit)
    for y, height in re.findall(r'y="([\d.-]+)" width="[\d.]+" height="([\d.-]+)"', drawn):
        assert 0 <= float(y) <= 48
        assert 0 < float(height) <= 48


def test_the_histogram_counts_everything_once():
    shares = [0.0, 0.039, 0.041, 0.5, 0.999, 1.0]
    counts = plots.bin_counts(shares)
    assert sum(counts) == len(shares)
    assert (counts[0], counts[1], counts[-1]) == (2, 1, 2)


def test_a_single_failure_among_a_thousand_is_seen():
    drawn = plots.stacked_bar([("pass", 1298), ("fail", 1)])
    assert float(re.search(r'class="o-fail" x="[\d.]+" y="0" width="([\d.]+)"', drawn)[1]) >= 1.5


def test_extended_requirements_have_a_row_of_their_own():
    text = read_page(page(three("pass", "fail", "not_offered"))).text
    assert "1 of 2 core requirements passed; 1 failed." in text
    assert "0 of 1 extended requirements passed; 1 not offered." in text
    assert SUITE[EXTENDED[0]] == "extended"
