"""The gate's estimate and bounds are those of the exact signed-rank test, and its rule is kept."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from command_line import ROOT
from scipy.stats import wilcoxon

from conformance.gate.statistics import (
    attained_level,
    critical_rank,
    hodges_lehmann,
    null_distribution,
    process_medians,
    round_spread,
    signed_rank_bounds,
    standard_error,
    walsh_averages,
)

SIZES = [7, 8, 9, 12, 15, 16, 20, 31, 32, 64]


def drawn(n, *lead, seed=0):
    return np.random.default_rng([seed, n]).standard_normal((*lead, n))


@pytest.mark.parametrize("n", range(1, 13))
def test_null_distribution_is_that_of_all_signs(n):
    signs = np.array(list(itertools.product([0, 1], repeat=n)))
    statistic = signs @ np.arange(1, n + 1)
    half = n * (n + 1) // 4 + 1
    expected = [np.mean(statistic <= w) for w in range(half)]
    np.testing.assert_allclose(null_distribution(n), expected, rtol=1e-12)


@pytest.mark.parametrize(
    # Critical values of tables: Hollander, Wolfe and Chicken, table A.4, and the smallest n by hand.
    ("n", "alpha", "rank"),
    [
        (6, 0.01, -1),
        (7, 0.01, 0),
        (8, 0.01, 1),
        (9, 0.01, 3),
        (10, 0.01, 5),
        (15, 0.01, 19),
        (20, 0.01, 43),
        (4, 0.05, -1),
        (5, 0.05, 0),
        (10, 0.05, 10),
        (20, 0.05, 60),
    ],
)
def test_critical_rank_is_that_of_printed_tables(n, alpha, rank):
    assert critical_rank(n, alpha) == rank


@pytest.mark.parametrize("n", SIZES)
def test_attained_level_is_the_largest_within_alpha(n):
    rank, below = critical_rank(n, 0.01), null_distribution(n)
    assert below[rank] <= 0.01 < below[rank + 1]
    assert attained_level(n, 0.01) == below[rank]
    assert attained_level(5, 0.01) == 0


def test_bounds_of_a_worked_example():
    """Seven values: at 1 % only all signs alike reject, so the bounds are the extreme values."""
    bounds = signed_rank_bounds(np.array([0.03, 0.01, 0.02, 0.05, 0.04, 0.06, 0.07]), 0.01)
    assert (bounds.estimate, bounds.lower, bounds.upper) == (0.04, 0.01, 0.07)


def test_bounds_of_a_worked_example_with_eight():
    """At n = 8 the rank is 1: the second of the averages 0, 1/2, 1, 1, ... and of 7, 13/2, 6, 6, ..."""
    bounds = signed_rank_bounds(np.arange(8.0), 0.01)
    assert (bounds.estimate, bounds.lower, bounds.upper) == (3.5, 0.5, 6.5)


def test_walsh_averages_are_those_of_all_pairs():
    values = drawn(5, 3)
    for found, row in zip(walsh_averages(values), values):
        pairs = itertools.combinations_with_replacement(row, 2)
        np.testing.assert_allclose(sorted(found), sorted((a + b) / 2 for a, b in pairs))


@pytest.mark.parametrize("n", SIZES)
def test_bounds_are_where_scipy_crosses_the_level(n):
    """Just below the lower bound SciPy rejects, just above it does not, and so for the upper one."""
    step = 1e-7
    for values in drawn(n, 4, seed=1):
        bounds = signed_rank_bounds(values, 0.01)

        def p_value(shift, alternative, values=values):
            return wilcoxon(values - shift, alternative=alternative, method="exact").pvalue

        assert (
            p_value(bounds.lower - step, "greater")
            <= 0.01
            < p_value(bounds.lower + step, "greater")
        )
        assert p_value(bounds.upper + step, "less") <= 0.01 < p_value(bounds.upper - step, "less")


@pytest.mark.parametrize("n", [7, 8, 15])
def test_bounds_by_counting_all_signs(n):
    """The lower bound is above a shift exactly if few enough sign patterns are as extreme."""
    values = drawn(n, seed=2) + 0.8
    signs = np.array(list(itertools.product([0, 1], repeat=n)), dtype=np.int8)
    lower = signed_rank_bounds(values, 0.01).lower
    for shift in np.linspace(values.min() - 0.1, np.median(values), 40):
        ranks = np.argsort(np.argsort(np.abs(values - shift))) + 1
        p_value = np.mean(signs @ ranks >= ranks[values > shift].sum())
        assert (lower > shift) == (p_value <= 0.01)


def test_leading_axes_change_nothing():
    values = drawn(9, 2, 3, seed=3)
    together = signed_rank_bounds(values, 0.01)
    for index in np.ndindex(2, 3):
        alone = signed_rank_bounds(values[index], 0.01)
        assert together.lower[index] == alone.lower
        assert together.estimate[index] == alone.estimate == hodges_lehmann(values[index])


@pytest.mark.parametrize("n", range(1, 7))
def test_fewer_than_seven_bound_nothing_at_one_percent(n):
    bounds = signed_rank_bounds(drawn(n), 0.01)
    assert (bounds.lower, bounds.upper) == (-np.inf, np.inf)
    assert np.isfinite(bounds.estimate)


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_equal_values_bound_themselves_and_claim_nothing_beyond(value):
    bounds = signed_rank_bounds(np.full(8, value), 0.01)
    assert bounds.lower == bounds.estimate == bounds.upper == value
    assert not bounds.lower > value


@pytest.mark.parametrize("alpha", [0.01, 0.05])
@pytest.mark.parametrize("n", [8, 15])
def test_ties_and_zeros_err_on_the_safe_side(n, alpha):
    """Times that take three values only, as of a coarse clock: false claims stay below the level."""
    values = np.random.default_rng(4).integers(-1, 2, (20_000, n)).astype(float)
    bounds = signed_rank_bounds(values, alpha)
    for wrong in (bounds.lower > 0, bounds.upper < 0):
        assert np.mean(wrong) <= attained_level(n, alpha) + 3 * math.sqrt(alpha / 20_000)


@pytest.mark.parametrize("n", [7, 8, 15, 32])
@pytest.mark.parametrize("tails", ["normal", "cauchy", "uniform"])
def test_each_bound_errs_at_its_exact_level(n, tails):
    trials = 20_000
    g = np.random.default_rng([5, n])
    values = {"normal": g.standard_normal, "cauchy": g.standard_cauchy, "uniform": g.random}[tails]
    found = signed_rank_bounds(values((trials, n)), 0.01)
    centre, level = (0.5 if tails == "uniform" else 0.0), attained_level(n, 0.01)
    for wrong in (found.lower > centre, found.upper < centre):
        assert abs(np.mean(wrong) - level) < 4 * math.sqrt(level / trials)


@pytest.mark.parametrize("n", [8, 15, 32])
def test_standard_error_is_that_of_the_estimate(n):
    values = drawn(n, 20_000, seed=6)
    expected = np.sqrt(np.mean(standard_error(values) ** 2))
    assert np.std(hodges_lehmann(values)) == pytest.approx(expected, rel=0.03)


def test_standard_error_of_one_value_is_unknown():
    assert standard_error(np.zeros((2, 1))).tolist() == [np.inf, np.inf]


def test_spread_of_rounds_leaves_out_what_a_process_adds():
    g = np.random.default_rng(7)
    rounds = g.standard_normal((4000, 1)) * 50 + g.standard_normal((4000, 5))
    assert round_spread(rounds) == pytest.approx(1, rel=0.03)
    assert round_spread(rounds[:, :1]) == 0


def test_process_medians_are_of_the_rounds():
    assert process_medians([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]]).tolist() == [2.0, 5.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.0, np.nan]], "1 of 2 that are not"),
        ([[0.0, -np.inf], [np.inf, 0.0]], "2 of 4 that are not"),
        ([0.0], r"expected \[pairs, rounds\], none of them 0, found \[1\]"),
        (np.zeros((0, 5)), r"found \[0, 5\]"),
        ([["fast"]], "expected an array of numbers"),
        ([[1.0], [1.0, 2.0]], "expected an array of numbers"),
    ],
)
def test_what_is_no_sample_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as refused:
        process_medians(values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("n", "alpha"), [(0, 0.01), (257, 0.01), (8, 0.0), (8, 0.5), (8, math.nan)]
)
def test_levels_that_are_none_are_refused(n, alpha):
    with pytest.raises(ValueError, match=r"expected 1 to 256 values and 0 < alpha < 0\.5"):
        critical_rank(n, alpha)


def test_the_rule_is_imported_without_scipy_and_torch():
    code = "import sys, conformance.gate.decide; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"scipy", "torch", "matplotlib"} & set(done.stdout.split()), done.stderr
