"""One side of the gate: a process that holds an adapter and times it when it is asked to.

It is asked by lines of JSON on its standard input, ``{"do": NAME, ...}``, and answers each with one
line: ``{"answer": ...}``, or ``{"refused": KIND, "why": LINE}``. Only one side is asked at a time, and
an answer comes when the device is idle again, so a side never runs while another is timed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LONGEST_LINE = 300
"""Characters of an exception's message that are passed on."""

WARM_UP = 3
"""Launches before anything is timed: the first ones compile, allocate and choose kernels."""

UNCOUNTED = 2
"""Launches at the beginning of each round that do not count."""

# Kinds of refusals
NOT_OFFERED, DECLINED, WRONG, RAISED = "not offered", "declined", "wrong output", "raised"


class Refused(Exception):
    """A request that cannot be met, by kind."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind, self.why = kind, why


class Worker:
    """An adapter, the benchmark that is open, and what can be asked of them."""

    def __init__(self, implementation: str, device: str, threads: int | None) -> None:
        import torch

        from conformance.benchmarks.clock import clock_for
        from conformance.gate.sm_clock import sm_clock_reader
        from conformance.harness.resolve import resolve

        if threads:
            torch.set_num_threads(threads)
        self.device, self.clock = device, clock_for(device)
        self.sm_clock = sm_clock_reader(device)
        self.resolved = resolve(implementation)
        self.running: Any = None

    def open(self, benchmark: str, seed: int) -> None:
        """Prepare a benchmark: inputs, a check of outputs, warm-up. The one before is closed."""
        from conformance.benchmarks.running import Running
        from conformance.benchmarks.workload import NotOffered, method_of, workloads

        self.close()
        [workload] = workloads(self.device, only=[benchmark])
        try:
            method = method_of(self.resolved.adapter, workload)
        except NotOffered as error:
            raise Refused(NOT_OFFERED, line_of(error)) from None
        self.running = Running(workload, method, self.device, seed=seed)
        self.running.check()
        self.clock.seconds([self._launch(turn) for turn in range(WARM_UP)])

    def close(self) -> None:
        """Let go of the benchmark's memory."""
        if self.running is not None:
            self.running.close()
        self.running = None

    def time(self, turn: int, launches: int, delay: float) -> dict[str, Any]:
        """``seconds`` of each launch, on the inputs from ``turn`` on, each with a delay in seconds.

        ``sm_clock`` is that of the GPU just after, in MHz, or None.
        """
        asked = [self._launch(turn + number) for number in range(launches)]
        # Another process was timed just before, and its data are in the caches.
        seconds = self.clock.seconds([*asked[-UNCOUNTED:], *asked], delay=delay)[-launches:]
        return {"seconds": seconds, "sm_clock": self.sm_clock()}

    def check(self) -> None:
        """Check outputs again, after timing."""
        self.running.check()

    def counters(self) -> dict[str, int | str]:
        """The deterministic metrics of a call."""
        from conformance.benchmarks.counters import counters

        return counters(self.running)

    def anchors(self) -> dict[str, float]:
        """What the machine itself does now: operations and bytes in a second."""
        from conformance.benchmarks.ceilings import measure_ceilings

        dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        found = measure_ceilings(self.device, self.clock, [dtype])
        return {"product": found.product[dtype], "copy": found.copy}

    def fingerprint(self) -> dict[str, Any]:
        """Which machine this is."""
        from conformance.benchmarks.fingerprint import fingerprint

        return fingerprint(self.device)

    def origin(self, under: str | None) -> dict[str, Any]:
        """Where the adapter is from, and one module that was imported from below a folder."""
        files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        found = [file for file in files if file and under and Path(file).is_relative_to(under)]
        return {
            "file": self.resolved.file,
            "version": self.resolved.version,
            "below": min(found, default=None),
        }

    def _launch(self, turn: int) -> Callable[[], object]:
        return lambda: self.running.launch(turn)


REQUESTS = ("open", "close", "time", "check", "counters", "anchors", "fingerprint", "origin")


def answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    from conformance.benchmarks.workload import WrongOutput
    from conformance.harness.failures import Declined

    name = request.pop("do")
    if name not in REQUESTS:
        return {"refused": RAISED, "why": f"{name!r} cannot be asked for"}
    try:
        return {"answer": getattr(worker, name)(**request)}
    except Refused as refused:
        return {"refused": refused.kind, "why": refused.why}
    except WrongOutput as error:
        return {"refused": WRONG, "why": line_of(error)}
    except (NotImplementedError, Declined) as error:
        return {"refused": DECLINED, "why": line_of(error)}
    except Exception as error:
        return {"refused": RAISED, "why": f"{type(error).__name__}: {line_of(error)}"}


def line_of(error: BaseException) -> str:
    """The first line of an exception's message, of bounded length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST_LINE]


def private_stdout() -> IO[str]:
    """The standard output for answers alone: what an adapter prints goes to standard error."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def main() -> None:
    """Make the worker that the first line describes, and answer until the input ends."""
    answers = private_stdout()

    def say(message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")

    try:
        worker = Worker(**json.loads(sys.stdin.readline()))
    except Exception as error:
        say({"refused": RAISED, "why": line_of(error)})
        return
    say({"answer": None})
    for line in sys.stdin:
        say(answer(worker, json.loads(line)))


if __name__ == "__main__":
    main()
