"""The requirements of the contract ``shared_core_fit``: experts become a core between wrappers.

Factors are not unique, so that nothing is asked of them but what they reconstruct, in float64.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.fit_cases import LAYOUTS, fit_cases
from conformance.harness.fit_checks import (
    assert_best_of_history,
    assert_detached,
    assert_dtypes,
    assert_equal_experts,
    assert_global_state,
    assert_history,
    assert_in_range,
    assert_mean,
    assert_never_worse,
    assert_no_memory,
    assert_other_seed,
    assert_random_v,
    assert_rank_counts,
    assert_recovers,
    assert_refused,
    assert_same_seed,
)
from conformance.harness.requirement import requirement

ZERO_SHOT = "LawrenceRLiu/MoE_Factorize_Compress, src/zero_shot_init.py"
SPECIFICATION = "LawrenceRLiu/MoE_Factorize_Compress, ResearchSpec"

FEW = st.integers(1, 12)
ANY_SIZE = st.sampled_from([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 30.0, 1e3])
ANY_LAYOUT = st.sampled_from([*LAYOUTS])
NARROW = st.sampled_from(["bfloat16", "float16"])
ANY = fit_cases(steps=FEW)
STARTS = fit_cases(layout=ANY_LAYOUT, dtype=st.sampled_from(["float32", "float32", "bfloat16"]))
WIDE_STARTS = fit_cases(d_out=st.integers(30, 45), d_in=st.integers(50, 60))
PLANTED = fit_cases(kind="planted", steps=300, lr=5e-2, experts=4, rank=1, d_out=8, d_in=6)

# The beginning


@requirement("shared_core_fit.start.mean", source=ZERO_SHOT, smoke=True)
@given(case=STARTS)
def test_no_steps_give_the_mean(shared_core_fit, case):
    """Without a step every expert is reconstructed as the mean of all."""
    assert_mean(shared_core_fit, case)


@requirement("shared_core_fit.start.one-expert", source=ZERO_SHOT, confusable={"one expert"})
@given(case=fit_cases(experts=1, rank=st.integers(2, 4)))
def test_one_expert_is_its_mean(shared_core_fit, case):
    """A single expert is its own mean, and is reconstructed from the first."""
    assert_mean(shared_core_fit, case)


@requirement("shared_core_fit.start.random-v", source=ZERO_SHOT, level="extended")
@given(case=WIDE_STARTS)
def test_wrappers_begin_as_identity(shared_core_fit, case):
    """U begins as zero, V at random with a variance of 1 / rank, other numbers for every expert."""
    assert_random_v(shared_core_fit, case)


# How good it is


@requirement("shared_core_fit.loss.never-worse-than-mean", source=ZERO_SHOT, smoke=True)
@given(case=fit_cases(steps=st.integers(1, 60), lr=ANY_SIZE))
def test_never_worse_than_the_mean(shared_core_fit, case):
    """Whatever the step size, what is returned is as close to the experts as their mean is."""
    assert_never_worse(shared_core_fit, case)


@requirement("shared_core_fit.loss.few-steps", source=ZERO_SHOT)
@given(case=fit_cases(steps=st.integers(1, 4), lr=ANY_SIZE, kind="near"))
def test_few_steps_do_no_harm(shared_core_fit, case):
    """Experts that hardly differ are not made worse by a step or two."""
    assert_never_worse(shared_core_fit, case)


@requirement("shared_core_fit.loss.equal-experts", source=SPECIFICATION)
@given(case=fit_cases(kind="equal", steps=st.integers(0, 40), lr=ANY_SIZE))
def test_equal_experts_stay_exact(shared_core_fit, case):
    """Experts that are all equal are the core, and steps do not move away from it."""
    assert_equal_experts(shared_core_fit, case)


@requirement("shared_core_fit.loss.planted", source=SPECIFICATION)
@given(case=PLANTED)
def test_planted_factors_are_recovered(shared_core_fit, case):
    """Experts that are a core between wrappers of this rank are approached far beyond their mean."""
    assert_recovers(shared_core_fit, case, share=0.3)


@requirement("shared_core_fit.loss.steps-help", source=ZERO_SHOT)
@given(case=fit_cases(kind="planted", steps=60, lr=3e-2))
def test_steps_reduce_the_error(shared_core_fit, case):
    """Sixty steps take away a good part of the mean's error."""
    assert_recovers(shared_core_fit, case, share=0.8)


@requirement("shared_core_fit.loss.rank-counts", source=SPECIFICATION)
@given(case=fit_cases(steps=60, lr=3e-2))
def test_rank_is_used(shared_core_fit, case):
    """Wrappers of full rank fit random experts better than those of rank 1."""
    assert_rank_counts(shared_core_fit, case)


# History


@requirement("shared_core_fit.history.begins-with-mean", source=ZERO_SHOT)
@given(case=ANY)
def test_history_begins_with_the_mean(shared_core_fit, case):
    """A loss before each step and at the end; the first is the mean's, summed over all elements."""
    assert_history(shared_core_fit, case)


@requirement("shared_core_fit.history.best-is-returned", source=ZERO_SHOT)
@given(case=fit_cases(steps=st.integers(20, 60), lr=st.sampled_from([3e-2, 1e-1, 0.2, 0.5])))
def test_best_step_is_returned(shared_core_fit, case):
    """The smallest loss of the history is that of the factors that are returned."""
    assert_best_of_history(shared_core_fit, case)


# Random numbers


@requirement("shared_core_fit.seed.same", source=ZERO_SHOT)
@given(case=ANY)
def test_same_seed_same_factors(shared_core_fit, case):
    """The seed alone decides: neither the global random state nor an earlier fit matters."""
    assert_same_seed(shared_core_fit, case)


@requirement("shared_core_fit.seed.no-memory", source=ZERO_SHOT)
@given(case=ANY)
def test_other_experts_are_fitted_anew(shared_core_fit, case):
    """Other experts of the same shapes are fitted anew, whatever was fitted before."""
    assert_no_memory(shared_core_fit, case)


@requirement("shared_core_fit.seed.other", source=ZERO_SHOT)
@given(case=ANY)
def test_other_seed_other_wrappers(shared_core_fit, case):
    """Another seed gives other wrappers."""
    assert_other_seed(shared_core_fit, case)


@requirement("shared_core_fit.seed.global-state", source=ZERO_SHOT)
@given(case=ANY)
def test_global_random_state_is_left_alone(shared_core_fit, case):
    """The global random state and the recording of gradients are afterwards what they were."""
    assert_global_state(shared_core_fit, case)


# Tensors


@requirement("shared_core_fit.output.float32", source=ZERO_SHOT)
@given(case=fit_cases(steps=FEW, dtype=NARROW))
def test_sixteen_bits_are_fitted_in_float32(shared_core_fit, case):
    """Experts in 16 bits are fitted as the same numbers in float32 are, in float32."""
    assert_dtypes(shared_core_fit, case)


@requirement("shared_core_fit.output.float64", source=ZERO_SHOT)
@given(case=fit_cases(steps=FEW, dtype="float64"))
def test_float64_gives_float32(shared_core_fit, case):
    """Factors of experts in float64 are in float32."""
    assert_in_range(shared_core_fit, case)


@requirement("shared_core_fit.output.square", source=SPECIFICATION, confusable={"d_in = d_out"})
@given(case=st.integers(5, 12).flatmap(lambda d: fit_cases(d_in=d, d_out=d, steps=30)))
def test_square_experts(shared_core_fit, case):
    """Square experts are fitted as others are, each factor on its own side."""
    assert_recovers(shared_core_fit, case, share=0.97)


@requirement("shared_core_fit.output.full-rank", source=SPECIFICATION)
@given(
    case=st.sampled_from([(7, 10), (11, 6)]).flatmap(
        lambda s: fit_cases(d_out=s[0], d_in=s[1], rank=min(s), steps=40, layout=ANY_LAYOUT)
    )
)
def test_rank_up_to_the_smaller_width(shared_core_fit, case):
    """The rank may be the smaller width."""
    assert_in_range(shared_core_fit, case)


@requirement("shared_core_fit.output.detached", source=ZERO_SHOT, confusable={"one expert"})
@given(case=fit_cases(steps=st.integers(0, 3), experts=st.integers(1, 5)))
def test_factors_are_plain_tensors(shared_core_fit, case):
    """Factors record no gradients and share no memory with the experts."""
    assert_detached(shared_core_fit, case)


# What cannot be fitted


@requirement("shared_core_fit.refuses.no-experts", source=ZERO_SHOT)
@given(case=ANY)
def test_no_experts_are_refused(shared_core_fit, case):
    """No experts are an error."""
    assert_refused(shared_core_fit, case, "experts = experts[:0]")


@requirement("shared_core_fit.refuses.not-finite", source=ZERO_SHOT)
@given(case=ANY)
def test_not_finite_is_refused(shared_core_fit, case):
    """One NaN or infinity among the experts is an error."""
    value = ("nan", "inf", "-inf")[case.seed % 3]
    assert_refused(shared_core_fit, case, f"experts[-1, 1, 2] = float('{value}')")


@requirement("shared_core_fit.refuses.rank", source=ZERO_SHOT)
@given(case=ANY)
def test_impossible_rank_is_refused(shared_core_fit, case):
    """A rank of 0, below it, or above the smaller width is an error."""
    for rank in ("0", "-1", str(min(case.d_in, case.d_out) + 1)):
        assert_refused(shared_core_fit, case, rank=rank)


@requirement("shared_core_fit.refuses.negative-steps", source=ZERO_SHOT)
@given(case=ANY)
def test_negative_steps_are_refused(shared_core_fit, case):
    """A negative number of steps is an error."""
    assert_refused(shared_core_fit, case, num_steps=f"-{case.steps}")


@requirement("shared_core_fit.refuses.one-matrix", source=ZERO_SHOT)
@given(case=ANY)
def test_one_matrix_is_refused(shared_core_fit, case):
    """A matrix that is not in a stack is an error: its rows are not experts."""
    assert_refused(shared_core_fit, case, "experts = experts[0]")
