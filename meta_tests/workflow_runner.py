"""Runs the jobs of a GitHub workflow here: its expressions, its shell lines, its composite actions.

Only what the workflows of the suite use is known; anything else is an error, so that a misspelt input
or a step that is not there does not pass for an empty string, as it would on GitHub. Actions of others
are stood in for: checkout and setup-python do nothing, artifacts are folders.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from command_line import BOUND, environment

CONTEXTS = ("github", "inputs", "steps", "matrix", "needs", "runner", "env")
TOKEN = re.compile(r"\s*('(?:[^']|'')*'|==|!=|&&|\|\||!|\(|\)|[A-Za-z_][\w.-]*(?:\(\))?|\d+)")
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)

PYTHON = """\
#!/bin/bash
# Nothing is installed by a test; what would be is written down.
if [ "$1 $2" = "-m pip" ]; then echo "${{@:3}}" >> "{log}"; exit 0; fi
if [ "$1 $2 $3" = "-m conformance gate" ]; then
  printf '%s\\n' "${{@:4}}" > "{gate}"; exit "${{GATE_STATUS:-0}}"
fi
exec "{python}" "$@"
"""

GH = """\
#!/bin/bash
printf '%s ' "$@" >> "{log}"; echo >> "{log}"
case "$1 $2" in
  "run list") [ -d "{main}" ] && echo 17 ;;
  "run download") mkdir -p "${{@: -1}}" && cp -r "{main}/." "${{@: -1}}" ;;
  "api --paginate") [ -z "$FAKE_GH_FAILS" ] && cat "{comments}" ;;
esac
"""


class UnknownName(KeyError):
    """An expression names what is not there."""


def load(text: str) -> dict[str, Any]:
    """A workflow or an action; ``on`` is a key, and not the truth value of YAML 1.1."""
    document = yaml.safe_load(text)
    if True in document:
        document["on"] = document.pop(True)
    return document


def expressions(value: object) -> list[str]:
    """Every expression in a part of a workflow, those of ``if`` too."""
    if isinstance(value, str):
        return EXPRESSION.findall(value)
    if isinstance(value, Mapping):
        bare = [v for k, v in value.items() if k == "if" and "${{" not in str(v)]
        return [*map(str, bare), *(e for v in value.values() for e in expressions(v))]
    return [e for v in value for e in expressions(v)] if isinstance(value, list) else []


def names_in(expression: str) -> list[str]:
    """The names of contexts that an expression reads."""
    found = TOKEN.findall(expression)
    return [token for token in found if re.match(r"[A-Za-z_][\w.-]*$", token)]


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The value of an expression; UnknownName for a name that is not there."""
    python, at = [], 0
    while at < len(expression.rstrip()):
        token = TOKEN.match(expression, at)
        if token is None:
            raise SyntaxError(f"cannot read {expression!r} from {expression[at:]!r}")
        word, at = token.group(1), token.end()
        operators = {"&&": " and ", "||": " or ", "!": " not "}
        if word in operators:
            python.append(operators[word])
        elif word.endswith("()"):
            python.append({"cancelled()": "False", "always()": "True"}[word])
        elif word[0].isalpha() or word[0] == "_":
            python.append(f"look({word!r})")
        else:
            python.append(repr(word[1:-1]) if word[0] == "'" else word)
    return eval("".join(python), {"look": lambda name: look(name, contexts)})


def look(name: str, contexts: Mapping[str, Any]) -> Any:
    """The value of ``inputs.report`` and the like; what an event does not have is empty."""
    value: Any = contexts
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            if name.startswith("github.event."):
                return ""
            raise UnknownName(name)
        value = value[part]
    return value


def filled(text: Any, contexts: Mapping[str, Any]) -> str:
    """A value with its expressions evaluated, as a string."""
    if not isinstance(text, str):
        return {True: "true", False: "false", None: ""}.get(text, str(text))
    return EXPRESSION.sub(lambda found: str(evaluate(found.group(1), contexts)), text)


@dataclass
class Job:
    """How a job ended."""

    conclusion: str
    outputs: dict[str, dict[str, str]]
    """Outputs of its steps, by id."""
    status: int | None
    """Exit status of the step that failed."""
    summary: str
    log: str


@dataclass
class Repository:
    """A checked-out repository on a runner, and what is beside it."""

    workspace: Path
    beside: Path
    event: str = "pull_request"
    base: str = "base-sha"
    """The commit that a pull request is to be merged into."""
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.beside.mkdir()
        self.artifacts = self.beside / "artifacts"
        self.main = self.beside / "main"
        """Put a report there, and it is the one of the base branch."""
        self.comments = self.beside / "comments.txt"
        """What the query for an earlier comment gives."""
        self.comments.write_text("")
        bin = self.beside / "bin"
        bin.mkdir()
        places = {
            "log": self.beside / "pip.log",
            "gate": self.beside / "gate.log",
            "python": sys.executable,
        }
        self._program(bin / "python", PYTHON.format(**places))
        places = {"log": self.beside / "gh.log", "main": self.main, "comments": self.comments}
        self._program(bin / "gh", GH.format(**places))

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def logged(self, name: str) -> str:
        """What was asked of pip, gh or the gate."""
        file = self.beside / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def github(self) -> dict[str, Any]:
        """The context ``github``."""
        pull = {"number": 7, "base": {"sha": self.base}, "head": {"repo": {"full_name": "a/b"}}}
        return {
            "token": "a-token",
            "ref": "refs/pull/7/merge",
            "base_ref": "main",
            "event_name": self.event,
            "repository": "a/b",
            "event": {"pull_request": pull} if self.event == "pull_request" else {},
        }

    def run(self, workflow: dict[str, Any], job: str) -> list[Job]:
        """Run a job, once for each combination of its matrix."""
        made = workflow["jobs"][job]
        contexts = {"github": self.github()}
        if "if" in made and not evaluate(_bare(made["if"]), contexts):
            return [Job("skipped", {}, None, "", "")]
        matrix = made.get("strategy", {}).get("matrix", {})
        combinations = itertools.product(*matrix.values())
        return [
            self._steps(made["steps"], {**contexts, "matrix": dict(zip(matrix, values))}, "bash -e")
            for values in combinations
        ]

    def _steps(self, steps: list[dict[str, Any]], contexts: dict[str, Any], shell: str) -> Job:
        outputs: dict[str, dict[str, str]] = {}
        job = Job("success", outputs, None, "", "")
        for step in steps:
            scope = {**contexts, "steps": {id: {"outputs": o} for id, o in outputs.items()}}
            condition = _bare(step.get("if", "always()"))
            runs_on = "cancelled()" in condition or (
                "if" not in step and job.conclusion == "success"
            )
            if job.conclusion != "success" and not runs_on:
                continue
            if not evaluate(condition, scope):
                continue
            status, written = self._step(step, scope, shell, job)
            if "id" in step:
                outputs[step["id"]] = written
            if status and not step.get("continue-on-error"):
                job.conclusion, job.status = "failure", job.status or status
        return job

    def _step(
        self, step: dict[str, Any], scope: dict[str, Any], shell: str, job: Job
    ) -> tuple[int, dict[str, str]]:
        if "run" in step:
            return self._script(step, scope, shell, job)
        given = {name: filled(value, scope) for name, value in step.get("with", {}).items()}
        uses = step["uses"]
        if uses.startswith("./"):
            return self._action(self.workspace / uses / "action.yml", given, scope, job)
        name = uses.partition("@")[0]
        if name == "actions/upload-artifact":
            source = self.workspace / given["path"]
            if source.is_dir():
                shutil.copytree(source, self.artifacts / given["name"])
        elif name == "actions/download-artifact":
            for found in sorted(self.artifacts.iterdir()):
                if fnmatch.fnmatchcase(found.name, given["pattern"]):
                    shutil.copytree(found, self.workspace / given["path"] / found.name)
        elif name not in ("actions/checkout", "actions/setup-python"):
            raise UnknownName(uses)
        return 0, {}

    def _action(
        self, file: Path, given: dict[str, str], scope: dict[str, Any], job: Job
    ) -> tuple[int, dict[str, str]]:
        action = load(file.read_text())
        unknown = given.keys() - action["inputs"].keys()
        if unknown:
            raise UnknownName(f"inputs {unknown} of {file}")
        github = {"github": scope["github"]}
        defaults = {n: filled(made.get("default"), github) for n, made in action["inputs"].items()}
        inner = {**github, "inputs": {**defaults, **given}}
        ended = self._steps(action["runs"]["steps"], inner, "")
        job.summary, job.log = job.summary + ended.summary, job.log + ended.log
        steps = {"steps": {id: {"outputs": o} for id, o in ended.outputs.items()}}
        try:
            written = {n: filled(o["value"], steps) for n, o in action["outputs"].items()}
        except UnknownName:  # a step that did not run; on GitHub its outputs are empty
            assert ended.conclusion == "failure"
            written = {}
        job.outputs["action"] = written
        return ended.status or 0, written

    def _script(
        self, step: dict[str, Any], scope: dict[str, Any], shell: str, job: Job
    ) -> tuple[int, dict[str, str]]:
        folder = self.beside / "step"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        (folder / "script.sh").write_text(filled(step["run"], scope))
        named = step.get("shell")
        assert named or shell, f"{step.get('name')}: a step of an action names its shell"
        command = "bash --noprofile --norc -eo pipefail" if named == "bash" else shell
        env = environment(
            **{name: str(path) for name, path in files.items()},
            **{name: filled(value, scope) for name, value in step.get("env", {}).items()},
            **self.variables,
            RUNNER_TEMP=str(self._temporary()),
            GITHUB_REPOSITORY="a/b",
            GITHUB_SERVER_URL="https://github.com",
            GITHUB_RUN_ID="99",
        )
        env["PATH"] = f"{self.beside / 'bin'}{os.pathsep}{env['PATH']}"
        done = subprocess.run(
            [*command.split(), str(folder / "script.sh")],
            cwd=self.workspace / filled(step.get("working-directory", "."), scope),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BOUND,
            check=False,
        )
        job.log += f"--- {step.get('name')}\n{done.stdout}"
        job.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        return done.returncode, dict(line.split("=", 1) for line in lines)

    def _temporary(self) -> Path:
        folder = self.beside / "temporary"
        folder.mkdir(exist_ok=True)
        return folder


def _bare(condition: str) -> str:
    """A condition without the braces that it may have."""
    found = EXPRESSION.fullmatch(condition.strip())
    return found.group(1) if found else condition
