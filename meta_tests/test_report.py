"""Verdicts, exit codes, and a reader that takes no report on trust."""

import json
from collections import Counter

import pytest

from conformance.harness import report, verdict
from conformance.harness.controller import combined_exit_status
from conformance.harness.data import report_schema
from conformance.harness.failures import (
    ConformanceFailure,
    Declined,
    HarnessError,
    Inconclusive,
    NotOffered,
    NotRun,
)
from conformance.harness.gpu_isolation import names_gpu
from conformance.harness.records import clean, make_record, outcome_of
from conformance.harness.verdict import Plan, judge

CORE, EXTENDED = ("rule.a.one", "rule.a.two"), ("rule.b.one",)
SUITE = dict.fromkeys(CORE, "core") | dict.fromkeys(EXTENDED, "extended")


def item(slug, device="cpu"):
    id = slug if device == "cpu" else f"{slug}[{device}]"
    level, contract = SUITE.get(slug, "core"), slug.split(".")[0]
    return {"id": id, "slug": slug, "level": level, "contract": contract, "device": device}


def ended(slug, outcome, reason="because", device="cpu"):
    error = ConformanceFailure("wrong values", "off by one") if outcome == "fail" else None
    return make_record(item(slug, device), outcome, reason, duration=0.1, error=error)


def judged(*outcomes, required=(), smoke=False, suite=None):
    """The verdict where the requirements of the suite ended so; None for not planned."""
    pairs = [(slug, o) for slug, o in zip(SUITE, outcomes) if o is not None]
    plan = Plan(tuple(item(s) for s, _ in pairs), suite or SUITE, tuple(required), smoke)
    return judge(plan, [ended(s, o) for s, o in pairs if o != "missing"])


@pytest.mark.parametrize(
    ("outcomes", "word", "code"),
    [
        (("pass", "pass", "pass"), "pass", 0),
        (("pass", "pass", "not_offered"), "pass", 0),
        (("pass", "pass", "declined"), "pass", 0),
        (("pass", "pass", "inconclusive"), "pass", 0),
        (("pass", "pass", None), "pass", 0),
        (("pass", "not_offered", "pass"), "partial", 0),
        (("pass", "declined", "pass"), "partial", 0),
        (("pass", "not_run", "pass"), "partial", 0),
        (("pass", None, None), "partial", 0),
        (("pass", "known_failure", "pass"), "partial", 0),
        (("pass", "inconclusive", "pass"), "inconclusive", 6),
        (("not_offered", "declined", "not_run"), "inconclusive", 6),
        (("not_offered", "not_offered", "pass"), "partial", 0),
        (("pass", "missing", "pass"), "inconclusive", 6),
        (("pass", "pass", "missing"), "inconclusive", 6),
        ((None, None, None), "inconclusive", 6),
        (("fail", "pass", "pass"), "fail", 1),
        (("pass", "pass", "fail"), "fail", 1),
        (("pass", "pass", "ledger_mismatch"), "fail", 1),
        (("pass", "pass", "error"), "fail", 3),
        (("fail", "error", "pass"), "fail", 1),
        (("fail", "missing", "pass"), "fail", 1),
        (("error", "not_offered", None), "fail", 3),
    ],
)
def test_verdict(outcomes, word, code):
    found = judged(*outcomes)
    assert (found.verdict, found.exit_code) == (word, code), found
    assert " of " in found.why or "broken harness" in found.why or "ledger" in found.why, found.why


def test_required_requirements_must_run():
    assert judged("pass", "pass", "not_offered", required=EXTENDED).exit_code == 6
    assert judged("pass", "pass", None, required=EXTENDED).verdict == "fail"
    assert "too few executed" in judged("pass", "pass", "declined", required=EXTENDED).why
    assert judged("pass", "pass", "inconclusive", required=EXTENDED).exit_code == 6
    assert judged("pass", "pass", "known_failure", required=EXTENDED).verdict == "pass"
    assert judged("pass", "pass", "pass", required=EXTENDED).verdict == "pass"


def test_smoke_answers_for_what_it_planned():
    found = judged("pass", None, None, required=SUITE, smoke=True)
    assert (found.verdict, found.exit_code) == ("partial", 0)
    assert found.why.startswith("smoke, 1 of 3 requirements")
    assert judged("not_offered", None, None, required=SUITE, smoke=True).exit_code == 6


def test_one_device_is_enough_and_a_failure_on_any_counts():
    plan = Plan((item(CORE[0]), item(CORE[0], "cuda"), item(CORE[1])), dict.fromkeys(CORE, "core"))
    rest = [ended(CORE[0], "pass"), ended(CORE[1], "pass")]
    assert judge(plan, [*rest, ended(CORE[0], "not_run", device="cuda")]).verdict == "pass"
    assert judge(plan, [*rest, ended(CORE[0], "fail", device="cuda")]).verdict == "fail"
    assert judge(plan, rest).exit_code == 6


def test_a_mistake_in_a_fixture_is_a_usage_error():
    plan = Plan((item(CORE[0]),), SUITE)
    error = pytest.UsageError("conformance: offers no contract")
    outcome, reason = outcome_of(error, "setup")
    assert judge(plan, [ended(CORE[0], outcome, reason)]).exit_code == 4


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "pass"),
        (ConformanceFailure("wrong values", "x"), "fail"),
        (NotOffered("x"), "not_offered"),
        (Declined("x"), "declined"),
        (Inconclusive("x"), "inconclusive"),
        (NotRun("x"), "not_run"),
        (HarnessError("x"), "error"),
        (ZeroDivisionError("x"), "error"),
        (AssertionError("x"), "error"),
    ],
)
def test_outcome_of_what_was_raised(error, outcome):
    assert outcome_of(error, "call")[0] == outcome


def test_a_skip_that_no_requirement_made_is_counted():
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        pytest.skip("later")
    assert outcome_of(raised.value, "setup") == ("not_run", "skipped: later")


def test_records_are_plain_json():
    values = {"a": float("nan"), 3: (1, True, None), "long": "x" * 10_000, "c": Counter(b=2)}
    text = json.dumps(clean(values), allow_nan=False)
    assert len(text) < 3000
    assert json.loads(text)["a"] is None


@pytest.mark.parametrize(
    ("pytest_status", "outcomes", "others", "status"),
    [
        (0, ("pass", "pass", "pass"), 0, 0),
        (0, ("not_offered", "not_offered", "not_offered"), 0, 6),
        (1, ("fail", "pass", "pass"), 0, 1),
        (1, ("error", "pass", "pass"), 0, 3),
        (1, ("error", "pass", "pass"), 1, 1),
        (1, ("pass", "pass", "pass"), 1, 1),
        (1, ("pass", "pass", "pass"), 0, 1),  # another plugin wants it red
        (1, ("pass", "inconclusive", "pass"), 1, 1),
        (2, ("fail", "missing", "missing"), 0, 2),
        (2, ("pass", "pass", "pass"), 0, 2),
        (3, ("pass", "missing", "missing"), 0, 3),
        (4, ("pass", "pass", "pass"), 0, 4),
        (5, (None, None, None), 0, 6),
    ],
)
def test_the_exit_status_is_never_made_better(pytest_status, outcomes, others, status):
    records = [ended(s, o) for s, o in zip(SUITE, outcomes) if o not in (None, "missing")]
    assert combined_exit_status(pytest_status, judged(*outcomes), records, others) == status


@pytest.mark.parametrize(
    ("expression", "asked"),
    [("gpu", True), ("gpu and not slow", True), ("not gpu", False), ("", False), ("gpus", False)],
)
def test_mark_expression(expression, asked):
    assert names_gpu(expression) is asked


# The stream


def written(folder, outcomes=("pass", "fail", "not_offered")):
    """A whole report of the three requirements; its lines as values."""
    planned = [item(slug) for slug in SUITE]
    records = [ended(slug, outcome) for slug, outcome in zip(SUITE, outcomes)]
    head = report.header(
        implementation={"name": "x", "version": None, "file": None, "chosen_by": "--impl"},
        environment={
            **dict.fromkeys(("python", "torch", "transformers", "hypothesis", "pytest"), "1"),
            **dict.fromkeys(("platform", "machine", "device"), "cpu"),
            "variables": {},
        },
        profile="gate",
        seed=None,
        smoke=False,
        planned=[p["id"] for p in planned],
        suite=SUITE,
        required=(),
    )
    writer = report.ReportWriter(folder)
    writer.append(head)
    for record in records:
        writer.append(record)
    writer.finish(head, records, judge(Plan(tuple(planned), SUITE), records))
    return lines_of(folder)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def rewrite(folder, lines):
    (folder / "report.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_stream_round_trip(tmp_path):
    lines = written(tmp_path)
    found = report.read_report(tmp_path)
    assert [found.header, *found.records, found.footer] == lines
    assert found.verdict.verdict == "fail"


def test_stream_fits_the_schema(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(report_schema())
    validator.check_schema(report_schema())
    lines = written(tmp_path)
    for line in lines:
        validator.validate(line)
        for name in line:
            if name not in ("type", "description"):
                without = {k: v for k, v in line.items() if k != name}
                assert not validator.is_valid(without), f"{name} is not required"
        assert not validator.is_valid({**line, "more": 1})


def _without_footer(lines):
    return lines[:-1]


def _twice(lines):
    return [*lines[:2], lines[1], *lines[2:]]


def _not_planned(lines):
    return [lines[0], {**lines[1], "id": "rule.z.z"}, *lines[2:]]


def _other_schema(lines):
    return [{**lines[0], "schema": 99}, *lines[1:]]


def _other_counts(lines):
    return [*lines[:2], {**lines[2], "outcome": "pass"}, *lines[3:]]


def _green_with_failures(lines):
    return [*lines[:-1], {**lines[-1], "verdict": "pass"}]


def _no_header(lines):
    return lines[1:]


def _lacks_a_field(lines):
    return [lines[0], {k: v for k, v in lines[1].items() if k != "outcome"}, *lines[2:]]


def _two_runs(lines):
    return [*lines, *lines]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_without_footer, report.NoFooter),
        (_twice, report.DuplicatedRecord),
        (_not_planned, report.NotPlanned),
        (_other_schema, report.UnknownSchema),
        (_other_counts, report.Inconsistent),
        (_green_with_failures, report.Inconsistent),
        (_no_header, report.NotAReport),
        (_lacks_a_field, report.BrokenLine),
        (_two_runs, report.Inconsistent),
    ],
)
def test_reader_refuses(tmp_path, damage, error):
    rewrite(tmp_path, damage(written(tmp_path)))
    with pytest.raises(error) as raised:
        report.read_report(tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith(".")


def test_reader_refuses_a_green_run_with_missing_records(tmp_path):
    lines = written(tmp_path, ("pass", "pass", "pass"))
    counts = {**lines[-1]["counts"], "outcomes": {"pass": 2}}
    rewrite(tmp_path, [*lines[:3], {**lines[-1], "counts": counts}])
    with pytest.raises(report.Inconsistent, match="1 planned requirement"):
        report.read_report(tmp_path)


def test_reader_refuses_a_line_that_was_cut_off(tmp_path):
    written(tmp_path)
    text = (tmp_path / "report.jsonl").read_text()
    (tmp_path / "report.jsonl").write_text(text[:-20])
    with pytest.raises(report.BrokenLine, match="cut off"):
        report.read_report(tmp_path)


def test_reader_refuses_nothing_at_all(tmp_path):
    with pytest.raises(report.NotAReport, match="no report"):
        report.read_report(tmp_path)
    (tmp_path / "report.jsonl").write_text("")
    with pytest.raises(report.NotAReport, match="header"):
        report.read_report(tmp_path)


def test_a_new_run_forgets_the_old_verdict(tmp_path):
    written(tmp_path, ("pass", "pass", "pass"))
    report.ReportWriter(tmp_path)
    with pytest.raises(report.NotAReport):
        report.read_report(tmp_path)
    assert (tmp_path / "summary.md").read_text() == ""


def test_summary_shows_counts_failures_and_what_was_not_checked(tmp_path):
    written(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "## Conformance: fail" in text
    assert "| passed | 1 of 2 | 0 of 1 |" in text
    assert "- `rule.a.two`: because" in text
    assert "- not offered, 1: because (`rule.b.one`)" in text


def test_summary_stays_short_and_whole(tmp_path):
    suite = {f"rule.a.n{i}": "core" for i in range(300)}
    planned = tuple(item(slug) for slug in suite)
    nasty = "a | b\n# title `code` <script>" + "x" * 5000
    records = [ended(slug, "fail", nasty) for slug in suite]
    head = written(tmp_path)[0]
    text = report.summary_markdown(head, records, judge(Plan(planned, suite), records))
    assert len(text) < 20_000
    assert "<script" not in text
    assert "\n# title" not in text
    assert "and 260 more" in text


def test_terminal_lines_are_few(tmp_path):
    suite = {f"rule.a.n{i}": "core" for i in range(300)}
    planned = tuple(item(slug) for slug in suite)
    records = [ended(slug, "fail" if i % 2 else "declined") for i, slug in enumerate(suite)]
    lines = report.terminal_lines(records, judge(Plan(planned, suite), records))
    assert len(lines) < 60
    assert sum(line.startswith("declined: 150 requirements") for _, line in lines) == 1
    assert verdict.WORDS.keys() >= {record["outcome"] for record in records}
