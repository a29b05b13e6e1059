"""The action and the workflows that ``init`` writes: valid, and green and red where they must be."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess

import pytest
from command_line import ROOT
from toy_repository import fill_in, plant, with_init
from workflow_runner import CONTEXTS, Repository, UnknownName, evaluate, expressions, load, names_in

from conformance.gate.command import add_options

TEMPLATES = ROOT / "conformance/scaffold/templates"
ACTION_FILE = ROOT / ".github/actions/conformance/action.yml"
ACTION = load(ACTION_FILE.read_text())
WORKFLOWS = {path.name: load(path.read_text()) for path in sorted(TEMPLATES.glob("*.yml"))}
STEPS = [
    *((f"{ACTION_FILE.name}, step {n}", step) for n, step in enumerate(ACTION["runs"]["steps"])),
    *(
        (f"{name}, {job}, step {n}", step)
        for name, workflow in WORKFLOWS.items()
        for job, made in workflow["jobs"].items()
        for n, step in enumerate(made["steps"])
    ),
]

workflow = pytest.mark.parametrize("name", WORKFLOWS)
step = pytest.mark.parametrize("step", [s for _, s in STEPS], ids=[name for name, _ in STEPS])


# What GitHub expects, as far as it can be seen from here


def test_the_workflows_are_those_that_init_writes():
    assert set(WORKFLOWS) == {"conformance.yml", "conformance-split.yml", "conformance-gpu.yml"}


@workflow
def test_a_workflow_has_what_it_must(name):
    made = WORKFLOWS[name]
    assert made.keys() == {"name", "on", "permissions", "concurrency", "jobs"}
    assert "pull_request" in made["on"]
    assert made["permissions"]["contents"] == "read"
    for job in made["jobs"].values():
        allowed = {"runs-on", "timeout-minutes", "steps", "if", "needs", "strategy"}
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys() <= allowed
        assert set([job["needs"]] if "needs" in job else []) < set(made["jobs"])


def test_the_action_is_composite_and_describes_its_inputs_and_outputs():
    assert ACTION.keys() == {"name", "description", "inputs", "outputs", "runs"}
    assert ACTION["runs"].keys() == {"using", "steps"}
    assert ACTION["runs"]["using"] == "composite"
    for made in ACTION["inputs"].values():
        assert made.keys() == {"description", "default"}
        assert isinstance(made["default"], str), "GitHub passes strings"
    for made in ACTION["outputs"].values():
        assert made.keys() == {"description", "value"}


@step
def test_a_step_runs_or_uses_and_what_it_uses_has_a_version(step):
    keys = {"name", "id", "if", "env", "run", "shell", "working-directory", "uses", "with"}
    assert step.keys() <= {*keys, "continue-on-error"}
    assert ("run" in step) != ("uses" in step)
    if "uses" in step and step["uses"] != "./.github/actions/conformance":
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@step
def test_what_a_step_gives_to_the_action_is_an_input_of_it(step):
    if step.get("uses", "").startswith("./"):
        assert step["with"].keys() <= ACTION["inputs"].keys()
        assert all(isinstance(value, str) for value in step["with"].values())


@step
def test_shell_lines_have_no_expressions_and_know_their_variables(step):
    """A value that is pasted into a script is run by the shell; one in a variable is not."""
    script = step.get("run", "")
    assert "${{" not in script
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", re.sub(r"<<'END'.*?^END$", "", script, flags=24)))
    given = {"GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_REPOSITORY", "RUNNER_TEMP"}
    assert used <= {*step.get("env", {}), *given, "PYTEST_ADDOPTS"}
    assert set(step.get("env", {})) <= used | {"GH_TOKEN"}
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_steps_of_the_action_name_their_shell():
    for made in ACTION["runs"]["steps"]:
        assert ("shell" in made) == ("run" in made)


def test_expressions_of_the_action_read_inputs_and_earlier_steps():
    read = set()
    ids: list[str] = []
    for made in ACTION["runs"]["steps"]:
        for name in (name for text in expressions(made) for name in names_in(text)):
            context, *rest = name.split(".")
            assert context in ("inputs", "steps", "github"), name
            if context == "inputs":
                read.add(rest[0])
            if context == "steps":
                assert rest[0] in ids, f"{name} is read before its step"
        ids += [made["id"]] if "id" in made else []
    assert read == set(ACTION["inputs"])
    for made in ACTION["outputs"].values():
        (text,) = expressions(made["value"])
        (name,) = names_in(text)
        assert name.split(".")[1] in ids


@workflow
def test_expressions_of_a_workflow_read_contexts_that_there_are(name):
    made = WORKFLOWS[name]
    assert expressions(made)
    for text in expressions(made):
        for read in names_in(text):
            assert read.split(".")[0] in CONTEXTS, read


# The interpreter itself


def test_the_interpreter_reads_expressions_as_github_does():
    contexts = {"inputs": {"python-version": "3", "empty": ""}, "github": {"event": {}}}
    assert evaluate("inputs.python-version != ''", contexts) is True
    assert evaluate("inputs.empty == 'true' || !cancelled()", contexts) is True
    assert evaluate(" github.event.pull_request.number ", contexts) == ""
    with pytest.raises(UnknownName):
        evaluate("inputs.pyhton-version", contexts)


# To a verdict


@pytest.fixture
def repository(tmp_path):
    """A repository with everything that ``init`` writes, and an adapter that is right."""
    workspace = tmp_path / "repository"
    workspace.mkdir()
    fill_in(with_init(workspace, "--gpu"))
    return Repository(workspace, tmp_path / "beside")


FEW = "arguments: --smoke --conformance-diagnosis 0"
ONE_CONTRACT = "\n          tests: --pyargs conformance.test_attention"


def quick(name: str, *changes: tuple[str, str]) -> dict:
    """A workflow with few requirements of one contract, so that it takes seconds."""
    text = (TEMPLATES / name).read_text()
    few = ("install: model-conformance", "install: model-conformance" + ONE_CONTRACT)
    for old, new in (("arguments: -n 2", FEW), few, *changes):
        assert old in text
        text = text.replace(old, new)
    return load(text)


def test_a_right_adapter_is_green_and_shown(repository):
    (job,) = repository.run(quick("conformance.yml", (ONE_CONTRACT, "")), "conformance")
    assert job.conclusion == "success", job.log
    assert job.outputs["action"] == {"verdict": "partial", "exit-code": "0"}
    assert "Conformance: partial" in job.summary
    assert (repository.artifacts / "conformance-report/report.jsonl").is_file()
    assert repository.logged("pip") == "install --disable-pip-version-check model-conformance\n"
    gh = repository.logged("gh").splitlines()
    assert gh[0].startswith("run list --workflow conformance.yml --branch main ")
    assert gh[-1].startswith(
        "api --silent --method POST repos/a/b/issues/7/comments --field body=@"
    )
    comment = (repository.beside / "temporary/conformance-comment.md").read_text()
    assert comment.startswith("<!-- model-conformance: conformance-report -->\n")
    assert job.summary in comment
    assert "https://github.com/a/b/actions/runs/99" in comment


def test_a_mistake_is_red_and_what_changed_is_shown_in_the_comment_that_is_there(repository):
    quickly = quick("conformance.yml")
    repository.run(quickly, "conformance")
    (repository.artifacts / "conformance-report").rename(repository.main)
    repository.comments.write_text("41\n42\n")
    plant(repository.workspace)
    (job,) = repository.run(quickly, "conformance")
    assert (job.conclusion, job.status) == ("failure", 1), job.log
    assert job.outputs["action"] == {"verdict": "fail", "exit-code": "1"}
    assert "attention.causal.aligned-to-last-key" in job.summary
    changes = repository.artifacts / "conformance-report/changes/summary.md"
    assert job.summary.startswith(changes.read_text())
    patch = repository.logged("gh").splitlines()[-1]
    assert patch.startswith("api --silent --method PATCH repos/a/b/issues/comments/41 ")


def test_an_adapter_that_cannot_be_imported_is_red_without_a_verdict(repository):
    """And where no comment may be written, that is said, and decides nothing."""
    repository.variables["FAKE_GH_FAILS"] = "1"
    (repository.workspace / "conformance_adapter.py").write_text("import nowhere\n")
    (job,) = repository.run(quick("conformance.yml"), "conformance")
    assert (job.conclusion, job.status) == ("failure", 4), job.log
    assert job.outputs["action"] == {"verdict": "none", "exit-code": "4"}
    assert "## Conformance: no verdict" in job.summary
    assert "status 4" in job.summary
    assert "::warning::No comment was written" in job.log


def test_a_run_without_a_requirement_is_red(repository):
    """pytest is content with the tests that it was given; there is no verdict, so it is no gate."""
    (repository.workspace / "tests/test_other.py").write_text("def test_one(): pass\n")
    change = ("tests: --pyargs conformance.test_attention", "tests: tests/test_other.py")
    (job,) = repository.run(quick("conformance.yml", change), "conformance")
    assert (job.conclusion, job.status) == ("failure", 6), job.log
    assert job.outputs["action"]["verdict"] == "none"


TWO = (
    ("[1, 2, 3, 4]", "[1, 2]"),
    ("matrix.part }}/4", "matrix.part }}/2"),
    ("parts: parts", "parts: parts\n          arguments: --partial"),  # a few are no whole suite
)


def split(repository) -> dict:
    made = quick("conformance-split.yml", *TWO)
    for job in repository.run(made, "part"):
        assert job.conclusion == "success", job.log
    return made


def test_a_split_run_is_green_and_red_where_a_part_broke_off(repository):
    made = split(repository)
    (job,) = repository.run(made, "conformance")
    assert job.conclusion == "success", job.log
    assert job.outputs["action"] == {"verdict": "partial", "exit-code": "0"}
    whole = repository.artifacts / "conformance-report/report.jsonl"
    lines = whole.read_text().splitlines()
    assert len(lines) == len(json.loads(lines[0])["planned"]) + 2

    stream = repository.artifacts / "conformance-part-2/report.jsonl"
    stream.write_text("".join(stream.read_text().splitlines(True)[:-1]))
    shutil.rmtree(whole.parent)
    shutil.rmtree(repository.workspace / "parts")
    left = repository.workspace / "conformance-report/report.jsonl"
    assert left.is_file(), "what a folder holds that is not fresh must not count"
    (job,) = repository.run(made, "conformance")
    assert (job.conclusion, job.status) == ("failure", 4), job.log
    assert "has no footer" in job.log
    assert job.outputs["action"]["verdict"] == "none"


def test_a_split_run_is_red_for_what_one_part_finds(repository):
    plant(repository.workspace)
    (job,) = repository.run(split(repository), "conformance")
    assert (job.conclusion, job.status) == ("failure", 1), job.log
    assert job.outputs["action"] == {"verdict": "fail", "exit-code": "1"}
    assert "attention.causal.aligned-to-last-key" in job.summary


def committed(repository, *paths: str) -> str:
    """A commit of these files, in the repository that the workspace becomes."""
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for words in (("init",), ("add", *paths), (*who, "commit", "--allow-empty", "-m", "base")):
        command = ["git", *words]
        subprocess.run(command, cwd=repository.workspace, check=True, capture_output=True)
    head = ["git", "rev-parse", "HEAD"]
    return subprocess.check_output(head, cwd=repository.workspace, text=True).strip()


def on_gpu(repository, *changes: tuple[str, str], without_suite: bool = False):
    """The job of the workflow for a GPU; or that of its other steps, after a suite that was green."""
    text = (TEMPLATES / "conformance-gpu.yml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    made = load(text)
    if without_suite:
        steps = made["jobs"]["conformance-gpu"]["steps"]
        steps[:] = [step for step in steps if not step.get("uses", "").startswith("./")]
    (job,) = repository.run(made, "conformance-gpu")
    return job


def test_the_workflow_of_a_gpu_is_red_where_there_is_none_and_compares_with_the_base(repository):
    repository.variables["CUDA_VISIBLE_DEVICES"] = ""
    repository.base = committed(repository, "conformance_adapter.py")
    few = "arguments: -m gpu -k attention.full -n 0" + ONE_CONTRACT
    job = on_gpu(repository, ("arguments: -m gpu", few))
    assert (job.conclusion, job.status) == ("failure", 6), job.log
    assert "no CUDA device" in job.summary
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(repository.logged("gate").splitlines())
    assert (options.base, options.head) == (repository.base, ".")
    assert (options.impl, str(options.output)) == ("conformance_adapter", "conformance-gate")


def test_the_gate_of_times_decides_too(repository):
    repository.variables["GATE_STATUS"] = "1"
    repository.base = committed(repository, "conformance_adapter.py")
    folder = repository.workspace / "conformance-gate"
    folder.mkdir()
    (folder / "summary.md").write_text("## Gate: REGRESSED\n")
    job = on_gpu(repository, without_suite=True)
    assert (job.conclusion, job.status) == ("failure", 1), job.log
    assert job.summary == "## Gate: REGRESSED\n"
    assert (repository.artifacts / "conformance-gate/summary.md").is_file()


def test_a_base_without_an_adapter_is_nothing_to_compare_with(repository):
    repository.variables["GATE_STATUS"] = "4"
    repository.base = committed(repository)
    job = on_gpu(repository, without_suite=True)
    assert job.conclusion == "success", job.log
    assert job.summary == "Times are not compared: the base has no adapter.\n"
    assert not repository.logged("gate")


def test_strangers_do_not_get_a_runner_of_the_repository(repository):
    made = load((TEMPLATES / "conformance-gpu.yml").read_text())
    stranger = repository.github()
    stranger["event"]["pull_request"]["head"]["repo"]["full_name"] = "stranger/b"
    repository.github = lambda: stranger
    (job,) = repository.run(made, "conformance-gpu")
    assert job.conclusion == "skipped"
