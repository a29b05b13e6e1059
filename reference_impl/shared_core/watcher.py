"""Evaluating the checkpoints of a training run while it writes them, each once.

What LawrenceRLiu/MoE_Factorize_Compress does in ``src/async_eval.py``, with what went wrong there put
right: order is that of the steps, a checkpoint that is half written is left for later, one that failed
is not done, and every result says of which weights it is.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reference_impl.shared_core.complete import CheckpointFolder
from reference_impl.shared_core.results import ResultsFile

NAME = re.compile(r"checkpoint-([0-9]+)")

Evaluate = Callable[[str], Mapping[str, Any]]
Report = Callable[[Mapping[str, Any]], None]


@dataclass
class History:
    """What the file of results says, by name and digest of checkpoints."""

    done: set[tuple[str, str]] = field(default_factory=set)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a line into account."""
        key = (str(record.get("checkpoint")), str(record.get("digest")))
        if "results" in record:
            self.done.add(key)
        elif "error" in record:
            self.failures[key] += 1


class PollingWatcher:
    """See :class:`conformance.contracts.Watcher`."""

    folder_type = CheckpointFolder
    results_type = ResultsFile

    def __init__(
        self,
        directory: str | Path,
        evaluate: Evaluate,
        *,
        results: str | Path,
        attempts: int = 3,
        report: Report | None = None,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}, expected at least 1")
        self.directory = Path(directory)
        self.evaluate = evaluate
        self.results = self.results_type(results)
        self.attempts = attempts
        self.report = report
        self._digests: dict[str, tuple[tuple[Any, ...], str]] = {}
        self.history()  # a file that cannot be read is told of at once

    def poll(self) -> list[str]:
        """Evaluate what is due; the names of the checkpoints that were evaluated."""
        if not self.checkpoints():
            return []
        with self.results.locked():
            history = self.history()
            return [folder.name for folder in self.checkpoints() if self.attempt(folder, history)]

    def checkpoints(self) -> list[CheckpointFolder]:
        """The folders that have the name of a checkpoint, in the order of the steps."""
        try:
            paths = [path for path in self.directory.iterdir() if self.is_checkpoint(path)]
        except FileNotFoundError:
            return []
        return self.ordered([self.folder_type(path, self.step_of(path)) for path in paths])

    def is_checkpoint(self, path: Path) -> bool:
        """Whether a path is a folder with such a name."""
        return NAME.fullmatch(path.name) is not None and path.is_dir()

    def step_of(self, path: Path) -> int:
        """The number in the name."""
        return int(path.name.removeprefix("checkpoint-"))

    def ordered(self, folders: list[CheckpointFolder]) -> list[CheckpointFolder]:
        """By number."""
        return sorted(folders, key=lambda folder: folder.step)

    def history(self) -> History:
        """What was evaluated and what failed, by whatever watcher."""
        found = History()
        for record in self.results.read():
            found.add(record)
        return found

    def attempt(self, folder: CheckpointFolder, history: History) -> bool:
        """Evaluate a checkpoint if it is whole and due; whether that gave results."""
        digest = self.digest_of(folder)
        if digest is None or not self.is_due((folder.name, digest), history):
            return False
        record = {"checkpoint": folder.name, "step": folder.step, "digest": digest}
        try:
            record["results"] = self.metrics_of(folder)
        except Exception as error:
            if not folder.path.is_dir():
                return False
            record["error"] = self.told(error)
        self.record(record)
        return "results" in record

    def digest_of(self, folder: CheckpointFolder) -> str | None:
        """The digest of the weights; None if they are not there whole.

        Weights are read again only when a file was changed: they are large, and polls are frequent.
        """
        try:
            files = folder.weight_files()
            if files is None:
                return None
            identity = folder.identity(files)
            known, digest = self._digests.get(folder.name, (None, ""))
            if known != identity:
                digest = folder.digest(files)
                self._digests[folder.name] = (identity, digest)
            return digest
        except OSError:  # gone meanwhile
            return None

    def is_due(self, key: tuple[str, str], history: History) -> bool:
        """Whether a checkpoint has no results and attempts are left."""
        return key not in history.done and history.failures[key] < self.attempts

    def metrics_of(self, folder: CheckpointFolder) -> dict[str, Any]:
        """What ``evaluate`` gives, as JSON has it; an exception if JSON has not."""
        found = self.evaluate(str(folder.path))
        return json.loads(json.dumps(dict(found), default=as_number))

    def told(self, error: Exception) -> str:
        """An exception in one line of text."""
        return f"{type(error).__name__}: {error}"

    def record(self, record: Mapping[str, Any]) -> None:
        """Add a line to the file of results."""
        self.results.append(record)
        if self.report is not None:
            self.report(record)


def as_number(value: Any) -> Any:
    """The number that a tensor or an array without axes holds."""
    if callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is not a number")


class CheckpointWatcher:
    """The contract ``checkpoint_watcher``."""

    watcher_type = PollingWatcher

    def checkpoint_watcher(
        self, directory: str, evaluate: Evaluate, *, results: str, attempts: int = 3
    ) -> PollingWatcher:
        """See :class:`conformance.contracts.CheckpointWatcher`."""
        return self.watcher_type(directory, evaluate, results=results, attempts=attempts)


def watch(
    directory: str | Path,
    evaluate: Evaluate,
    results: str | Path,
    *,
    attempts: int = 3,
    interval: float = 60.0,
    once: bool = False,
) -> bool:
    """Evaluate checkpoints as they come, with a line on stdout for each, until Ctrl-C.

    ``interval`` is the number of seconds between two polls; with ``once`` there is one poll. Gives
    whether no evaluation failed. :class:`CheckpointError` for a file of results that is damaged,
    ``ValueError`` for ``attempts`` below 1.
    """
    failed: list[str] = []

    def report(record: Mapping[str, Any]) -> None:
        if "error" in record:
            failed.append(record["checkpoint"])
        print(shown(record), flush=True)

    watcher = PollingWatcher(directory, evaluate, results=results, attempts=attempts, report=report)
    try:
        watcher.poll()
        while not once:
            time.sleep(interval)
            watcher.poll()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return not failed


def shown(record: Mapping[str, Any]) -> str:
    """A line of the file of results for people."""
    if "error" in record:
        first = record["error"].split("\n")[0]
        return f"{record['checkpoint']}  failed: {first}"
    return f"{record['checkpoint']}  " + "  ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in flattened(record["results"]).items()
    )


def flattened(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Nested metrics by names with a slash between."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": each for inner, each in flattened(value).items()}
        else:
            found[name] = value
    return found
