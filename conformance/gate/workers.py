"""Starting worker processes and asking them; what they do is in :mod:`conformance.gate.worker`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conformance.gate.sides import GateError, Side

PATIENCE = 300.0
"""Seconds that an answer may take: first calls compile."""

# The suite is the one that runs the gate, whatever the side's folders hold; all else is the side's.
BOOTSTRAP = """\
import sys
sys.path.insert(0, {suite!r})
import conformance.gate.worker as worker
sys.path.remove({suite!r})
sys.path.append({suite!r})
worker.main()
"""


class WorkerLost(GateError):
    """A worker that died or hung."""


class Refusal(Exception):
    """What a worker says that it cannot do."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind, self.why = kind, why


class WorkerProcess:
    """A worker that runs, or is starting."""

    def __init__(self, side: Side, device: str, threads: int | None) -> None:
        suite = str(Path(__file__).resolve().parents[2])
        paths = [*map(str, side.import_from), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.side = side
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed by end)
        self.process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP.format(suite=suite)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=side.folder,
            env=environment,
        )
        self.rest = b""
        self._send(
            {"implementation": side.implementation, "device": device, "threads": threads},
        )

    def wait_until_ready(self) -> None:
        """Wait for the adapter's import; :class:`GateError` where it cannot be imported."""
        with self._refusals_ending_the_gate():
            self._receive()

    def told(self, name: str, **arguments: Any) -> Any:
        """The answer to what has nothing to do with a benchmark; :class:`GateError` where refused."""
        with self._refusals_ending_the_gate():
            return self.ask(name, **arguments)

    @contextmanager
    def _refusals_ending_the_gate(self) -> Iterator[None]:
        try:
            yield
        except Refusal as refusal:
            raise GateError(f"{self.side.label}: {refusal.why}") from None

    def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to a request; :class:`Refusal` or :class:`WorkerLost`."""
        self.request(name, **arguments)
        return self.answer()

    def request(self, name: str, **arguments: Any) -> None:
        """Ask without waiting, so that others can be asked meanwhile."""
        self._send({"do": name, **arguments})

    def answer(self) -> Any:
        """The answer to the oldest request that has none yet."""
        return self._receive()

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._lost("died")

    def _receive(self) -> Any:
        answer = json.loads(self._line())
        if "refused" in answer:
            raise Refusal(answer["refused"], answer["why"])
        return answer["answer"]

    def _line(self) -> bytes:
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
            if not ready:
                self._lost(f"did not answer within {PATIENCE:g} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                self._lost("died")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _lost(self, how: str) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        last = f": {said[-1].strip()[:300]}" if said else ""
        raise WorkerLost(f"the worker of {self.side.label} {how}{last}") from None
