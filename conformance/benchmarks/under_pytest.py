"""The kernel benchmarks under pytest-benchmark: a fixture that times a workload, and where it is kept.

A test gets the fixture ``kernel`` and calls it with a workload; pytest-benchmark times and stores, and
``extra_info`` has the row of :mod:`conformance.benchmarks.rows`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from conformance.benchmarks.machine import timed_device

DEFAULT_STORAGE = "file://./.benchmarks"
"""Of pytest-benchmark: folders in it are by system and Python alone."""

VOLATILE = ("hz_actual", "hz_actual_friendly", "hz_advertised", "hz_advertised_friendly")
"""What pytest-benchmark says of the processor and is another at every look."""

ROUNDS, WARM_UP = 20, 2


def parameters(contracts: tuple[str, ...]) -> list[Any]:
    """Workloads of these contracts as parameters, timed by events where they run on a GPU."""
    from conformance.benchmarks.clock import EventTimer
    from conformance.benchmarks.workload import workloads

    on = timed_device()
    marks = [pytest.mark.benchmark(timer=EventTimer())] if on == "cuda" else []
    return [
        pytest.param(each, id=each.name, marks=[*marks, pytest.mark.benchmark(group=each.name)])
        for each in workloads(on)
        if each.contract in contracts
    ]


@dataclass
class Kernels:
    """What is measured once in a session: the clock, the ceilings, the fingerprint."""

    bench: Any
    fingerprint: dict[str, Any]

    @classmethod
    def begin(cls) -> Kernels:
        """Measure the machine's ceilings."""
        from conformance.benchmarks.ceilings import measure_ceilings
        from conformance.benchmarks.clock import clock_for
        from conformance.benchmarks.fingerprint import fingerprint
        from conformance.benchmarks.measuring import Bench
        from conformance.benchmarks.workload import workloads

        on = timed_device()
        clock = clock_for(on)
        ceilings = measure_ceilings(on, clock, sorted({w.dtype for w in workloads(on)}))
        return cls(Bench(on, clock, ceilings), fingerprint(on))

    def time(self, benchmark: Any, workload: Any, name: str, adapter: object) -> None:
        """Time a workload by ``benchmark``, the anchor beside it in each round; WrongOutput if wrong.

        What the adapter does not offer, or declines, skips the test.
        """
        from conformance.benchmarks.measuring import counted
        from conformance.benchmarks.workload import NotOffered, method_of
        from conformance.harness.failures import Declined

        try:
            method = method_of(adapter, workload)
            with (
                self.bench.opened(workload, method) as running,
                self.bench.anchor(workload, name) as beside,
            ):
                running.check()
                times = self._rounds(benchmark, running, beside)
                running.check()
                if times is not None:
                    metrics = counted(running)
                    benchmark.extra_info.update(self._row(workload, times, beside, metrics))
        except (NotOffered, Declined, NotImplementedError) as reason:
            pytest.skip(str(reason))

    def _rounds(
        self, benchmark: Any, running: Any, beside: Any
    ) -> tuple[list[float], list[float]] | None:
        """Seconds of each round, the anchor's beside them; None where pytest-benchmark is disabled."""
        others: list[float] = []
        turns = itertools.count()
        prepare: Callable[[], None] = getattr(self.bench.clock, "prepare", lambda: None)

        def setup() -> None:
            if beside is not None:
                others.extend(self.bench.round(beside[1], len(others), 1))
            prepare()

        benchmark.pedantic(
            lambda: running.launch(next(turns)),
            setup=setup,
            rounds=ROUNDS,
            warmup_rounds=WARM_UP,
            iterations=1,
        )
        if benchmark.stats is None:
            return None
        own = list(benchmark.stats.stats.data)
        return own, others[-len(own) :]

    def _row(self, workload: Any, times: Any, beside: Any, metrics: dict[str, Any]) -> dict:
        from conformance.benchmarks.rows import timed_row

        own, other = ([[each] for each in part] for part in times)
        return timed_row(
            workload,
            own,
            anchor=(beside[0], other) if beside else None,
            product=self.bench.ceilings.product.get(workload.dtype),
            copy=self.bench.ceilings.copy,
            counters=metrics,
        )


def chosen_adapter(config: pytest.Config) -> tuple[str, object]:
    """The implementation that ``--impl``, CONFORMANCE_IMPL or pyproject.toml names, or the reference.

    One that there is not ends the run with status 4 and a line.
    """
    from conformance.harness.resolve import CannotResolve, resolve
    from conformance.harness.settings import SettingsError, read_settings

    try:
        name = (
            config.getoption("--impl")
            or os.environ.get("CONFORMANCE_IMPL")
            or read_settings(config.rootpath).implementation
            or "reference"
        )
        return name, resolve(name).adapter
    except (CannotResolve, SettingsError) as error:
        pytest.exit(f"conformance: {error}", returncode=4)


def different_machine(now: dict[str, Any], stored: dict[str, Any]) -> str | None:
    """Why times of two machines are not compared, in one line; None where they may be."""
    ours, theirs = (info.get("conformance", {}).get("hard", {}) for info in (now, stored))
    parts = [
        f"{key} {theirs.get(key)!r} and here {ours.get(key)!r}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
    return f"the stored times are of another machine: {'; '.join(parts)}" if parts else None
