"""How bounds and thresholds behave on machines that do not exist, one comparison at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from markdown_tables import markdown, share, shares
from noise_models import HEAD_STALL, MACHINES, Noise
from scipy.stats import mannwhitneyu

from conformance.gate.statistics import signed_rank_bounds

ALPHA = 0.01
MARGIN = np.log1p(0.01)
EFFECTS = (0.03, 0.05, 0.10)


# Rules compared, on one pair of processes


def timed(noise: Noise, order: str, trials: int, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of n times of a base and of n times of a head that is equal: [trials, n] each."""
    times = noise.times(np.random.default_rng([1, trials]), (trials, 2 * n))
    if order == "sequential":
        return times[:, :n], times[:, n:]
    first, second = times[:, 0::2], times[:, 1::2]
    turned = np.arange(n) % 2 == 1
    return np.where(turned, second, first), np.where(turned, first, second)


Decider = Callable[[np.ndarray, np.ndarray], np.ndarray]


def ratio_above(summary: Callable[..., np.ndarray]) -> Decider:
    """The rule of a threshold: 5 % on a summary of the times."""
    return lambda base, head: summary(np.exp(head), axis=-1) > 1.05 * summary(np.exp(base), axis=-1)


def rank_sum(base: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The unpaired test at 1 %, one-sided."""
    test = mannwhitneyu(head, base, alternative="greater", axis=-1, method="asymptotic")
    return test.pvalue < ALPHA


def bound_above(margin: float) -> Decider:
    """The gate's bound on the pairs of times."""
    return lambda base, head: signed_rank_bounds(head - base, ALPHA).lower > margin


DECIDERS: dict[str, Decider] = {
    "mean > 5 %": ratio_above(np.mean),
    "min > 5 %": ratio_above(np.min),
    "U test": rank_sum,
    "bound > 0": bound_above(0.0),
    "bound > 1 %": bound_above(MARGIN),
}


@cache
def rules_compared(trials: int = 3000) -> dict[tuple[str, str], dict[str, list[float]]]:
    """For each machine and order, by rule: how often it flags a head slower by 0, 3, 5 and 10 %."""
    found = {}
    for name, noise in MACHINES.items():
        for order in ("interleaved", "sequential"):
            base, head = timed(noise, order, trials)
            found[name, order] = {
                rule: [float(np.mean(flags(base, head + np.log1p(e)))) for e in (0, *EFFECTS)]
                for rule, flags in DECIDERS.items()
            }
    return found


def table_of_rules() -> str:
    """False alarms and detection of 5 %, by rule; of 3, 5 and 10 % for the gate's own."""
    *others, _ = DECIDERS
    rows = [
        [
            name,
            order,
            *(shares((found[rule][0], found[rule][2])) for rule in others),
            shares(found["bound > 1 %"]),
        ]
        for (name, order), found in rules_compared().items()
    ]
    return markdown(["machine", "order", *others, "bound > 1 %: 0, 3, 5, 10 %"], rows)


# How many pairs

SIZES = (7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 36, 44, 52, 64)
SPREADS = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05)


@cache
def power_by_pairs(trials: int = 1500) -> dict[tuple[float, float, float], dict[int, float]]:
    """How often a slowdown is found, by spread of a pair, slowdown, margin, and number of pairs.

    Pairs are normal but for 3 % of them that are five times as far off.
    """
    found: dict[tuple[float, float, float], dict[int, float]] = {}
    g = np.random.default_rng(2)
    z = g.standard_normal((trials, SIZES[-1]))
    z[g.random(z.shape) < 0.03] *= 5
    for n in SIZES:
        lower = signed_rank_bounds(z[:, :n], ALPHA).lower
        for sd in SPREADS:
            for effect in EFFECTS[:2]:
                for margin in (0.01, 0.0):
                    flags = sd * lower + np.log1p(effect) > np.log1p(margin)
                    found.setdefault((sd, effect, margin), {})[n] = float(np.mean(flags))
    return found


def table_of_pairs() -> str:
    """The fewest pairs that find a slowdown in 90 and in 99 %."""

    def fewest(power: dict[int, float], wanted: float) -> str:
        return next((str(n) for n in SIZES if power[n] >= wanted), f"> {SIZES[-1]}")

    found = power_by_pairs()
    columns = [(e, m) for e in EFFECTS[:2] for m in (0.01, 0.0)]
    rows = [
        [f"{100 * sd:g} %"]
        + [f"{fewest(found[sd, *c], 0.9)} / {fewest(found[sd, *c], 0.99)}" for c in columns]
        for sd in SPREADS
    ]
    return markdown(
        ["sd of a pair", *(f"{100 * e:g} %, bound > {100 * m:g} %" for e, m in columns)], rows
    )


# What a process adds

BIASES = (0.0, 0.005, 0.01, 0.02)
LAYOUTS = ((8, 5), (10, 5), (15, 10))


@cache
def process_bias(trials: int = 4000) -> dict[float, dict[str, list[float]]]:
    """By spread of what a process pair adds to rounds of 0.7 %: false alarms, and what is found."""
    found: dict[float, dict[str, list[float]]] = {}
    for bias in BIASES:
        g = np.random.default_rng([3, int(1000 * bias)])

        def rounds(pairs: int, number: int, g=g, bias=bias) -> np.ndarray:
            within = 0.007 * g.standard_normal((trials, pairs, number))
            return within + bias * g.standard_normal((trials, pairs, 1))

        one = signed_rank_bounds(rounds(1, 20)[:, 0], ALPHA).lower
        row = {"one pair": [float(np.mean(one > 0)), float(np.mean(one > MARGIN))]}
        for pairs, number in LAYOUTS:
            drawn = rounds(pairs, number)
            lower = signed_rank_bounds(np.median(drawn, axis=-1), ALPHA).lower
            row[f"{pairs} x {number}"] = [
                float(np.mean(lower + np.log1p(e) > MARGIN)) for e in (0, *EFFECTS[:2])
            ]
            if (pairs, number) == LAYOUTS[0]:
                pooled = signed_rank_bounds(drawn.reshape(trials, -1), ALPHA).lower
                row["pooled"] = [float(np.mean(pooled > 0))]
        found[bias] = row
    return found


def table_of_bias() -> str:
    """False alarms of one process pair and of pooled rounds; what several process pairs find."""
    header = ["bias sd", "1 pair of 20 rounds: > 0 / > 1 %", "8 x 5 rounds pooled: > 0"]
    header += [f"medians of {p} x {r}: 0 / 3 / 5 %" for p, r in LAYOUTS]
    rows = [
        [f"{100 * bias:g} %", shares(row["one pair"]), shares(row["pooled"])]
        + [shares(row[f"{p} x {r}"]) for p, r in LAYOUTS]
        for bias, row in process_bias().items()
    ]
    return markdown(header, rows)


# Where the bounds are not exact

STALLED_SIZES = (8, 15, 20, 32)


@cache
def asymmetry(trials: int = 20_000) -> dict[int, tuple[float, float]]:
    """False alarms, bound above 0 and above 1 %, if the head alone stalls in 15 % of the pairs."""
    found = {}
    for n in STALLED_SIZES:
        g = np.random.default_rng([4, n])
        pairs = 0.007 * g.standard_normal((trials, n)) + HEAD_STALL * (g.random((trials, n)) < 0.15)
        lower = signed_rank_bounds(pairs, ALPHA).lower
        found[n] = (float(np.mean(lower > 0)), float(np.mean(lower > MARGIN)))
    return found


@cache
def bootstrap(trials: int = 2000, resamples: int = 500) -> dict[int, float]:
    """False alarms of a percentile bootstrap of the median at a nominal 1 %."""
    found = {}
    for n in STALLED_SIZES[:3]:
        g = np.random.default_rng([5, n])
        wrong = 0
        for _ in range(10):
            values = g.standard_normal((trials // 10, 1, n))
            chosen = g.integers(0, n, (trials // 10, resamples, n))
            medians = np.median(np.take_along_axis(values, chosen, axis=-1), axis=-1)
            wrong += np.count_nonzero(np.quantile(medians, ALPHA, axis=-1) > 0)
        found[n] = wrong / trials
    return found


def table_of_asymmetry() -> str:
    """What 1 % comes to: of the gate's bound if the head alone stalls, and of a bootstrap."""
    rows = [
        [str(n), *map(share, asymmetry()[n]), share(bootstrap()[n]) if n in bootstrap() else ""]
        for n in STALLED_SIZES
    ]
    header = ["pairs", "head stalls: bound > 0", "bound > 1 %", "bootstrap of the median > 0"]
    return markdown(header, rows)
