"""Verdicts, exit codes, and a reader that takes no report on trust."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from command_line import ROOT, suite_run
from made_reports import (
    CORE,
    EXTENDED,
    MEASURED,
    SUITE,
    diagnosed,
    ended,
    item,
    lines_of,
    report_of,
    rewrite,
    three,
)

from conformance.harness import verdict
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
from conformance.harness.records import clean, outcome_of
from conformance.harness.verdict import Plan, judge
from conformance.reports import reader, stream
from conformance.reports.files import PAGES
from conformance.reports.terminal import terminal_lines


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
    made = three(*outcomes)
    writer = stream.ReportWriter(folder)
    for line in (made.header, *made.records):
        writer.append(line)
    writer.finish(made.header, made.records, made.verdict)
    return lines_of(folder)


def test_stream_round_trip(tmp_path):
    lines = written(tmp_path)
    found = reader.read_report(tmp_path)
    assert [found.header, *found.records, found.footer] == lines
    assert found.verdict.verdict == "fail"


def test_writing_a_report_leaves_every_page(tmp_path):
    written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([reader.STREAM, *PAGES])
    assert all((tmp_path / name).stat().st_size for name in PAGES)


@pytest.mark.parametrize("text", ["a\u2028b\x85c\x0bd\r\n\0", "half a pair \ud83d", "\U0001f600"])
def test_any_text_of_an_implementation_survives_the_stream(tmp_path, text):
    made = report_of([ended(CORE[0], "fail", text)])
    writer = stream.ReportWriter(tmp_path)
    for line in (made.header, *made.records):
        writer.append(line)
    writer.finish(made.header, made.records, made.verdict)
    assert reader.read_report(tmp_path).records == made.records


@pytest.mark.parametrize(
    "module", ["conformance.reports.command", "conformance.reports.stream", "conformance.__main__"]
)
def test_imports_stay_light(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "jinja2", "markupsafe", "hypothesis", "transformers", "pytest"}
    assert not set(done.stdout.split()) & heavy


def test_stream_fits_the_schema(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(report_schema())
    validator.check_schema(report_schema())
    failure = {**ended(CORE[0], "fail")["failure"], "measured": MEASURED}
    records = [
        ended(CORE[0], "fail", failure=failure, diagnosis=diagnosed("a", ("b", "c"), seen=["d"])),
        ended(CORE[1], "fail", diagnosis=None),
    ]
    made = report_of(records)
    for line in (*written(tmp_path), made.header, *made.records, made.footer):
        validator.validate(line)
        for name in line:
            if name != "type":
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


def _second_header(lines):
    return [*lines[:2], lines[0], *lines[2:]]


def _second_footer(lines):
    return [*lines, lines[-1]]


def _unfinished_then_whole(lines):
    return [*lines[:2], *lines]


def _lacks_a_core_requirement(lines):
    counts = {**lines[-1]["counts"], "suite": 2}
    return [*lines[:-1], {**lines[-1], "counts": counts}]


def _other_exit_code(lines):
    return [*lines[:-1], {**lines[-1], "exit_code": 0}]


def _other_comparisons(lines):
    return [lines[0], {**lines[1], "comparisons": {"exact": 7}}, *lines[2:]]


def _number_for_a_text(lines):
    return [lines[0], {**lines[1], "reason": 5}, *lines[2:]]


def _texts_for_numbers(lines):
    return [lines[0], {**lines[1], "comparisons": {"exact": "many"}}, *lines[2:]]


def _plans_an_object(lines):
    return [{**lines[0], "planned": [{}]}, *lines[1:]]


def _failure_without_kind(lines):
    return [*lines[:2], {**lines[2], "failure": {}}, *lines[3:]]


def _a_list(lines):
    return [*lines[:2], [], *lines[2:]]


def _unknown_verdict(lines):
    return [*lines[:-1], {**lines[-1], "verdict": "good"}]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_without_footer, reader.NoFooter),
        (_twice, reader.DuplicatedRecord),
        (_not_planned, reader.NotPlanned),
        (_other_schema, reader.UnknownSchema),
        (_other_counts, reader.Inconsistent),
        (_green_with_failures, reader.Inconsistent),
        (_no_header, reader.NotAReport),
        (_lacks_a_field, reader.BrokenLine),
        (_two_runs, reader.MixedRuns),
        (_second_header, reader.MixedRuns),
        (_second_footer, reader.MixedRuns),
        (_unfinished_then_whole, reader.MixedRuns),
        (_lacks_a_core_requirement, reader.Inconsistent),
        (_other_exit_code, reader.Inconsistent),
        (_other_comparisons, reader.Inconsistent),
        (_number_for_a_text, reader.BrokenLine),
        (_texts_for_numbers, reader.BrokenLine),
        (_plans_an_object, reader.BrokenLine),
        (_failure_without_kind, reader.BrokenLine),
        (_a_list, reader.BrokenLine),
        (_unknown_verdict, reader.BrokenLine),
    ],
)
def test_reader_refuses(tmp_path, damage, error):
    rewrite(tmp_path, damage(written(tmp_path)))
    with pytest.raises(error) as raised:
        reader.read_report(tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith(".")


def test_reader_refuses_a_green_run_with_missing_records(tmp_path):
    lines = written(tmp_path, ("pass", "pass", "pass"))
    counts = {**lines[-1]["counts"], "outcomes": {"pass": 2}}
    rewrite(tmp_path, [*lines[:3], {**lines[-1], "counts": counts}])
    with pytest.raises(reader.Inconsistent, match="1 planned requirement"):
        reader.read_report(tmp_path)


def test_reader_refuses_a_line_that_was_cut_off(tmp_path):
    written(tmp_path)
    text = (tmp_path / "report.jsonl").read_text()
    (tmp_path / "report.jsonl").write_text(text[:-20])
    with pytest.raises(reader.BrokenLine, match="cut off"):
        reader.read_report(tmp_path)


def test_reader_refuses_nothing_at_all(tmp_path):
    with pytest.raises(reader.NotAReport, match="no report"):
        reader.read_report(tmp_path)
    (tmp_path / "report.jsonl").write_text("")
    with pytest.raises(reader.NotAReport, match="header"):
        reader.read_report(tmp_path)


def test_a_new_run_forgets_the_old_verdict(tmp_path):
    written(tmp_path, ("pass", "pass", "pass"))
    stream.ReportWriter(tmp_path)
    with pytest.raises(reader.NotAReport):
        reader.read_report(tmp_path)
    assert not [name for name in PAGES if (tmp_path / name).exists()]


FOLDER_TAKEN = """
import pathlib, shutil, pytest

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    shutil.rmtree("out")
    pathlib.Path("out").write_text("a file")
"""


def test_a_report_that_cannot_be_written_is_said_and_is_not_green(tmp_path):
    run = suite_run(tmp_path, "-p", "taking", files={"taking.py": FOLDER_TAKEN})
    assert run.status == 4, run.text
    assert run.verdict.startswith("partial: 1 of "), run.text
    (line,) = [line for line in run.out.splitlines() if line.startswith("report ")]
    assert line == f"report  not written to {tmp_path / 'out'}: Not a directory"
    assert "INTERNALERROR" not in run.out + run.err, run.text


def test_known_bugs_that_explain_failures_stand_in_the_terminal():
    records = [
        ended(CORE[0], "fail", diagnosis=diagnosed("bug-one")),
        ended(CORE[1], "fail", diagnosis=diagnosed("bug-one", "bug-two")),
        ended(EXTENDED[0], "fail"),
    ]
    lines = [line for _, line in terminal_lines(records, report_of(records).verdict)]
    assert "looks like bug-one: 1 of 3 failed" in lines
    assert "looks like bug-one or bug-two: 1 of 3 failed" in lines


def test_terminal_lines_are_few(tmp_path):
    suite = {f"rule.a.n{i}": "core" for i in range(300)}
    planned = tuple(item(slug) for slug in suite)
    records = [ended(slug, "fail" if i % 2 else "declined") for i, slug in enumerate(suite)]
    lines = terminal_lines(records, judge(Plan(planned, suite), records))
    assert len(lines) < 60
    assert sum(line.startswith("declined: 150 requirements") for _, line in lines) == 1
    assert verdict.WORDS.keys() >= {record["outcome"] for record in records}
