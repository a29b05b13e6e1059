"""Stories of watchers: lines that write checkpoints, poll and restart, executed one by one.

The lines that a failure prints are those that were executed, behind the functions that they call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from conformance.harness import watcher_program
from conformance.harness.calls import Call
from conformance.harness.failures import ConformanceFailure
from conformance.harness.flat_folders import MEMORY
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, errors_named
from conformance.harness.watcher_cases import WatcherCase

SEEN = "os.system(f'cat {log} {results}')"
"""What shows a fault: what was evaluated, and what was written."""


@dataclass(frozen=True)
class WatcherCall(Call):
    """The last line of a story."""

    last: str = ""

    def source(self) -> str:
        """That line."""
        return self.last


class Story:
    """What happens to the checkpoints of a case, and to those who watch them.

    ``place`` is Python for the path of the results, ``options`` are those of the watcher.
    """

    def __init__(
        self,
        subject: Subject,
        case: WatcherCase,
        *,
        place: str = "os.path.join(folder.name, 'results.jsonl')",
        **options: str,
    ) -> None:
        self.case = case
        self.options = options or {"attempts": str(case.attempts)}
        self.codes: dict[str, int] = {}
        """The weights that each checkpoint has now."""
        self.lines: list[str] = []
        self.last = "None"
        self.place = place
        self.namespace: dict[str, Any] = {
            "__name__": "__main__",  # the module of classes that lines make
            "checkpoint_watcher": subject,
        }

    def __enter__(self) -> Story:
        """Make the folder of a run."""
        exec(program(), self.namespace)
        where = MEMORY if os.access(MEMORY, os.W_OK) else None
        self.folder = tempfile.TemporaryDirectory(prefix="conformance-watcher-", dir=where)
        self.namespace |= {"folder": self.folder, "os": os}
        self.do("directory = os.path.join(folder.name, 'run')")
        self.do(f"results = {self.place}")
        self.do("log = os.path.join(folder.name, 'log')")
        self.do("os.mkdir(directory)")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove everything."""
        self.folder.cleanup()
        self.namespace.clear()

    # Doing

    def do(self, line: str) -> Any:
        """Execute a line; what an expression gives."""
        if self.last != "None":
            self.lines.append(self.last)
        self.last = line
        try:
            with errors_named("poll"):
                return execute(line, self.namespace)
        except ConformanceFailure as failure:
            failure.call = failure.call or self.call()
            raise

    def call(self) -> WatcherCall:
        """The story up to here."""
        lines = (*introduction((*self.lines, self.last)), *self.lines)
        return WatcherCall("checkpoint_watcher", lines, (), case=self.case, last=self.last)

    def write(self, *names: str, without: Sequence[str] = (), more: int = 0) -> None:
        """Write checkpoints of the case; ``more`` gives them other weights."""
        for name in names:
            self.codes[name] = self.case.code(name) + more
            rest = f", without={[*without]!r}" if without else ""
            self.do(f"write({name!r}, {self.case.kind(name)}, {self.codes[name]}{rest})")

    def write_all(self) -> None:
        """Write all checkpoints of the case, in its order."""
        self.write(*(f"checkpoint-{step}" for step in self.case.steps))

    def complete(self, name: str) -> None:
        """Write what a checkpoint lacks."""
        self.do(f"complete({name!r})")

    def watch(self, **options: str) -> None:
        """Make a watcher: the first one, or one of a new process."""
        options = self.options | options
        given = "".join(f", {name}={source}" for name, source in options.items() if source)
        self.do(f"watcher = checkpoint_watcher(directory, evaluate, results=results{given})")

    def acts(self, name: str, *sources: str) -> None:
        """What happens in the next evaluations of a checkpoint."""
        self.do(f"acts[{name!r}] = [{', '.join(sources)}]")

    def poll(self, *names: str, because: str = "") -> Any:
        """Poll; exactly these checkpoints are evaluated, in this order, each as it is now."""
        before = len(self.log())
        polled = self.do("polled = watcher.poll()")
        self.assert_shown(self.log()[before:], names, because)
        return polled

    # What was seen

    def path(self, name: str) -> Path:
        """A path of the story."""
        return Path(self.namespace[name])

    def log(self) -> list[dict[str, Any]]:
        """What ``evaluate`` was shown, in order."""
        path = self.path("log")
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []

    def content(self) -> bytes:
        """The bytes of the results."""
        path = self.path("results")
        return path.read_bytes() if path.exists() else b""

    def records(self) -> list[dict[str, Any]]:
        """What the lines of the results hold; fails unless every line is a JSON object."""
        content = self.content()
        if content and not content.endswith(b"\n"):
            self.fail("unreadable results", f"the last line has no end: {content[-60:]!r}")
        found = []
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                found.append(json.loads(line))
            except ValueError:
                self.fail("unreadable results", f"line {number} is not JSON: {line[:200]!r}")
            if not isinstance(found[-1], dict):
                self.fail("unreadable results", f"line {number} is no object: {line[:200]!r}")
        counted()
        return found

    def results(self) -> list[dict[str, Any]]:
        """The lines that have results."""
        return [record for record in self.records() if "results" in record]

    def errors(self) -> list[dict[str, Any]]:
        """The lines that have an error."""
        return [record for record in self.records() if "error" in record]

    # What must be

    def fail(self, kind: str, summary: str, *details: str) -> NoReturn:
        """Raise a failure."""
        raise ConformanceFailure(kind, summary, details=details, call=self.call(), shown_by=SEEN)

    def assert_shown(
        self, shown: Sequence[dict[str, Any]], names: Sequence[str], because: str
    ) -> None:
        """Fail unless ``evaluate`` was shown these checkpoints, in this order, whole."""
        counted()
        found = [each["name"] for each in shown]
        reason = f", {because}" if because else ""
        partial = [each["name"] for each in shown if isinstance(each["code"], str)]
        if partial:
            self.fail("partial", f"{partial[0]} is evaluated, which is not whole{reason}")
        if sorted(found) == sorted(names) and found != [*names]:
            self.fail("wrong order", f"evaluated are {listed(found)}, in this order{reason}")
        for name in names:
            if name not in found:
                self.fail("not evaluated", f"{name} is not evaluated{reason}")
        for name in found:
            if name not in names:
                self.fail("evaluated", f"{name} is evaluated{reason}")
        if len(found) != len(names):
            self.fail("evaluated", f"evaluated are {listed(found)}{reason}")
        for each in shown:
            if each["code"] != self.codes[each["name"]]:
                self.fail(
                    "wrong weights", f"{each['name']} is evaluated with other weights{reason}"
                )

    def assert_results(self, names: Iterable[str], because: str = "in the end") -> None:
        """Fail unless there is one line of results for each of these, with what belongs to it."""
        expected = sorted((name, as_json(metrics(self.codes[name]))) for name in names)
        found = sorted((str(r.get("checkpoint")), as_json(r["results"])) for r in self.results())
        if [name for name, _ in found] != [name for name, _ in expected]:
            what = f"{listed(n for n, _ in found)}, expected {listed(n for n, _ in expected)}"
            self.fail("wrong results", f"results are of {what}, {because}")
        for (name, values), (_, right) in zip(found, expected):
            if values != right:
                self.fail("wrong results", f"results of {name} are {values}, expected {right}")


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1


def listed(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(names) or "none"


def metrics(code: int) -> dict[str, Any]:
    """What the evaluation of such weights gives."""
    return watcher_program.metrics_of(code)


def as_json(value: Any) -> str:
    """A value in one spelling."""
    return json.dumps(value, sort_keys=True)


# The functions that lines call


@functools.cache
def program() -> Any:
    """All functions, compiled."""
    return compile(inspect.getsource(watcher_program), "<reproduction>", "exec")


@functools.lru_cache(4096)
def compiled(line: str, mode: str) -> Any:
    """A line, compiled."""
    return compile(line, "<reproduction>", mode)


def execute(line: str, namespace: dict[str, Any]) -> Any:
    """Execute a line; what it gives, or what it assigns."""
    (statement,) = ast.parse(line).body
    if isinstance(statement, ast.Expr):
        return eval(compiled(line, "eval"), namespace)
    exec(compiled(line, "exec"), namespace)
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return namespace[target.id] if isinstance(target, ast.Name) else None


@functools.cache
def definitions() -> dict[str, str]:
    """What the program imports, sets and defines, as source text without docstrings, by name."""
    source = inspect.getsource(watcher_program)
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        text = source_without_docstring(node, source)
        if isinstance(node, ast.Import):
            found[node.names[0].name.split(".")[0]] = text
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            before = f"{found[target.id]}\n" if target.id in found else ""  # of x = ..., x |= ...
            found[target.id] = before + text
    return found


def source_without_docstring(node: ast.stmt, source: str) -> str:
    """The source text of a statement; that of a function without what its docstring says."""
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
        said = node.body[0]
        del lines[said.lineno - node.lineno : said.end_lineno - node.lineno + 1]
    return "\n".join(line for line in lines if line)


def introduction(lines: Iterable[str]) -> tuple[str, ...]:
    """Imports, constants and functions that the lines need, in the program's order."""
    wanted: set[str] = {"os"}
    called = [word for line in (*lines, SEEN) for word in names_in(line)]
    while called:
        name = called.pop()
        if name in definitions() and name not in wanted:
            wanted.add(name)
            called += names_in(definitions()[name])
    texts = [text for name, text in definitions().items() if name in wanted]
    texts = ["import tempfile", *texts, "folder = tempfile.TemporaryDirectory()"]
    given = {"import torch", definitions()["directory"]}  # the message imports torch itself
    return tuple("\n".join(text for text in texts if text not in given).splitlines())


@functools.cache
def names_in(source: str) -> tuple[str, ...]:
    """All names that source text has."""
    nodes = ast.walk(ast.parse(source))
    return tuple(node.id for node in nodes if isinstance(node, ast.Name))
