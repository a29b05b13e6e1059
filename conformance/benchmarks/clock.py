"""How long launches take: by a timer of the CPU, or by events of CUDA.

``METHOD`` changes when what is measured changes: times by different methods are not compared.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

METHOD = "1"
"""The version of how times are taken; part of a machine's fingerprint."""

FLUSH_OVER_CACHE = 4
"""Bytes that are written before each launch, over those of the L2 cache."""

HIDE = 0.3e-3
"""Seconds that a GPU spins while the host enqueues a launch, to begin with."""

LONGEST_HIDE = 5e-3
"""Seconds of spin at most; a launch that waits for the device is not hidden by any spin."""

CALIBRATION_CYCLES = 20_000_000
"""Cycles of the spin that tells how many a second has."""


class Clock(Protocol):
    """Takes the time of launches."""

    def seconds(
        self, launches: Sequence[Callable[[], object]], *, delay: float = 0.0
    ) -> list[float]:
        """Seconds of each launch, one after another.

        ``delay`` is a time in seconds for which the device is kept busy inside of each measurement:
        a slowdown of known size.
        """


class CpuClock:
    """By ``time.perf_counter``, with the garbage collector off.

    ``now`` is the timer, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def seconds(
        self, launches: Sequence[Callable[[], object]], *, delay: float = 0.0
    ) -> list[float]:
        """See :class:`Clock`."""
        times = []
        with no_garbage_collection():
            for launch in launches:
                begin = self.now()
                launch()
                end = self.now()
                if delay > 0:
                    until = end + delay
                    while end < until:
                        end = self.now()
                times.append(end - begin)
        return times


class CudaClock:
    """By a pair of CUDA events around each launch, in the current stream.

    Before each: random numbers of four times the L2 cache are overwritten, so that inputs come from
    memory, and the device spins while the host enqueues, so that the time of the launch is not
    counted where it does not wait for the device. The host waits once, at the end.

    ``cuda`` is ``torch.cuda``.
    """

    def __init__(self, device: str = "cuda", cuda: ModuleType | None = None) -> None:
        import torch

        self.cuda = torch.cuda if cuda is None else cuda
        cache = self.cuda.get_device_properties(device).L2_cache_size
        self.flushed = torch.randint(
            1, 1 << 30, (FLUSH_OVER_CACHE * cache // 4,), dtype=torch.int32, device=device
        )
        self.exposed = 0
        """Launches of the last call of ``seconds`` that took the host longer than the spin."""
        self.cycles_a_second = self.calibrate()

    def calibrate(self) -> float:
        """Cycles of ``torch.cuda._sleep`` in a second; the median of three."""
        self.cuda._sleep(CALIBRATION_CYCLES)
        rates = []
        for _ in range(3):
            begin, end = self.event(), self.event()
            begin.record()
            self.cuda._sleep(CALIBRATION_CYCLES)
            end.record()
            self.cuda.synchronize()
            rates.append(CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1000))
        return sorted(rates)[1]

    def event(self):
        """An event that takes the time."""
        return self.cuda.Event(enable_timing=True)

    def prepare(self, hide: float = HIDE) -> None:
        """Empty the L2 cache of what it holds, and keep the device busy for ``hide`` seconds."""
        self.flushed.neg_()
        self.spin(hide)

    def spin(self, seconds: float) -> None:
        """Keep the device busy for so long, after what is enqueued."""
        cycles = math.ceil(seconds * self.cycles_a_second)
        if cycles > 0:
            self.cuda._sleep(cycles)

    def seconds(
        self, launches: Sequence[Callable[[], object]], *, delay: float = 0.0
    ) -> list[float]:
        """See :class:`Clock`."""
        pairs = [(self.event(), self.event()) for _ in launches]
        self.exposed, hide = 0, HIDE
        self.cuda.synchronize()
        with no_garbage_collection():
            for launch, (begin, end) in zip(launches, pairs):
                self.prepare(hide)
                begin.record()
                at = time.perf_counter()
                launch()
                took = time.perf_counter() - at
                self.spin(delay)
                end.record()
                self.exposed += took > hide
                hide = min(LONGEST_HIDE, max(hide, 1.5 * took))
        self.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


class EventTimer:
    """A timer for pytest-benchmark: the difference of two of its marks is a time of the GPU.

    ``cuda`` is ``torch.cuda``, by default when the first mark is made.
    """

    def __init__(self, cuda: ModuleType | None = None) -> None:
        self.cuda = cuda

    def __call__(self) -> Mark:
        """A mark in the current stream, now."""
        if self.cuda is None:
            import torch

            self.cuda = torch.cuda
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return Mark(self.cuda, event)


class Mark:
    """A point in a stream; ``end - start`` waits for the device and gives seconds."""

    def __init__(self, cuda: ModuleType, event: object) -> None:
        self.cuda, self.event = cuda, event

    def __sub__(self, start: Mark) -> float:
        """Seconds from ``start`` to this mark."""
        self.cuda.synchronize()
        return start.event.elapsed_time(self.event) / 1000


def clock_for(device: str) -> Clock:
    """The clock of a device, ``cpu`` or ``cuda``."""
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


@contextmanager
def no_garbage_collection():
    """Python collects no garbage within."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
