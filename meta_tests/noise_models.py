"""Machines that do not exist: times drawn as noisy machines give them, to try the gate's rule on.

Times are drawn in the sequence in which they would be taken, so what drifts does so between the sides
of a round too, and the order of measurement matters as it does in fact. All are logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from scipy.signal import lfilter

from conformance.gate.samples import Samples, Stage

RHO = 0.98
"""Correlation of the drift from one time to the next: half of it is left after 34 times."""

SLOW_CLOCK = 0.033
"""One clock state below the usual, as H100s show it."""

HEAD_STALL = np.log(1.5)
"""What a stall of the head alone adds."""

BASE, HEAD, CONTROL, SLOWED = range(4)

ORDERS = np.array(
    [
        [BASE, HEAD, SLOWED, CONTROL],
        [HEAD, CONTROL, BASE, SLOWED],
        [CONTROL, SLOWED, HEAD, BASE],
        [SLOWED, BASE, CONTROL, HEAD],
    ]
)
"""A Williams square: each side is once in each place, and once after each other side."""


@dataclass(frozen=True)
class Noise:
    """What a machine adds to the logarithm of a time. Shares are of all times."""

    sd: float
    """Of a time, whatever its neighbours are."""
    drift: float = 0.0
    """Standard deviation of what drifts from time to time (clock, temperature, neighbours)."""
    slow_clock: float = 0.0
    """Share of times that the clock is one state down."""
    outliers: float = 0.0
    """Share of times that are too long by ``outlier_size`` half-normal standard deviations."""
    outlier_size: float = 20.0
    stalls: float = 0.0
    """Share of times that take longer by ``stall_size`` on average, exponentially distributed."""
    stall_size: float = 0.4
    student: bool = False
    """Tails of Student's t with two degrees of freedom, which have no variance, in place of normal."""
    bias: float = 0.0
    """Standard deviation of what a pair of processes adds to all its logarithms of ratios."""
    slow_processes: float = 0.0
    """Share of processes that are a clock state slower throughout, as another tuning would be."""
    head_stalls: float = 0.0
    """Share of times at which the head alone takes half again as long."""

    def times(self, g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to the logarithms of times that follow each other along the last axis."""
        found = g.standard_normal(shape)
        if self.outliers:
            heavy = g.random(shape) < self.outliers
            found[heavy] = self.outlier_size * np.abs(found[heavy])
        if self.student:
            found /= np.sqrt(g.standard_exponential(shape))
        found *= self.sd
        if self.drift:
            found += self.drift * autoregressive(g, shape)
        if self.slow_clock:
            found += SLOW_CLOCK * (g.random(shape) < self.slow_clock)
        if self.stalls:
            stalled = g.random(shape) < self.stalls
            found[stalled] += self.stall_size * g.standard_exponential(np.count_nonzero(stalled))
        return found

    def processes(self, g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """What a process adds to the logarithms of all its times."""
        found = self.bias / np.sqrt(2) * g.standard_normal(shape)
        return found + SLOW_CLOCK * (g.random(shape) < self.slow_processes)


def autoregressive(g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A stationary AR(1) series of standard deviation 1 along the last axis."""
    steps = np.sqrt(1 - RHO**2) * g.standard_normal(shape)
    before = RHO * g.standard_normal((*shape[:-1], 1))
    return lfilter([1], [1, -RHO], steps, axis=-1, zi=before)[0]


MACHINES = {
    "gpu quiet": Noise(0.003, drift=0.01, outliers=0.02),
    "gpu typical": Noise(0.007, drift=0.03, slow_clock=0.05, outliers=0.02),
    "gpu shared": Noise(0.02, drift=0.08, slow_clock=0.20, outliers=0.04),
    "cpu dedicated": Noise(0.01, drift=0.03, outliers=0.03, outlier_size=30),
    "cpu cloud": Noise(0.05, drift=0.20, outliers=0.04, outlier_size=15, stalls=0.10),
}
"""Five kinds of machines, without processes."""


@dataclass(frozen=True)
class Machine:
    """A ``Measure`` of heads that are all slower by ``effect``, a share, on a machine with this noise.

    It draws the same numbers for the same ``seed``, if it is asked for the same benchmarks and pairs.
    """

    noise: Noise
    seed: int
    effect: float = 0.0
    injected: float = 0.05
    unequal: float = 0.0
    """By how much the second copy of the base is slower: a broken measurement."""
    seen: float = 1.0
    """How much of a slowdown the measurement sees: 0 is blind."""

    def __call__(
        self, benchmarks: Sequence[str], *, pairs: int, rounds: int, stage: Stage
    ) -> dict[str, Samples]:
        """Draw them, all at once."""
        asked = crc32(f"{stage} {pairs} {rounds} {benchmarks}".encode())
        found = self.samples(
            np.random.default_rng([self.seed, asked]), (len(benchmarks), pairs, rounds)
        )
        sides = zip(found.head, found.control, found.slowed)
        return {name: Samples(*each) for name, each in zip(benchmarks, sides)}

    def samples(self, g: np.random.Generator, shape: tuple[int, ...]) -> Samples:
        """Samples [..., pairs, rounds]; a measurement runs through its pairs and rounds in sequence."""
        *lead, pairs, rounds = shape
        sides = self.noise.times(g, (*lead, pairs * rounds * 4)).reshape(*shape, 4)
        turn = np.arange(pairs)[:, None] + np.arange(rounds)
        placed = ORDERS[turn % 4]  # [pair, round, place] to side
        placed[1::2] = placed[1::2, :, ::-1]
        place = np.argsort(placed, axis=-1)  # [pair, round, side] to place
        place = np.broadcast_to(place, sides.shape)
        times = np.take_along_axis(sides, place, axis=-1)
        process = self.noise.processes(g, (*lead, pairs, 1, 3))
        times[..., :3] += process
        times[..., SLOWED] += process[..., CONTROL]  # the delay is in the same process
        times[..., CONTROL:] += np.log1p(self.unequal)
        times[..., SLOWED] += self.seen * np.log1p(self.injected)
        times[..., HEAD] += self.seen * np.log1p(self.effect)
        if self.noise.head_stalls:
            stalled = g.random(shape) < self.noise.head_stalls
            times[..., HEAD] += HEAD_STALL * stalled
        ratios = times - times[..., BASE : BASE + 1]
        return Samples(ratios[..., HEAD], ratios[..., CONTROL], ratios[..., SLOWED])
