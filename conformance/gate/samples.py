"""What the gate measures, and who measures it: the seam between the rule and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Stage = Literal["screen", "confirm"]
"""``confirm`` is measured in fresh processes, with the opposite side first and other inputs."""


@dataclass(frozen=True)
class Samples:
    """Logarithms of ratios of times to the base's, float64 [pairs, rounds]; above 0 is slower.

    A round times every side once, back to back, in an order that is balanced over rounds. The rows
    are process pairs: what a process does to its times (its memory, its caches) is the same in a row.
    """

    head: np.ndarray
    """The head."""
    control: np.ndarray
    """A second copy of the base: how much is noise."""
    slowed: np.ndarray
    """That copy with a delay of known size: whether a slowdown would be seen."""

    def and_more(self, more: Samples) -> Samples:
        """These pairs and the pairs that were measured later."""
        both = ((getattr(self, n), getattr(more, n)) for n in ("head", "control", "slowed"))
        return Samples(*(np.concatenate(pair) for pair in both))


class Measure(Protocol):
    """The machine, or a simulation of one."""

    def __call__(
        self, benchmarks: Sequence[str], *, pairs: int, rounds: int, stage: Stage
    ) -> dict[str, Samples]:
        """Measure these benchmarks in so many new process pairs, each with so many rounds.

        One that cannot be measured (any more) is left out of what is given.
        """
