"""The Hodges–Lehmann estimate of a shift, and its exact bounds from the signed-rank test.

The data are paired logarithms of ratios, one a pair of processes. The estimate is the median of their
Walsh averages, and a bound is the order statistic of these averages at which Wilcoxon's signed-rank
test crosses its level (Hodges and Lehmann 1963; Hollander, Wolfe and Chicken 2014, section 3.2–3.3).
The test is exact for any continuous distribution that is symmetric about its median, however heavy
its tails. With ties the bounds err on the safe side, as long as a claim is that a bound lies strictly
beyond a limit. A percentile bootstrap of the median would be simpler, but with eight pairs it errs in
3 % at a nominal 1 %.

Every function works on the last axis (or the last two) and takes any axes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

MOST_VALUES = 256
"""The exact distribution is made for so many values at most: a second, and 30 MB."""


@dataclass(frozen=True)
class Bounds:
    """A shift, and between which values it is: floats, or float64 [...]; each bound has its own level.

    In units of the data: for logarithms of ratios 0.01 is 1 % slower, or nearly. A bound is infinite
    where there are too few data for any.
    """

    estimate: Any
    lower: Any
    upper: Any

    def each(self) -> list[Bounds]:
        """Those of each of several series, as Python's numbers."""
        return [
            Bounds(*parts)
            for parts in zip(self.estimate.tolist(), self.lower.tolist(), self.upper.tolist())
        ]


def checked(name: str, values: np.ndarray, axes: int) -> np.ndarray:
    """The values as float64 with at least so many axes, none of them empty, and all of them finite.

    Raises ValueError, in one line, that names the values.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of numbers, found {error}") from None
    if array.ndim < axes or 0 in array.shape:
        wanted = "[pairs, rounds]" if axes == 2 else "[pairs]"
        raise ValueError(f"{name}: expected {wanted}, none of them 0, found {list(array.shape)}")
    bad = np.count_nonzero(~np.isfinite(array))
    if bad:
        raise ValueError(
            f"{name}: expected finite logarithms of ratios, found {bad} of {array.size} that are not; "
            "a time was 0, negative, infinite or missing"
        )
    return array


def process_medians(rounds: np.ndarray) -> np.ndarray:
    """The median of the rounds of each process pair: [..., pairs, rounds] to [..., pairs].

    Rounds of one process share its memory and its caches, so they count as one: pooled as if they were
    independent, they raise a false alarm in 5 to 24 % of comparisons at a nominal 1 %.
    """
    return np.median(checked("rounds", rounds, 2), axis=-1)


def walsh_averages(values: np.ndarray) -> np.ndarray:
    """The averages of all pairs of values, each with itself too: [..., n] to [..., n (n + 1) / 2]."""
    n = values.shape[-1]
    found = np.empty((*values.shape[:-1], n * (n + 1) // 2))
    start = 0
    for i in range(n):  # a slice at a time: a tenth of the time of two gathers
        np.add(values[..., i:], values[..., i, None], out=found[..., start : start + n - i])
        start += n - i
    found /= 2
    return found


def hodges_lehmann(values: np.ndarray) -> np.ndarray:
    """The median of the Walsh averages: [..., n] to [...]."""
    return np.median(walsh_averages(checked("values", values, 1)), axis=-1)


@cache
def null_distribution(n: int) -> np.ndarray:
    """P(W <= w) for w = 0 .. n (n + 1) / 4, W the signed-rank statistic of n values without a shift.

    SciPy's exact p-values of samples that are made to have the statistic 0, 1, 2, and so on.
    """
    from scipy.stats import wilcoxon

    ranks = np.arange(n, 0, -1)
    left = np.arange(n * (n + 1) // 4 + 1)
    samples = np.empty((left.size, n))
    for column, rank in enumerate(ranks):  # the largest ranks that fit are positive
        positive = rank <= left
        samples[:, column] = np.where(positive, rank, -rank)
        left = left - np.where(positive, rank, 0)
    found = wilcoxon(samples, alternative="less", method="exact", axis=-1).pvalue
    found.flags.writeable = False  # it is shared by all who ask
    return found


def critical_rank(n: int, alpha: float) -> int:
    """The largest w with P(W <= w) <= alpha for n values without a shift; -1 if there is none.

    At alpha = 1 % there is none below n = 7, where the smallest probability is 2^-n.
    """
    if not 1 <= n <= MOST_VALUES or not 0 < alpha < 0.5:
        raise ValueError(
            f"expected 1 to {MOST_VALUES} values and 0 < alpha < 0.5, found {n} and {alpha}"
        )
    return int(np.searchsorted(null_distribution(n), alpha, side="right")) - 1


def attained_level(n: int, alpha: float) -> float:
    """What a bound at the level alpha really errs at, at most: it is discrete. 0 if there is none."""
    rank = critical_rank(n, alpha)
    return float(null_distribution(n)[rank]) if rank >= 0 else 0.0


def signed_rank_bounds(values: np.ndarray, alpha: float) -> Bounds:
    """The shift of values [..., n] with two one-sided bounds, each of which errs in alpha at most.

    With w the critical rank, the bounds are the (w + 1)-th smallest and the (w + 1)-th largest Walsh
    average: the lower one is above a shift s exactly if at most w averages are at or below s, and their
    number is the test's statistic for s. Infinite where n is too small for alpha.
    """
    values = checked("values", values, 1)
    rank = critical_rank(values.shape[-1], alpha)
    averages = np.sort(walsh_averages(values), axis=-1)
    middle = averages.shape[-1] - 1
    estimate = (averages[..., middle // 2] + averages[..., -1 - middle // 2]) / 2
    if rank < 0:
        infinite = np.full_like(estimate, np.inf)
        return Bounds(estimate, -infinite, infinite)
    return Bounds(estimate, averages[..., rank], averages[..., -1 - rank])


def standard_error(values: np.ndarray) -> np.ndarray:
    """The standard deviation of the Hodges–Lehmann estimate of [..., n]: [...]; infinite at n = 1.

    For normal data: sqrt(pi / 3) times that of the mean (Hodges and Lehmann 1963). It is a scale, and
    decides nothing by itself: heavy tails make it larger than the estimate's own.
    """
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.inf)
    return np.sqrt(np.pi / 3 / n) * np.std(values, axis=-1, ddof=1)


def round_spread(rounds: np.ndarray) -> np.ndarray:
    """The standard deviation of rounds within a process pair: [..., pairs, rounds] to [...], pooled."""
    n = rounds.shape[-1]
    if n < 2:
        return np.zeros(rounds.shape[:-2])
    return np.sqrt(np.mean(np.var(rounds, axis=-1, ddof=1), axis=-1))
