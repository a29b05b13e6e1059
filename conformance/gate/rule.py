"""What the gate can say, and the numbers of its rule: levels, pairs, margins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from conformance.gate.statistics import attained_level

MARGIN_FLOOR = 0.01
"""Below this a difference is not worth a verdict, and a verdict would not be safe.

The bounds take differences to be symmetric. If the head alone stalls now and then, a lower bound above
0 is false in 3 to 13 % of comparisons, more with more pairs; one above 1 % stays at its level.
"""

STANDARD_ERRORS = 2
"""The margin is so many standard errors of the A/A estimate, where that is more than the floor."""

NORMAL = NormalDist()

GATES = (0.03, 0.05, 0.10, 0.20, 0.50)
"""Slowdowns that a benchmark may promise to detect, smallest first."""


class Verdict(StrEnum):
    """What the gate says of a benchmark, or of all of them."""

    REGRESSED = "REGRESSED"
    """Slower than the base by more than the margin, twice, in different processes."""
    OK = "OK"
    """Not slower by what the benchmark promises to detect."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """Neither could be shown."""
    IMPROVED = "IMPROVED"
    """Faster than the base by more than the margin, twice, in different processes."""
    VOID = "VOID"
    """The measurement itself is broken: its controls say so."""


@dataclass(frozen=True)
class Rule:
    """What a benchmark is measured with and held to. Slowdowns are shares: 0.03 is 3 %.

    Raises ValueError, in one line, if the parts contradict each other.
    """

    alpha: float = 0.01
    """The error of each one-sided bound."""
    pairs: int = 8
    """Process pairs of the screen, doubled for what is inconclusive ..."""
    pairs_cap: int = 32
    """... up to so many."""
    rounds: int = 5
    """Rounds in each process pair of the screen."""
    confirm_pairs: int = 15
    """Fresh process pairs that confirm a claim, or as many as the screen needed if that was more."""
    confirm_rounds: int = 10
    """Rounds in each of these."""
    margin: float = MARGIN_FLOOR
    """By how much the head must be slower, at least; more where two copies of the base say so."""
    detects: float = 0.03
    """The slowdown that OK excludes."""
    injected: float = 0.05
    """The known slowdown of ``Samples.slowed``: larger than ``detects``."""

    def __post_init__(self) -> None:
        for holds, expected in (
            (0 < self.alpha < 0.5, "0 < alpha < 0.5"),
            (1 <= self.pairs <= self.pairs_cap, "1 <= pairs <= pairs_cap"),
            (self.confirm_pairs >= 1, "confirm_pairs >= 1"),
            (self.rounds >= 1 and self.confirm_rounds >= 1, "one round or more"),
            (self.margin >= MARGIN_FLOOR, f"margin >= {MARGIN_FLOOR}"),
            (self.margin < self.detects, "margin < detects"),
            (self.detects < self.injected < math.inf, "detects < injected"),
        ):
            if not holds:
                raise ValueError(f"expected {expected}, found {self}")
        fewest = math.ceil(-math.log2(self.alpha))
        for pairs in (self.pairs, self.confirm_pairs):
            if 2.0**-pairs > self.alpha:
                raise ValueError(
                    f"{pairs} process pairs give no bound at alpha = {self.alpha:g}: "
                    f"expected {fewest} or more"
                )

    def looks(self) -> list[int]:
        """How many process pairs the screen has at each look: doubled up to the cap."""
        found = [self.pairs]
        while found[-1] < self.pairs_cap:
            found.append(min(2 * found[-1], self.pairs_cap))
        return found

    def pairs_to_confirm(self, screened: int) -> int:
        """Fresh process pairs for a claim of a screen with so many."""
        return max(screened, self.confirm_pairs)


PRESETS = {
    "gpu": Rule(),
    "cpu": Rule(detects=0.05, injected=0.08),
    "shared": Rule(detects=0.10, injected=0.16),
}
"""Rules for GPU kernels, for a CPU of one's own, and for runners that are shared with others."""


def recommended_gate(process_sd: float, rule: Rule) -> float | None:
    """The smallest of ``GATES`` that the rule finds nine times in ten at this spread; None if none is.

    ``process_sd`` is the standard deviation of the medians of process pairs of two copies of the base.
    A slowdown is found when the estimate is over the margin by the width of its bound, so at the cap it
    must be the margin and z(1 - alpha) + z(0.9) standard errors of the estimate: about as much as
    ``process_sd`` itself at 32 pairs.
    """
    error = math.sqrt(math.pi / 3 / rule.pairs_cap) * process_sd
    margin = max(math.log1p(rule.margin), STANDARD_ERRORS * error)
    least = margin + (NORMAL.inv_cdf(1 - rule.alpha) + NORMAL.inv_cdf(0.9)) * error
    return next((gate for gate in GATES if math.log1p(gate) >= least), None)


def expected_false_flags(rules: Sequence[Rule]) -> float:
    """How many of these benchmarks are REGRESSED on average, at most, though no head is slower.

    For each, the levels of all looks of the screen together, times that of the confirmation: fresh
    processes know nothing of the screen.
    """
    return sum(
        sum(attained_level(n, rule.alpha) for n in rule.looks())
        * max(attained_level(rule.pairs_to_confirm(n), rule.alpha) for n in rule.looks())
        for rule in rules
    )
