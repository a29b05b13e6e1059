"""The process that reports: it takes plan and records, writes the report, and decides the verdict."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conformance.harness import gpu_isolation, records, torchrun, verdict
from conformance.harness.numerics import NumericsError
from conformance.harness.numerics_run import ATTRIBUTE, NumericsRun, asks_for_numerics
from conformance.harness.records import PROPERTY, REPORTED_PHASES
from conformance.reports.stream import ReportWriter
from conformance.reports.terminal import terminal_lines


class Controller:
    """Receives plan and records, writes the report, and decides the exit status."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.plan: dict[str, Any] | None = None
        self.records: dict[str, dict[str, Any]] = {}
        self.failed_ids: set[str] = set()
        self.other_failures = 0
        self.verdict: verdict.Verdict | None = None
        self.plan_folder: tempfile.TemporaryDirectory | None = None
        self.writer: ReportWriter | None = None
        self.not_written: str | None = None
        """Why the report could not be written any further."""
        folder = config.getoption("conformance_report")
        if folder and torchrun.reports():
            try:
                self.writer = ReportWriter(Path(folder))
            except OSError as error:
                why = error.strerror or error
                raise pytest.UsageError(
                    f"conformance: --conformance-report: cannot write to {folder}: {why}"
                ) from None
        self.numerics: NumericsRun | None = None
        if asks_for_numerics(config):
            names = ("numerics_record", "numerics_check", "numerics_factor")
            with numerics_errors_named():
                record, check, factor = map(config.getoption, names)
                record = record if torchrun.reports() else None
                self.numerics = NumericsRun(record, check, factor)

    def folder_for_plans(self) -> str:
        """A folder in which xdist's workers leave their plans."""
        if self.plan_folder is None:
            self.plan_folder = tempfile.TemporaryDirectory(prefix="conformance-plan-")
        return self.plan_folder.name

    def accept(self, plan: dict[str, Any] | None) -> None:
        """Take the plan of the run; the first one counts, for every worker makes the same."""
        if plan is None or self.plan is not None:
            return
        if "stop" in plan:
            if plan["exit_code"] == verdict.USAGE:
                raise pytest.UsageError(plan["stop"])
            pytest.exit(plan["stop"], returncode=plan["exit_code"])
        if self.numerics:
            with numerics_errors_named():
                self.numerics.begin(plan["numerics"], plan["header"]["planned"])
        self.plan = plan
        self._write(lambda writer: writer.append(plan["header"]))

    def read_plans(self) -> None:
        """Take the plan that a worker of xdist left."""
        if self.plan_folder is None or self.plan is not None:
            return
        for file in sorted(Path(self.plan_folder.name).glob("*.json")):
            self.accept(json.loads(file.read_text("utf-8")))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a report of pytest says of a requirement."""
        result = report
        items = self.plan["items"] if self.plan else {}
        planned = items.get(result.nodeid)
        if planned is None:
            self.other_failures += result.failed
            return
        carried = [text for name, text in result.user_properties if name == PROPERTY]
        if carried:
            record = json.loads(carried[-1])
        elif result.when not in (*REPORTED_PHASES, "teardown"):  # xdist: the worker is gone
            record = records.died(planned, getattr(result, "conformance_stacks", ""))
        else:
            self.other_failures += result.failed and result.when == "teardown"
            return
        if record["id"] in self.records:  # repeating a requirement does not make it pass
            return
        self.records[record["id"]] = record
        if self.numerics:
            self.numerics.take(record["id"], getattr(result, ATTRIBUTE, None))
        self._write(lambda writer: writer.append(record))

    def worker_died(self, nodeid: str, result: pytest.TestReport) -> None:
        """A worker of xdist is gone that ran this item, whose report may have come before."""
        planned = (self.plan or {"items": {}})["items"].get(nodeid)
        if planned is None:
            return
        folder = Path(self.folder_for_plans())
        if planned["device"] == "cuda":
            gpu_isolation.note_lost(folder, planned)
        if planned["id"] in self.records:  # it ended itself, after it had told how the item ended
            result.outcome, result.when, result.longrepr = "passed", "teardown", None
            return
        file = gpu_isolation.stack_file(folder, result.node.gateway.id)
        result.conformance_stacks = file.read_text("utf-8") if file.is_file() else ""
        if result.conformance_stacks:
            result.longrepr = f"{result.longrepr}\n\n{result.conformance_stacks}"

    def finish(self, exitstatus: int) -> int:
        """Decide the verdict, end the report, and give the exit status of the run."""
        if self.plan_folder is not None:
            self.plan_folder.cleanup()
        if self.plan is None:
            return exitstatus
        head = self.plan["header"]
        plan = verdict.Plan(
            planned=tuple(self.plan["items"].values()),
            suite=head["suite"],
            required=tuple(head["required"]),
            smoke=head["smoke"],
        )
        self.verdict = verdict.judge(plan, self.records.values())
        ended = combined_exit_status(
            int(exitstatus), self.verdict, self.records.values(), self.other_failures
        )
        if self.numerics:
            ended = self.numerics.finish(ended)
        ended_with = (head, self.records.values(), self.verdict, self.numerics)
        self._write(lambda writer: writer.finish(*ended_with))
        return ended or (verdict.USAGE if self.not_written else ended)

    def _write(self, write: Callable[[ReportWriter], None]) -> None:
        """Write to the report, if one is asked for, until that fails for the first time."""
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:
            self.not_written = f"{self.writer.folder}: {error.strerror or error}"
            self.writer = None

    def lines(self) -> Iterable[tuple[str, str]]:
        """What the terminal shows at the end."""
        lines = terminal_lines(list(self.records.values()), self.verdict)
        if self.not_written:
            lines.append(("red", f"report  not written to {self.not_written}"))
        return [*lines, *(self.numerics.lines if self.numerics else ())]

    @property
    def title(self) -> str:
        """Heading of what the terminal shows."""
        return f"conformance: {self.plan['header']['implementation']['name']}"


@contextlib.contextmanager
def numerics_errors_named():
    """A file of numerics that cannot be used ends the run as a mistake in its options does."""
    try:
        yield
    except NumericsError as error:
        raise pytest.UsageError(f"conformance: {error}") from None


def combined_exit_status(
    exitstatus: int,
    decided: verdict.Verdict,
    ended: Iterable[Mapping[str, Any]],
    other_failures: int,
) -> int:
    """The exit status of a pytest run, given that of pytest itself. It is never made better."""
    ours = decided.exit_code
    if exitstatus in (0, 5):  # 5: everything was deselected
        return ours if exitstatus == 0 or ours else exitstatus
    red = any(record["outcome"] in records.RED for record in ended)
    if exitstatus == 1 and red and not other_failures and ours:
        return ours
    return exitstatus
