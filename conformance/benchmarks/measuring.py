"""Rows of an implementation: each workload checked, timed in rounds beside its anchor, and counted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from conformance.benchmarks.ceilings import Ceilings
from conformance.benchmarks.clock import Clock
from conformance.benchmarks.counters import counters
from conformance.benchmarks.rows import (
    DECLINED,
    FAILED,
    OUT_OF_MEMORY,
    OVER_BUDGET,
    WRONG,
    Row,
    timed_row,
    untimed_row,
)
from conformance.benchmarks.running import Running
from conformance.benchmarks.workload import NotOffered, Workload, WrongOutput, method_of
from conformance.harness.failures import Declined
from conformance.harness.resolve import CannotResolve, resolve

WARM_UP = 2
"""Launches after the check and before anything counts: caches and clocks settle."""

FEWEST_ROUNDS = 3
"""However slow an implementation is."""

LONGEST = 2.0
"""Seconds that all launches of one side of a row should take together."""

ANCHORS = {
    ("attention", "cuda"): ("torch-sdpa-cudnn", "torch-sdpa"),
    ("attention", "cpu"): ("torch-sdpa",),
    ("experts", "cuda"): ("torch-experts-grouped",),
    ("experts", "cpu"): ("torch-experts-grouped",),
}
"""What each contract is compared with: the first that runs.

Compressed experts are compared with dense ones of the same layer.
"""


class DeviceLost(RuntimeError):
    """The device answers no more: a kernel corrupted its context."""


@dataclass
class Bench:
    """A device, its clock and ceilings, and how long to measure."""

    device: str
    clock: Clock
    ceilings: Ceilings
    rounds: int = 10
    launches: int = 5
    """Of a side in a round."""
    seed: int = 0
    deadline: float = float("inf")
    """When no further row is begun, by ``time.monotonic``."""
    _checked: set[str] = field(default_factory=set)

    def row(self, workload: Workload, implementation: str, adapter: object) -> Row | None:
        """The row of one workload; None where the adapter does not offer its contract.

        Whatever the implementation does wrong becomes a row that says so. DeviceLost if the device
        is of no more use.
        """
        try:
            method = method_of(adapter, workload)
        except NotOffered:
            return None
        if time.monotonic() > self.deadline:
            return untimed_row(workload, OVER_BUDGET, "the time for this run was up")
        try:
            return self._timed(workload, implementation, method)
        except (Declined, NotImplementedError) as error:
            return untimed_row(workload, DECLINED, str(error) or "NotImplementedError")
        except WrongOutput as error:
            return untimed_row(workload, WRONG, str(error))
        except Exception as error:
            status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            row = untimed_row(workload, status, f"{type(error).__name__}: {error}")
        release(self.device)
        return row

    def _timed(self, workload: Workload, implementation: str, method: Callable) -> Row:
        with (
            self.opened(workload, method) as running,
            self.anchor(workload, implementation) as beside,
        ):
            running.check()
            number, launches = self.pace(running)
            own: list[list[float]] = []
            other: list[list[float]] = []
            exposed = 0
            for turn in range(number):
                sides = [(running, own)] + ([(beside[1], other)] if beside else [])
                for side, times in sides if turn % 2 == 0 else reversed(sides):
                    times.append(self.round(side, turn * launches, launches))
                    exposed += getattr(self.clock, "exposed", 0) if side is running else 0
            running.check()
            metrics = counted(running)
        return timed_row(
            workload,
            own,
            anchor=(beside[0], other) if beside else None,
            product=self.ceilings.product.get(workload.dtype),
            copy=self.ceilings.copy,
            counters=metrics,
            exposed=exposed,
        )

    def round(self, running: Running, turn: int, launches: int) -> list[float]:
        """Seconds of so many launches, on the ring's inputs from ``turn`` on."""
        calls = [lambda at=turn + number: running.launch(at) for number in range(launches)]
        return self.clock.seconds(calls)

    def pace(self, running: Running) -> tuple[int, int]:
        """Rounds, and launches a round: fewer where a launch is slow."""
        slow = min(self.round(running, 0, WARM_UP))
        return paced(slow, self.rounds, self.launches)

    @contextmanager
    def opened(self, workload: Workload, method: Callable) -> Iterator[Running]:
        """The workload on a method; its memory is given back at the end."""
        running = Running(workload, method, self.device, seed=self.seed)
        try:
            yield running
        finally:
            running.close()

    @contextmanager
    def anchor(
        self, workload: Workload, implementation: str
    ) -> Iterator[tuple[str, Running] | None]:
        """Name and running workload of what this one is compared with; None if it is that itself.

        None also where the anchor does not run on this device, or not this workload.
        """
        beside = getattr(workload, "dense", workload)
        running = None
        for name in ANCHORS[beside.contract, self.device.partition(":")[0]]:
            running = None if name == implementation else self._anchor(beside, name)
            if running is not None or name == implementation:
                break
        try:
            yield None if running is None else (name, running)
        finally:
            if running is not None:
                running.close()

    def _anchor(self, workload: Workload, name: str) -> Running | None:
        """The anchor, its output checked the first time; a wrong anchor is none."""
        try:
            method = method_of(resolve(name).adapter, workload)
            running = Running(workload, method, self.device, seed=self.seed)
            if workload.name not in self._checked:
                running.check()
                self._checked.add(workload.name)
            self.round(running, 0, WARM_UP)
        except (CannotResolve, NotOffered, Declined, NotImplementedError, WrongOutput):
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        return running


def counted(running: Running) -> dict[str, int | str]:
    """The counters; or ``uncounted`` and why: such a call was timed all the same."""
    try:
        return counters(running)
    except Exception as error:
        return {"uncounted": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def paced(seconds: float, rounds: int, launches: int) -> tuple[int, int]:
    """Rounds and launches a round so that a side takes about ``LONGEST`` seconds at most."""
    affordable = max(1, int(LONGEST / max(seconds, 1e-9)))
    if affordable >= rounds * launches:
        return rounds, launches
    if affordable >= rounds:
        return rounds, affordable // rounds
    return min(rounds, max(FEWEST_ROUNDS, affordable)), 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was too small, of the device or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in said)


def release(device: str) -> None:
    """Give memory back after a failure; DeviceLost if the device does not answer."""
    gc.collect()
    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from None
