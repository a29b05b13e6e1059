"""What a gate run says: its verdict over all rows, exit codes, and the files that it writes."""

import json
import math
from xml.etree import ElementTree

import pytest

from conformance.gate.metrics import Change
from conformance.gate.output import duration, percent, summary, table_lines, write_all
from conformance.gate.result import GateResult, Interval, Row

OK = Row("decode", "OK", "fine", pairs=8, base_seconds=0.00321)
SLOW = Row(
    "prefill",
    "REGRESSED",
    "the head is slower",
    head=Interval(math.log(1.05), math.log(1.04), math.log(1.06)),
    control=Interval(0.0, -0.01, 0.01),
    pairs=23,
    base_seconds=2e-5,
    changes=(Change("backend", "flash", "math | efficient"),),
)
UNSURE = Row("train", "INCONCLUSIVE", "too noisy", head=Interval(0.0, -math.inf, math.inf))
VOID = Row("experts", "VOID", "the base: wrong output: off by 1 < 2")
FASTER = Row("fast", "IMPROVED", "the head is faster")


def result(*rows, **more):
    return GateResult("main", "HEAD", "cpu", rows, **more)


@pytest.mark.parametrize(
    ("rows", "more", "verdict", "code"),
    [
        ([OK], {}, "OK", 0),
        ([OK, FASTER], {}, "OK", 0),
        ([OK, SLOW, VOID, UNSURE], {}, "REGRESSED", 1),
        ([OK, VOID], {}, "VOID", 6),
        ([OK, UNSURE], {}, "INCONCLUSIVE", 0),
        ([OK, UNSURE], {"strict": True}, "INCONCLUSIVE", 6),
        ([UNSURE], {}, "INCONCLUSIVE", 6),
        ([OK], {"void": "two copies of the base differ"}, "VOID", 6),
        ([], {}, "INCONCLUSIVE", 6),
    ],
)
def test_the_worst_row_decides_and_nothing_shown_is_never_green(rows, more, verdict, code):
    found = result(*rows, **more)
    assert (found.verdict, found.exit_code) == (verdict, code)


def test_every_verdict_is_counted():
    assert result(OK, OK, SLOW, VOID).why == "1 REGRESSED, 1 VOID, 2 OK of 4 benchmarks"
    assert result().why == "no benchmark was compared"


def test_the_table_has_the_numbers_and_says_why():
    lines = list(table_lines(result(OK, SLOW, UNSURE, notes=("2 comparisons",))))
    assert lines[0].split() == [
        "benchmark",
        "verdict",
        "change",
        "99",
        "%",
        "bounds",
        "A/A",
        "pairs",
        "base",
    ]
    assert lines[2].split("  ")[0] == "prefill"
    for part in ("REGRESSED", "+5.0 %", "+4.0 % to +6.0 %", "+0.0 %", "23", "20 µs"):
        assert part in lines[2]
    assert "REGRESSED prefill: the head is slower" in lines
    assert "    changed: backend: math | efficient, the base has flash" in lines
    assert not any(line.startswith("OK decode") for line in lines)
    assert lines[-2:] == [
        "2 comparisons",
        "gate  REGRESSED: 1 REGRESSED, 1 INCONCLUSIVE, 1 OK of 3 benchmarks",
    ]


def test_the_files_say_the_same(tmp_path):
    found = result(OK, SLOW, UNSURE, VOID)
    write_all(found, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    document = json.loads((folder / "gate.json").read_text())
    assert document["exit_code"] == 1
    assert [row["verdict"] for row in document["benchmarks"]] == [
        "OK",
        "REGRESSED",
        "INCONCLUSIVE",
        "VOID",
    ]
    assert document["benchmarks"][1]["changes"][0]["direction"] == "changed"
    assert document["benchmarks"][2]["head"]["upper"] is None  # JSON has no infinity
    [suite] = ElementTree.parse(folder / "junit.xml").getroot()
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
    }
    assert suite.find("testcase[@name='prefill']/failure").get("message") == (
        "REGRESSED: the head is slower"
    )
    text = (folder / "summary.md").read_text()
    assert text == summary(found)
    assert "math \\| efficient" in text
    assert "off by 1 &lt; 2" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2.5, "2.5 s"), (0.00321, "3.21 ms"), (4.2e-5, "42 µs"), (3e-8, "30 ns")],
)
def test_durations_have_units(seconds, text):
    assert duration(seconds) == text


def test_changes_are_shown_as_ratios():
    assert percent(math.log(0.9)) == "-10.0 %"
    assert percent(None) == "-"
    assert percent(math.inf) == "+∞"
