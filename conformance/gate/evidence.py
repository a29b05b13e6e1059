"""What one stage of measurement says of a benchmark, by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from conformance.gate.rule import STANDARD_ERRORS, Rule
from conformance.gate.samples import Samples
from conformance.gate.statistics import (
    Bounds,
    checked,
    process_medians,
    round_spread,
    signed_rank_bounds,
    standard_error,
)

SERIES = ("head", "control", "slowed")


class Claim(StrEnum):
    """What a stage says by itself. The first four must recur in fresh processes to be believed."""

    UNEQUAL = "two copies of the base differ"
    REGRESSED = "the head is slower"
    IMPROVED = "the head is faster"
    BLIND = "the known slowdown does not show"
    OK = "the slowdown to be detected is excluded"
    OPEN = "nothing is shown"

    @property
    def needs_confirmation(self) -> bool:
        """Whether fresh processes must repeat it before it is believed."""
        return self not in (Claim.OK, Claim.OPEN)


@dataclass(frozen=True)
class Evidence:
    """What was measured of one benchmark in one stage. Differences are logarithms of ratios, float."""

    pairs: int
    rounds: int
    head: Bounds
    control: Bounds
    slowed: Bounds
    margin: float
    round_sd: float
    """Of two copies of the base: the standard deviation of rounds within a process pair."""
    process_sd: float
    """Of two copies of the base: the standard deviation of the medians of process pairs."""

    def as_json(self) -> dict[str, Any]:
        """Differences as shares of the base's time, spreads as they are; null for an infinite bound."""
        bounds = {
            name: {part: share(value) for part, value in vars(getattr(self, name)).items()}
            for name in SERIES
        }
        return {
            "pairs": self.pairs,
            "rounds": self.rounds,
            **bounds,
            "margin": share(self.margin),
            "round_sd": self.round_sd,
            "process_sd": self.process_sd,
        }


def weigh(samples: Samples, rule: Rule) -> list[Evidence]:
    """The evidence of many benchmarks at once: samples [benchmarks, pairs, rounds].

    The margin is that of the rule, or two standard errors of the estimate of two copies of the base.
    Raises ValueError, in one line, for samples that differ in shape or are not finite.
    """
    series = {name: checked(name, getattr(samples, name), 2) for name in SERIES}
    if len({each.shape for each in series.values()}) > 1:
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in series.items())
        raise ValueError(f"expected the same pairs and rounds of every side, found {shapes}")
    medians = {name: process_medians(each) for name, each in series.items()}
    bounds = {name: signed_rank_bounds(each, rule.alpha) for name, each in medians.items()}
    control = medians["control"]
    margins = np.maximum(math.log1p(rule.margin), STANDARD_ERRORS * standard_error(control))
    within, between = round_spread(series["control"]), np.std(control, axis=-1, ddof=1)
    _, pairs, rounds = series["head"].shape
    return [
        Evidence(pairs, rounds, *each)
        for each in zip(
            *(bounds[name].each() for name in SERIES),
            margins.tolist(),
            within.tolist(),
            between.tolist(),
        )
    ]


def claim(evidence: Evidence, rule: Rule) -> Claim:
    """What the stage says: first of its controls, then of the head, and of power before an OK.

    The head is slower, or faster, if its bound is beyond the margin, and so is the second copy of the
    base, which then is unequal to the first. That takes no power to believe; an OK does, so it needs
    the known slowdown found, by the same rule.
    """
    head, control, slowed = evidence.head, evidence.control, evidence.slowed
    margin, detects = evidence.margin, math.log1p(rule.detects)
    if control.lower > margin or control.upper < -margin:
        return Claim.UNEQUAL
    if head.lower > margin:
        return Claim.REGRESSED
    if head.upper < -margin:
        return Claim.IMPROVED
    if not slowed.lower > margin:
        return Claim.BLIND if slowed.upper < detects else Claim.OPEN
    return Claim.OK if head.upper < detects else Claim.OPEN


def share(log_ratio: float) -> float | None:
    """A logarithm of a ratio as a change, 0.03 for 3 % slower; None if it is infinite."""
    return math.expm1(log_ratio) if math.isfinite(log_ratio) else None


def percent(log_ratio: float) -> str:
    """A logarithm of a ratio as a change, for a sentence: +3.1 %."""
    if not math.isfinite(log_ratio):
        return "-∞" if log_ratio < 0 else "+∞"
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def interval(bounds: Bounds) -> str:
    """An estimate with its bounds, for a sentence."""
    return f"{percent(bounds.estimate)} ({percent(bounds.lower)} to {percent(bounds.upper)})"
