"""Measuring with processes: fresh ones for every pair, driven by turns on one device.

A pair is four processes: the base, the head, a second copy of the base (the control), and a third that
is timed with a delay of known size (the slowed control). A round times the four one after the other;
over the rounds every one comes in every place, and before and after every other. No process is timed
twice in a round: one that was asked just before finds its caches warm, and is up to a third faster
than the others on launches of a millisecond.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.gate.samples import Samples, Stage
from conformance.gate.sides import GateError, Side
from conformance.gate.worker import RAISED
from conformance.gate.workers import Refusal, WorkerLost, WorkerProcess

BASE, HEAD, CONTROL, SLOWED = "base", "head", "control", "slowed"
ORDERS = (
    (BASE, HEAD, SLOWED, CONTROL),
    (HEAD, CONTROL, BASE, SLOWED),
    (CONTROL, SLOWED, HEAD, BASE),
    (SLOWED, BASE, CONTROL, HEAD),
)
"""A Williams square: each in every place once, and right after every other once."""

SHORTEST_ROUND = 2e-3
"""Seconds that the launches of one side in a round last at least: clocks have steps."""
FEWEST_LAUNCHES = 5
"""Launches of one side in a round at least; their median counts."""
TOO_SHORT = {"cuda": 20e-6}
"""Seconds below which a launch is not gated: what is timed is the launching."""
STALLED = 3.0
"""A launch of that many times the median of its round is counted as a stall."""

COMPARED = (HEAD, CONTROL, SLOWED)
"""What is held against the base."""
LOST, TOO_SHORT_KIND = "process died or hung", "too short"
"""Kinds of refusals, beside those of :mod:`conformance.gate.worker`."""

StartWorker = Callable[[Side, str, int | None], WorkerProcess]
Times = dict[str, list[float]]
"""Seconds of the launches of a round, by side."""
Ratios = dict[str, list[float]]
"""Logarithms of ratios to the base in each round of a pair, by side."""


@dataclass(frozen=True)
class Plan:
    """What is timed, and how often; the same for all sides."""

    benchmark: str
    launches: int
    seconds: float
    """Of a launch of the base, when this was planned."""


@dataclass
class Found:
    """What was found of one benchmark beside its samples."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Medians of rounds, by side."""
    base_first: list[float] = field(default_factory=list)
    """Logarithms of ratios of head to base in rounds in which the base came first."""
    head_first: list[float] = field(default_factory=list)
    stalls: dict[str, int] = field(default_factory=lambda: dict.fromkeys((BASE, HEAD), 0))
    counters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Deterministic metrics, by side."""
    cycles: list[list[float]] = field(default_factory=list)
    """Logarithms of ratios of cycles to those of the base, by pair and round, where they are read."""

    @property
    def order_effect(self) -> float | None:
        """How much longer the head takes, as a logarithm, where it comes second."""
        if not (self.base_first and self.head_first):
            return None
        return statistics.fmean(self.base_first) - statistics.fmean(self.head_first)


class Unusable(Exception):
    """A benchmark that cannot be compared: which side refused, its kind of refusal, and why."""

    def __init__(self, side: str, kind: str, why: str) -> None:
        super().__init__(f"{side}: {kind}: {why}")
        self.side, self.kind, self.why = side, kind, why


class ProcessPairs:
    """The :class:`~conformance.gate.samples.Measure` of real processes."""

    def __init__(
        self,
        base: Side,
        head: Side,
        *,
        device: str,
        threads: int | None,
        injected: Mapping[str, float],
        slow_head: float = 0.0,
        progress: Callable[[str], None] = lambda line: None,
        start: StartWorker = WorkerProcess,
    ) -> None:
        """``injected`` is the share by which the slowed control of a benchmark is slower.

        ``start`` starts a worker of a side on a device with so many threads.
        """
        self.sides = {BASE: base, HEAD: head, CONTROL: base, SLOWED: base}
        self.device, self.threads = device, threads
        self.injected, self.slow_head = injected, slow_head
        self.progress, self.start = progress, start
        self.plans: dict[str, Plan] = {}
        self.found: dict[str, Found] = defaultdict(Found)
        self.unusable: dict[str, Unusable] = {}
        self.origins: dict[str, dict[str, Any]] = {}
        self.machine: dict[str, Any] = {}
        self.anchors: list[dict[str, float]] = []
        """What the machine itself did at the beginning, and at the end of each stage."""
        self.pairs = 0
        """Process pairs so far: they give seeds and orders."""

    def prepare(self, benchmarks: Sequence[str]) -> list[str]:
        """Plan the benchmarks, count their deterministic metrics, and give those that can be timed.

        What the others were refused for is in ``unusable``, and where the sides were imported from in
        ``origins``. Raises :class:`GateError` where that is not their revision.
        """
        with self._quartet(base_first=True) as quartet:
            self._check_origins(quartet.workers)
            self.machine = quartet.workers[BASE].told("fingerprint")
            for number, benchmark in enumerate(benchmarks, 1):
                self.progress(f"preparing {number} of {len(benchmarks)}: {benchmark}")
                with self._refusals_kept(benchmark, quartet):
                    self._prepare(benchmark, quartet.workers)
            # Here and after a stage, when nothing more is timed in the process that is asked.
            self.anchors.append(quartet.workers[BASE].told("anchors"))
        return [benchmark for benchmark in benchmarks if benchmark in self.plans]

    def _prepare(self, benchmark: str, workers: Mapping[str, WorkerProcess]) -> None:
        with opened(workers, benchmark, seed=0):
            self.found[benchmark].counters = asked_all(workers, "counters")
            base = workers[BASE]
            timed = asked(BASE, base, "time", turn=0, launches=FEWEST_LAUNCHES, delay=0.0)
        seconds = statistics.median(timed["seconds"])
        if seconds < TOO_SHORT.get(self.device, 0.0):
            why = f"a launch takes {seconds * 1e6:.1f} µs, and is not told from launching it"
            raise Unusable(BASE, TOO_SHORT_KIND, why)
        self.plans[benchmark] = Plan(
            benchmark,
            max(FEWEST_LAUNCHES, math.ceil(SHORTEST_ROUND / seconds)),
            seconds,
        )

    def __call__(
        self, benchmarks: Sequence[str], *, pairs: int, rounds: int, stage: Stage
    ) -> dict[str, Samples]:
        """See :class:`~conformance.gate.samples.Measure`; benchmarks are those of ``prepare``.

        One that a side refuses on the way is left out of what this gives.
        """
        measured: dict[str, list[Ratios]] = {benchmark: [] for benchmark in benchmarks}
        for pair in range(pairs):
            self.pairs += 1
            # The side that comes first in a pair alternates, and the confirmation begins with the
            # other one.
            base_first = (pair % 2 == 0) == (stage == "screen")
            with self._quartet(base_first=base_first) as quartet:
                for number, benchmark in enumerate(benchmarks, 1):
                    if benchmark in self.unusable:
                        continue
                    self.progress(
                        f"{stage}: pair {pair + 1} of {pairs}, benchmark {number} of "
                        f"{len(benchmarks)}: {benchmark}"
                    )
                    with self._refusals_kept(benchmark, quartet):
                        ratios = self._pair(benchmark, quartet.workers, rounds, base_first)
                        measured[benchmark].append(ratios)
                if pair == pairs - 1:
                    self.anchors.append(quartet.workers[BASE].told("anchors"))
        return {
            benchmark: Samples(**{s: np.array([r[s] for r in ratios]) for s in COMPARED})
            for benchmark, ratios in measured.items()
            if benchmark not in self.unusable
        }

    @contextmanager
    def _refusals_kept(self, benchmark: str, quartet: Quartet) -> Iterator[None]:
        """Note why a benchmark cannot be compared, and go on with processes that can be trusted.

        One that is lost needs another in its place, and so does one in which something raised: a
        kernel that wrote out of bounds leaves a CUDA context in which every later call raises.
        """
        try:
            yield
        except Unusable as refused:
            self.unusable[benchmark] = refused
            if refused.kind in (LOST, RAISED):
                quartet.start_again()

    def _pair(
        self,
        benchmark: str,
        workers: Mapping[str, WorkerProcess],
        rounds: int,
        base_first: bool,
    ) -> Ratios:
        """Time every round of a benchmark, and check the outputs at the end."""
        ratios: Ratios = {side: [] for side in COMPARED}
        plan = self.plans[benchmark]
        cycles: list[float] = []
        with opened(workers, benchmark, seed=self.pairs):
            # A round that does not count: all are warm then, and it tells how long the delays are.
            warm = {
                side: asked(side, worker, "time", turn=0, launches=plan.launches, delay=0.0)
                for side, worker in workers.items()
            }
            usual = statistics.median(warm[BASE]["seconds"])
            for number in range(rounds):
                order = ORDERS[(self.pairs + number) % len(ORDERS)]
                order = order if base_first else order[::-1]
                timed = self._round(plan, workers, order, number, usual)
                times = {side: each["seconds"] for side, each in timed.items()}
                self._keep(benchmark, times, order)
                base = usual = statistics.median(times[BASE])
                for side, logarithms in ratios.items():
                    logarithms.append(math.log(statistics.median(times[side]) / base))
                clocks = [timed[side]["sm_clock"] for side in (HEAD, BASE)]
                if all(clocks):
                    cycles.append(ratios[HEAD][-1] + math.log(clocks[0] / clocks[1]))
            asked_all(workers, "check")
        if len(cycles) == rounds:
            self.found[benchmark].cycles.append(cycles)
        return ratios

    def _round(
        self,
        plan: Plan,
        workers: Mapping[str, WorkerProcess],
        order: Sequence[str],
        number: int,
        usual: float,
    ) -> dict[str, dict[str, Any]]:
        """Time each of the four once, on the same inputs.

        Delays are shares of ``usual``, the seconds that a launch of the base took last: on a machine
        that became slower, what was a delay of 8 % at the beginning would be less.
        """
        delays = {SLOWED: self.injected[plan.benchmark] * usual, HEAD: self.slow_head * usual}
        turn = number * plan.launches
        return {
            side: asked(
                side,
                workers[side],
                "time",
                turn=turn,
                launches=plan.launches,
                delay=delays.get(side, 0.0),
            )
            for side in order
        }

    def _keep(self, benchmark: str, times: Times, order: Sequence[str]) -> None:
        """Keep what is told beside the verdict."""
        found = self.found[benchmark]
        medians = {side: statistics.median(seconds) for side, seconds in times.items()}
        for side, median in medians.items():
            found.seconds[side].append(median)
        for side in (BASE, HEAD):
            found.stalls[side] += sum(s > STALLED * medians[side] for s in times[side])
        first = order.index(BASE) < order.index(HEAD)
        logarithm = math.log(medians[HEAD] / medians[BASE])
        (found.base_first if first else found.head_first).append(logarithm)

    @contextmanager
    def _quartet(self, *, base_first: bool) -> Iterator[Quartet]:
        begin = lambda name: self.start(self.sides[name], self.device, self.threads)
        quartet = Quartet(begin, base_first)
        try:
            quartet.start()
            yield quartet
        finally:
            quartet.end()

    def _check_origins(self, workers: Mapping[str, WorkerProcess]) -> None:
        """Note where base and head were imported from; GateError where not from their revision."""
        for name in (BASE, HEAD):
            side = self.sides[name]
            under = str(side.checked_out) if side.checked_out else None
            origin = self.origins[name] = workers[name].told("origin", under=under)
            if under and origin["below"] is None:
                raise GateError(
                    f"{side.label}: {side.implementation} imports nothing from the revision "
                    f"(it is {origin['file']}): the same code would be timed twice"
                )


class Quartet:
    """Four fresh workers, by side."""

    def __init__(self, begin: Callable[[str], WorkerProcess], base_first: bool) -> None:
        self.begin = begin
        names = (BASE, HEAD, CONTROL, SLOWED)
        self.names = names if base_first else names[::-1]
        self.workers: dict[str, WorkerProcess] = {}

    def start(self) -> None:
        """Start them all, and wait until they are ready."""
        for name in self.names:
            self.workers[name] = self.begin(name)
        for worker in self.workers.values():
            worker.wait_until_ready()

    def end(self) -> None:
        """End them."""
        for worker in self.workers.values():
            worker.end()
        self.workers = {}

    def start_again(self) -> None:
        """End them, and start others."""
        self.end()
        self.start()


@contextmanager
def opened(workers: Mapping[str, WorkerProcess], benchmark: str, seed: int) -> Iterator[None]:
    """Workers with a benchmark open; :class:`Unusable` where one refuses it.

    All are asked for the same, also to check what they compute: what a process did before leaves its
    memory in another state, and a control whose outputs were not checked was 4 to 6 % slower.
    """
    asked_all(workers, "open", benchmark=benchmark, seed=seed)
    yield
    asked_all(workers, "close")


def asked_all(workers: Mapping[str, WorkerProcess], name: str, **arguments: Any) -> dict[str, Any]:
    """The answers of all workers, which work at once: nothing is timed meanwhile.

    Raises :class:`Unusable` of the first that refuses, when all have answered.
    """
    for side, worker in workers.items():
        with _refusals_of(side):
            worker.request(name, **arguments)
    return answers_of(workers)


def answers_of(workers: Mapping[str, WorkerProcess]) -> dict[str, Any]:
    """The answers of all workers to what each was asked last; see :func:`asked_all`."""
    answers: dict[str, Any] = {}
    refused: list[Unusable] = []
    for side, worker in workers.items():
        try:
            with _refusals_of(side):
                answers[side] = worker.answer()
        except Unusable as error:
            refused.append(error)
    if refused:
        # A lost worker first: fresh ones must take its place.
        raise min(refused, key=lambda error: error.kind != LOST)
    return answers


def asked(side: str, worker: WorkerProcess, name: str, **arguments: Any) -> Any:
    """The answer of one worker; :class:`Unusable` where it refuses."""
    with _refusals_of(side):
        return worker.ask(name, **arguments)


@contextmanager
def _refusals_of(side: str) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise Unusable(side, refusal.kind, refusal.why) from None
    except WorkerLost as error:
        raise Unusable(side, LOST, str(error)) from None
