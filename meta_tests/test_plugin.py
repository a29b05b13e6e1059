"""The plugin through the command line: verdicts, exit codes, selections, a user's own repository."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from command_line import ONE, ROOT, environment, pytest_run, start, suite_run

from conformance.harness.data import report_schema

REPOSITORY = {
    "tests/test_conformance.py": "from conformance.test_attention import *  # noqa: F403\n",
    "tests/conftest.py": "import pytest\nfrom my_attention import Mine\n\n"
    "@pytest.fixture(scope='session')\ndef implementation():\n    return Mine()\n",
    "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
    "my_attention.py": "import torch.nn.functional as F\n\n\nclass Mine:\n"
    "    def attention(self, q, k, v, *, causal=False):\n"
    "        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)\n",
}

UNRELATED = {
    "test_unrelated.py": "import sys\n\ndef test_nothing_is_imported():\n"
    "    assert not {'torch', 'hypothesis', 'transformers'} & sys.modules.keys()\n"
    "    assert not [m for m in sys.modules if m.startswith('conformance.harness')]\n",
    "pyproject.toml": "[tool.conformance]\nimplementation = 'no_such_thing'\n",
}

MIXED = {
    **REPOSITORY,
    "my_attention.py": "class Mine:\n    def attention(self, q, k, v):\n"
    "        raise NotImplementedError('no')\n",
    "tests/test_mine.py": "def test_mine():\n    assert False\n",
}


def _checkout(folder):
    """The checkout itself, without an entry point: its conftest.py loads the plugin."""
    return pytest_run(
        folder,
        "conformance/test_attention.py",
        "--impl=torch-sdpa",
        "-k",
        ONE,
        "--conformance-report",
        str(folder / "out"),
        "-p",
        "no:randomly",
        installed=False,
        cwd=ROOT,
    )


BUG = "known-bug:attn-gqa-tile-not-interleave"

RUNS = {
    "smoke": lambda f: suite_run(f, "--smoke", "-n2", "--junitxml", str(f / "junit.xml"), only=""),
    "bug": lambda f: suite_run(
        f,
        "--impl",
        BUG,
        "--junitxml",
        str(f / "junit.xml"),
        only="attention.gqa.query-head",
        fresh=True,
    ),
    "variant": lambda f: suite_run(f, "--impl", f"variant:{_a_variant()}"),
    "two workers": lambda f: suite_run(
        f, "-n2", "--impl", BUG, "--hypothesis-seed=3", only="attention.gqa.query-head"
    ),
    "two workers, unknown name": lambda f: suite_run(f, "-n2", "--impl", "torch-spda"),
    "hypothesis": lambda f: suite_run(f, "--hypothesis-profile=explore", "--hypothesis-seed=7"),
    "gpu": lambda f: suite_run(f, "-m", "gpu", CUDA_VISIBLE_DEVICES=""),
    "checkout": _checkout,
    "unrelated": lambda f: pytest_run(f, "-q", fresh=True, files=UNRELATED),
    "repository": lambda f: pytest_run(
        f, "-k", f"{ONE} or attention.full", "--conformance-report", "out", files=REPOSITORY
    ),
    "repository, with --impl": lambda f: pytest_run(
        f, "-k", ONE, "--impl=reference", "--conformance-report", "out", files=REPOSITORY
    ),
    "mixed": lambda f: pytest_run(f, "-k", f"{ONE} or test_mine", files=MIXED),
    "mixed, others only": lambda f: pytest_run(f, "-k", "test_mine", files=MIXED),
    "required": lambda f: suite_run(
        f,
        "--impl=torch-sdpa",
        only="attention.sinks.shrink or attention.full.matches",
        files={"pyproject.toml": "[tool.conformance]\nrequire = ['attention.sinks.shrink*']\n"},
    ),
    "no folder": lambda f: suite_run(
        f, "--conformance-report", "taken/out", files={"taken": "a file"}
    ),
    "pyproject": lambda f: suite_run(
        f, files={"pyproject.toml": "[tool.conformance]\nimplementation = 'torch-sdpa'\n"}
    ),
    "environment": lambda f: suite_run(f, CONFORMANCE_IMPL="torch-sdpa"),
    "wrong fixture": lambda f: pytest_run(
        f, "-k", ONE, files={**REPOSITORY, "my_attention.py": "class Mine:\n    pass\n"}
    ),
}


def _a_variant():
    from conformance.correct_variants import all_correct_variants

    return next(v.id for v in all_correct_variants().values() if v.contract == "attention")


@pytest.fixture
def ended(tmp_path_factory, request):
    """How a run ended. All are begun at once where all are asked for."""

    def begin(name):
        return start(("plugin", name), lambda: RUNS[name](tmp_path_factory.mktemp("run")))

    if len(request.session.items) > len(RUNS):
        for name in RUNS:
            begin(name)

    def of(name):
        run = begin(name).result()
        assert "INTERNALERROR" not in run.out + run.err, run.text
        return run

    return of


def test_smoke_is_partial_and_quick_under_xdist(ended):
    run = ended("smoke")
    assert run.status == 0, run.text
    assert run.verdict.startswith("partial: smoke, "), run.text
    report = run.report()
    assert report.header["profile"] == "smoke"
    assert all(record["drawn"] <= 2 for record in report.records)
    assert 4 <= len(report.records) < len(report.header["suite"])


def test_a_known_bug_fails(ended):
    run = ended("bug")
    assert run.status == 1, run.text
    assert "reproduce" in run.out
    assert "Falsifying example" not in run.out, run.text
    (record,) = run.report().records
    failure = record["failure"]
    assert failure["kind"]
    assert failure["case"].startswith("AttentionCase(")
    assert failure["rule"]
    assert failure["source"]
    summary = (run.folder / "out" / "summary.md").read_text()
    assert "## Conformance: fail" in summary


def test_the_lines_that_reproduce_a_failure_run_by_themselves(ended):
    (record,) = ended("bug").report().records
    lines = record["failure"]["reproduction"]
    assert not any("pytest" in line for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_correct_variant_passes(ended):
    run = ended("variant")
    assert run.status == 0, run.text
    assert [record["outcome"] for record in run.report().records] == ["pass"]


def test_workers_report_as_one_process_does(ended):
    run = ended("two workers")
    assert run.status == 1, run.text
    report = run.report()
    assert report.header["seed"] == "3"
    assert report.header["implementation"]["name"] == BUG
    assert [record["outcome"] for record in report.records] == ["fail"]


def test_a_usage_error_in_workers_is_one_line(ended):
    run = ended("two workers, unknown name")
    assert run.status == 4, run.text
    assert "ERROR: conformance: unknown implementation 'torch-spda' (did you mean" in run.err
    assert "Traceback" not in run.out + run.err, run.text


def test_hypothesis_options_keep_their_meaning(ended):
    run = ended("hypothesis")
    assert run.status == 0, run.text
    report = run.report()
    assert (report.header["profile"], report.header["seed"]) == ("explore", "7")
    assert report.records[0]["drawn"] == 100


def test_a_selection_is_partial(ended):
    run = ended("environment")
    assert run.verdict.startswith("partial: 1 of "), run.text
    assert "deselected" in run.verdict


def test_environment_variable_chooses(ended):
    implementation = ended("environment").report().header["implementation"]
    assert (implementation["name"], implementation["chosen_by"]) == (
        "torch-sdpa",
        "CONFORMANCE_IMPL",
    )


def test_pyproject_chooses(ended):
    implementation = ended("pyproject").report().header["implementation"]
    assert (implementation["name"], implementation["chosen_by"]) == ("torch-sdpa", "pyproject.toml")


def test_without_a_gpu_nothing_ran(ended):
    run = ended("gpu")
    assert run.status == 6, run.text
    assert run.verdict.startswith("inconclusive: none of 1 planned"), run.text
    (record,) = run.report().records
    assert (record["outcome"], record["reason"]) == ("not_run", "no CUDA device")
    assert record["id"] == f"{ONE}[cuda]"


def test_a_checkout_needs_no_installation(ended):
    run = ended("checkout")
    assert run.report().header["implementation"]["name"] == "torch-sdpa", run.text
    assert run.report().header["implementation"]["file"] == (
        "conformance/implementations/torch_sdpa.py"
    )


def test_an_unrelated_run_notices_nothing(ended):
    run = ended("unrelated")
    assert run.status == 0, run.text
    assert "conformance" not in run.out.replace("model-conformance", ""), run.text


def test_a_repository_needs_one_import_and_one_fixture(ended):
    run = ended("repository")
    report = run.report()
    assert report.header["implementation"]["chosen_by"] == "fixture"
    assert report.header["implementation"]["file"] == "tests/conftest.py"
    by_slug = {record["slug"]: record for record in report.records}
    # torch's is_causal aligns to the first key: this implementation has that bug.
    assert by_slug[ONE]["outcome"] == "fail", run.text
    assert by_slug["attention.full.matches-oracle"]["outcome"] == "pass"
    lines = by_slug[ONE]["failure"]["reproduction"]
    assert "from my_attention import Mine" in lines
    assert run.status == 1


def test_an_explicit_name_wins_over_the_fixture(ended):
    run = ended("repository, with --impl")
    assert run.status == 0, run.text
    assert run.report().header["implementation"]["name"] == "reference"


def test_another_failing_test_is_not_hidden(ended):
    run = ended("mixed")
    assert run.status == 1, run.text
    assert run.verdict.startswith("inconclusive"), run.text


def test_other_tests_alone_get_no_verdict(ended):
    run = ended("mixed, others only")
    assert run.status == 1, run.text
    assert "verdict" not in run.out, run.text


def test_what_is_required_must_run(ended):
    run = ended("required")
    assert run.status == 6, run.text
    assert run.verdict.startswith("fail: too few executed: 1 of 1 required"), run.text
    assert "(declined)" in run.verdict


def test_a_report_that_cannot_be_written_is_a_usage_error(ended):
    run = ended("no folder")
    assert run.status == 4, run.text
    assert "--conformance-report: cannot write to taken/out" in run.err, run.text
    assert "Traceback" not in run.err, run.text


def test_a_fixture_that_gives_no_adapter_is_a_usage_error(ended):
    run = ended("wrong fixture")
    assert run.status == 4, run.text
    assert "offers no contract" in run.verdict, run.text
    assert "Traceback" not in run.out, run.text


def test_junit_agrees(ended):
    run = ended("bug")
    suite = ET.parse(run.folder / "junit.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    text = suite.find("testcase/failure").text
    assert "reproduce" in text
    smoke = ended("smoke")
    suite = ET.parse(smoke.folder / "junit.xml").getroot().find("testsuite")
    assert int(suite.get("tests")) == len(smoke.report().records)


def test_every_line_of_every_report_fits_the_schema(ended):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(report_schema())
    for name in ("smoke", "bug", "two workers", "gpu", "repository", "environment"):
        text = (ended(name).folder / "out" / "report.jsonl").read_text()
        for line in text.splitlines():
            validator.validate(json.loads(line))


# python -m conformance


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "conformance", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_list_of_implementations_needs_no_torch():
    code = (
        "import sys; from conformance.__main__ import main; main(['impls', '--json']); "
        "assert not {'torch', 'hypothesis', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"reference", "torch-sdpa"} <= {row["name"] for row in json.loads(done.stdout)}


def test_lists_in_process(capsys):
    from conformance.__main__ import main

    assert main(["requirements", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["slug"] for row in rows} >= {ONE}
    assert all(row["rule"] and row["source"] and row["level"] for row in rows)
    assert main(["bugs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["status"] for row in rows} <= {"planted", "not expressible", "not planted"}
    assert all(row["title"] for row in rows)
    for name in ("requirements", "bugs", "version", "impls"):
        assert main([name]) == 0
        assert capsys.readouterr().out.strip()


def test_kill_matrix_is_read_where_there_is_one(monkeypatch):
    import conformance.harness.data as data
    from conformance.__main__ import bugs

    monkeypatch.setattr(data, "kill_matrix", dict)
    planted = [row for row in bugs() if row["status"] == "planted"]
    assert all(row["caught_by"] is None for row in planted)
    matrix = {planted[0]["id"]: {"caught_by": [ONE], "telling": 1}}
    monkeypatch.setattr(data, "kill_matrix", lambda: matrix)
    assert bugs()[0]["caught_by"] == [ONE] or any(row["caught_by"] == [ONE] for row in bugs())


def test_unknown_command_is_an_argument_error():
    done = command("nope")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr
