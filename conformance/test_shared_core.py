"""The requirements of the contract ``shared_core``: experts as one core between low-rank wrappers.

The oracle multiplies every weight out in float64.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.core_cases import DTYPES, SQUARE, ExampleCase, core_cases
from conformance.harness.core_checks import (
    assert_both,
    assert_core_alone,
    assert_example,
    assert_expert_refused,
    assert_fold,
    assert_fold_changes_nothing,
    assert_fold_is_fresh,
    assert_fold_twice,
    assert_in_float64,
    assert_low_rank,
    assert_no_rows,
    assert_only_products_count,
    assert_outputs,
    assert_refused,
    assert_small_updates_folded,
    assert_small_updates_kept,
    assert_twice,
    assert_weights,
)
from conformance.harness.core_state_checks import (
    assert_core_is_a_parameter,
    assert_counts,
    assert_edited,
    assert_gradients,
    assert_gradients_of_weights,
    assert_one_core,
    assert_own_values,
    assert_state_once,
    assert_state_restored,
    assert_total_is_what_is_stored,
    assert_unused_experts_get_nothing,
)
from conformance.harness.requirement import requirement

FORM = "LawrenceRLiu/MoE_Factorize_Compress, src/shared_core.py; its ResearchSpec, section 2"
STATE = "LawrenceRLiu/MoE_Factorize_Compress, src/shared_core.py (cores in buffers, mended later)"
COUNTS = "LawrenceRLiu/MoE_Factorize_Compress, src/shared_core.py, count_parameters"
ALGEBRA = "linear algebra: (I + U Vᵀ) C (I + U' V'ᵀ) multiplied out"
BFLOAT16 = (
    "LawrenceRLiu/MoE_Factorize_Compress, src/model_utils.py (weights materialised in bfloat16)"
)

ANY = core_cases(dtype=DTYPES)
SIMPLE = core_cases()
BIASED = core_cases(dtype=DTYPES, bias=True)
SMALL = core_cases(
    st.sampled_from([(32, 40), (48, 36)]), dtype=st.sampled_from(["bfloat16", "float16"])
)
LARGE_RANK = core_cases(st.sampled_from([(5, 7), (9, 6)]), rank=st.sampled_from([3, 4]))
"""Wrappers that have more parameters than they save."""


# Values


@requirement("shared_core.example.worked-by-hand", source=FORM, smoke=True)
@given(case=st.builds(ExampleCase, seed=st.integers(0, 1)))
def test_an_example_worked_by_hand_is_exact(shared_core, case):
    """Two experts of small integers have exactly the weights and outputs worked out by hand."""
    assert_example(shared_core, case)


@requirement("shared_core.forward.values", source=FORM, smoke=True)
@given(case=ANY)
def test_output_is_that_of_the_dense_weight(shared_core, case):
    """Rows through an expert are x Wᵀ with W = (I + U_out V_outᵀ) C (I + U_in V_inᵀ)."""
    assert_outputs(shared_core, case)


@requirement("shared_core.forward.square", source=FORM, confusable={"d_in = d_out"})
@given(case=core_cases(SQUARE, dtype=DTYPES))
def test_output_of_square_cores(shared_core, case):
    """With d_in = d_out, where no shape tells wrappers apart, each is on its own side of the core."""
    assert_outputs(shared_core, case)


@requirement("shared_core.forward.bias", source=FORM)
@given(case=BIASED)
def test_bias_of_the_expert_is_added(shared_core, case):
    """Each expert's bias is added to its output, behind the wrapper."""
    assert_outputs(shared_core, case)


@requirement("shared_core.forward.leading-axes", source=FORM)
@given(case=core_cases(leading=st.sampled_from([(), (2, 5), (3, 1, 4), (1,)]), bias=st.booleans()))
def test_rows_may_have_any_leading_axes(shared_core, case):
    """x is one row, or rows with any axes before the last, which the output has as well."""
    assert_outputs(shared_core, case)


@requirement("shared_core.forward.no-rows", source=FORM)
@given(case=core_cases(leading=st.sampled_from([(0,), (2, 0), (0, 3)]), bias=st.booleans()))
def test_no_rows_give_no_rows(shared_core, case):
    """Without rows the output has none, and its width is d_out: an expert may get no token."""
    assert_no_rows(shared_core, case)


@requirement("shared_core.forward.one-expert", source=FORM, confusable={"one expert"})
@given(case=core_cases(experts=1, rank=st.sampled_from([2, 3]), dtype=DTYPES))
def test_one_expert_is_a_layer_like_others(shared_core, case):
    """A layer of one expert computes the same formula."""
    assert_outputs(shared_core, case)


@requirement("shared_core.forward.same-twice", source=FORM)
@given(case=SIMPLE)
def test_an_expert_asked_again_gives_the_same_bits(shared_core, case):
    """Outputs and weights of an expert do not depend on which experts were asked before."""
    assert_twice(shared_core, case)


@requirement("shared_core.forward.float64", source=FORM)
@given(case=core_cases(bias=st.booleans()))
def test_float64_is_computed_in_float64(shared_core, case):
    """Outputs and weights of a layer in float64 are as exact as float64 is."""
    assert_in_float64(shared_core, case)


@requirement("shared_core.reconstruct.values", source=FORM)
@given(case=ANY)
def test_weight_is_the_product(shared_core, case):
    """The weight [d_out, d_in] of every expert is (I + U_out V_outᵀ) C (I + U_in V_inᵀ)."""
    assert_weights(shared_core, case)


@requirement("shared_core.reconstruct.square", source=FORM, confusable={"d_in = d_out"})
@given(case=core_cases(SQUARE, dtype=DTYPES))
def test_weight_of_square_cores(shared_core, case):
    """With d_in = d_out the weight is neither transposed nor are its wrappers exchanged."""
    assert_weights(shared_core, case)


@requirement("shared_core.reconstruct.core-if-u-is-zero", source=FORM)
@given(case=ANY)
def test_weight_is_the_core_if_u_is_zero(shared_core, case):
    """With U = 0 every weight is the core bit for bit, whatever V is."""
    assert_core_alone(shared_core, case)


@requirement("shared_core.reconstruct.rank-of-the-update", source=ALGEBRA)
@given(case=core_cases(rank=st.sampled_from([1, 2]), experts=st.sampled_from([3, 5])))
def test_update_has_twice_the_rank_of_a_wrapper(shared_core, case):
    """W − C has at most 2 · rank singular values that are not rounding."""
    assert_low_rank(shared_core, case)


@requirement("shared_core.reconstruct.without-bias", source=FORM)
@given(case=core_cases(bias=True))
def test_weight_is_without_the_bias(shared_core, case):
    """A bias changes no weight."""
    assert_weights(shared_core, case)


@requirement("shared_core.wrappers.only-products-count", source=ALGEBRA)
@given(case=core_cases(experts=5, rank=st.sampled_from([2, 3])))
def test_factors_of_the_same_products_are_the_same_layer(shared_core, case):
    """U A and V A⁻ᵀ have the same product as U and V, and give the same outputs and weights."""
    assert_only_products_count(shared_core, case)


@requirement("shared_core.wrappers.weak", source=FORM)
@given(case=core_cases(strength=st.sampled_from([0.02, 0.05]), dtype=DTYPES))
def test_weak_wrappers_change_little(shared_core, case):
    """Wrappers near the identity change the core by just what they add."""
    assert_outputs(shared_core, case)


@requirement("shared_core.wrappers.one-side", source=FORM)
@given(case=SIMPLE)
def test_one_wrapper_alone_is_on_its_side(shared_core, case):
    """With U = 0 on one side the other wrapper is applied, on its own side of the core."""
    assert_both(shared_core, case, "u_out = torch.zeros_like(u_out)")
    assert_both(shared_core, case, "u_in = torch.zeros_like(u_in)")


# Low precision


@requirement("shared_core.precision.small-updates-of-weights", source=BFLOAT16)
@given(case=SMALL)
def test_updates_below_the_rounding_of_one_are_in_weights(shared_core, case):
    """The identity is not formed in 16 bits: updates that these drop beside 1 are in the weight."""
    assert_small_updates_kept(shared_core, case)


@requirement("shared_core.precision.small-updates-of-folds", source=BFLOAT16)
@given(case=SMALL)
def test_updates_below_the_rounding_of_the_core_are_in_folds(shared_core, case):
    """A_e B_e is the update to the precision of the dtype, however small it is beside the core."""
    assert_small_updates_folded(shared_core, case)


# One core


@requirement("shared_core.core.is-a-parameter", source=STATE)
@given(case=ANY)
def test_core_is_a_parameter_with_the_values_given(shared_core, case):
    """``core`` is one of the module's Parameters, with the dtype and the bits that were given."""
    assert_core_is_a_parameter(shared_core, case)


@requirement("shared_core.core.stored-once", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_core_is_stored_once(shared_core, case):
    """The module holds the core once and each wrapper once, and nothing beside them."""
    assert_one_core(shared_core, case)


@requirement("shared_core.core.stored-once-after-to", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_core_is_stored_once_after_moving(shared_core, case):
    """``.to`` with another dtype, ``.half`` and back leave one core, not one an expert."""
    moves = ("after .to(torch.float64)", "after .to(torch.bfloat16)", "after .half().float()")
    assert_one_core(shared_core, case, *moves)


@requirement("shared_core.core.stored-once-in-copies", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_core_is_stored_once_in_copies(shared_core, case):
    """A deep copy of the module has one core."""
    assert_one_core(shared_core, case, "after copy.deepcopy")


@requirement("shared_core.core.edit-reaches-every-expert", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_editing_the_core_changes_every_expert(shared_core, case):
    """A core that is changed in place is the core of every expert, in outputs and weights."""
    assert_edited(shared_core, case)


@requirement("shared_core.core.edit-after-to", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_editing_the_core_after_moving_changes_every_expert(shared_core, case):
    """After ``.to`` and after copying, the Parameter ``core`` still is the core of every expert."""
    assert_edited(shared_core, case, "after .to(torch.float64)", "after copy.deepcopy")


@requirement("shared_core.core.own-values", source=FORM)
@given(case=core_cases(bias=st.booleans()))
def test_layer_has_values_of_its_own(shared_core, case):
    """What becomes of the tensors that were given does not change the layer."""
    assert_own_values(shared_core, case)


@requirement("shared_core.state.core-once", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_state_has_the_core_once(shared_core, case):
    """The state dictionary has every parameter, the core once, and nothing beside them."""
    assert_state_once(shared_core, case)


@requirement("shared_core.state.restored", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_state_that_is_loaded_gives_the_same_bits(shared_core, case):
    """A layer of other values that loads the state gives the outputs of the one that saved it."""
    assert_state_restored(shared_core, case, safetensors=False)


@requirement("shared_core.state.safetensors", source=STATE)
@given(case=core_cases(bias=st.booleans()))
def test_state_can_be_saved_by_safetensors(shared_core, case):
    """safetensors, which refuses tensors that share memory, saves the state and gives it back."""
    assert_state_restored(shared_core, case, safetensors=True)


# Gradients


@requirement("shared_core.gradient.core", source=FORM)
@given(case=ANY)
def test_core_gets_its_gradient_from_every_expert(shared_core, case):
    """The gradient of the core is the sum over the experts that were called."""
    assert_gradients(shared_core, case, of=("core",))


@requirement("shared_core.gradient.input", source=FORM)
@given(case=ANY)
def test_input_gets_its_gradient(shared_core, case):
    """The gradient of x is that of the dense weights."""
    assert_gradients(shared_core, case, of=("x",))


@requirement("shared_core.gradient.wrappers", source=FORM)
@given(case=SIMPLE)
def test_wrappers_get_their_gradients(shared_core, case):
    """Both factors of both wrappers have gradients, each expert's its own."""
    assert_gradients(shared_core, case, of=("u_in", "v_in", "u_out", "v_out"))


@requirement("shared_core.gradient.bias", source=FORM)
@given(case=core_cases(bias=True))
def test_biases_get_their_gradients(shared_core, case):
    """Each expert's bias has the gradient of its own rows."""
    assert_gradients(shared_core, case, of=("bias",))


@requirement("shared_core.gradient.experts-used-alone", source=FORM)
@given(case=core_cases(bias=st.booleans()))
def test_experts_that_are_not_used_get_no_gradient(shared_core, case):
    """Wrappers and bias of an expert that was not called have no gradient, or exact zeros."""
    assert_unused_experts_get_nothing(shared_core, case)


@requirement("shared_core.gradient.some-experts", source=FORM)
@given(case=core_cases(experts=st.sampled_from([5, 7])))
def test_core_gets_its_gradient_from_the_experts_used(shared_core, case):
    """After two experts were called the gradients are those of these two."""
    factors = ("core", "u_in", "v_in", "u_out", "v_out")
    assert_gradients(shared_core, case, of=factors, experts=(3, 1))


@requirement("shared_core.gradient.through-reconstruct", source=FORM)
@given(case=SIMPLE)
def test_weights_are_differentiable(shared_core, case):
    """Gradients reach the core and every factor through ``reconstruct``."""
    assert_gradients_of_weights(shared_core, case)


# Folds


@requirement("shared_core.fold.values", source=ALGEBRA)
@given(case=ANY)
def test_fold_gives_the_weights(shared_core, case):
    """base + A_e B_e is the weight of every expert."""
    assert_fold(shared_core, case)


@requirement("shared_core.fold.axes", source=ALGEBRA)
@given(case=core_cases(experts=st.sampled_from([5, 7]), rank=st.sampled_from([2, 3])))
def test_fold_has_expert_and_rank_on_their_own_axes(shared_core, case):
    """Each expert has columns of A [experts, d_out, 2 · rank] and rows of B that are its own."""
    assert_fold(shared_core, case)


@requirement("shared_core.fold.square", source=ALGEBRA, confusable={"d_in = d_out"})
@given(case=core_cases(SQUARE, dtype=DTYPES))
def test_fold_of_square_cores(shared_core, case):
    """With d_in = d_out A still is on the side of the output."""
    assert_fold(shared_core, case)


@requirement("shared_core.fold.twice", source=ALGEBRA)
@given(case=SIMPLE)
def test_folding_twice_is_folding_once(shared_core, case):
    """A second fold gives the same bits: nothing is added twice, or missing."""
    assert_fold_twice(shared_core, case)


@requirement("shared_core.fold.changes-nothing", source=ALGEBRA)
@given(case=core_cases(bias=st.booleans()))
def test_folding_leaves_the_layer_as_it_was(shared_core, case):
    """State, outputs and weights have the same bits after folding as before."""
    assert_fold_changes_nothing(shared_core, case)


@requirement("shared_core.fold.after-an-edit", source=ALGEBRA)
@given(case=SIMPLE)
def test_folding_after_an_edit_folds_the_new_core(shared_core, case):
    """A core that was changed since the last fold is the one that is folded."""
    assert_fold_is_fresh(shared_core, case)


# Counts


@requirement("shared_core.count.core-and-wrappers", source=COUNTS)
@given(case=SIMPLE)
def test_core_and_wrappers_are_counted(shared_core, case):
    """The core has d_in · d_out parameters, wrappers of an expert 2 · rank · (d_in + d_out)."""
    assert_counts(shared_core, case, "core", "wrapper_params_per_expert", "total_wrapper")


@requirement("shared_core.count.total", source=COUNTS)
@given(case=SIMPLE)
def test_total_has_the_core_once(shared_core, case):
    """The total is the core once and every expert's wrappers."""
    assert_counts(shared_core, case, "total")


@requirement("shared_core.count.original", source=COUNTS)
@given(case=SIMPLE)
def test_original_is_that_of_dense_experts(shared_core, case):
    """The original is a matrix an expert."""
    assert_counts(shared_core, case, "original")


@requirement("shared_core.count.bias", source=COUNTS)
@given(case=core_cases(bias=True))
def test_biases_are_counted_on_both_sides(shared_core, case):
    """A bias is a parameter of its expert, compressed or not, and none of the core's."""
    assert_counts(
        shared_core, case, "core", "wrapper_params_per_expert", "total_wrapper", "total", "original"
    )


@requirement("shared_core.count.ratio", source=COUNTS)
@given(case=core_cases(bias=st.booleans()))
def test_ratio_is_of_total_and_original(shared_core, case):
    """The ratio is total / original, unrounded, and the reduction 100 · (1 − ratio) percent."""
    assert_counts(shared_core, case, "compression_ratio", "reduction_percentage")


@requirement("shared_core.count.ratio-above-one", source=COUNTS)
@given(case=LARGE_RANK)
def test_ratio_may_exceed_one(shared_core, case):
    """Wrappers larger than what they save make a ratio above 1 and a negative reduction."""
    assert_counts(shared_core, case, "compression_ratio", "reduction_percentage")


@requirement("shared_core.count.one-expert", source=COUNTS, confusable={"one expert"})
@given(case=core_cases(experts=1, rank=st.sampled_from([2, 3])))
def test_one_expert_is_enlarged(shared_core, case):
    """Of a single expert the ratio is 1 + wrappers / (d_in · d_out)."""
    assert_counts(shared_core, case, "total", "compression_ratio", "reduction_percentage")


@requirement("shared_core.count.what-is-stored", source=COUNTS)
@given(case=core_cases(bias=st.booleans()))
def test_total_is_what_the_module_holds(shared_core, case):
    """The total is the number of elements that the module holds in memory."""
    assert_total_is_what_is_stored(shared_core, case)


# Refusals


@requirement("shared_core.refuses.expert-beyond-the-last", source=FORM)
@given(case=SIMPLE)
def test_an_expert_beyond_the_last_is_refused(shared_core, case):
    """Asking for the output or the weight of expert E, of E experts, raises an exception."""
    assert_expert_refused(shared_core, case, case.experts)


@requirement("shared_core.refuses.negative-expert", source=FORM)
@given(case=SIMPLE)
def test_a_negative_expert_is_refused(shared_core, case):
    """Expert −1 is none: it is not the last one, and asking for it raises an exception."""
    assert_expert_refused(shared_core, case, -1)


@requirement("shared_core.refuses.swapped-sides", source=FORM)
@given(case=SIMPLE)
def test_wrappers_of_the_other_side_are_refused(shared_core, case):
    """Wrappers for the input with as many rows as the output has, and the reverse, are refused."""
    assert_refused(shared_core, case, "u_in, v_in, u_out, v_out = u_out, v_out, u_in, v_in")
    assert_refused(shared_core, case, "u_in, u_out = u_out, u_in")


@requirement("shared_core.refuses.transposed-core", source=FORM)
@given(case=SIMPLE)
def test_a_transposed_core_is_refused(shared_core, case):
    """A core [d_in, d_out] does not fit wrappers of a core [d_out, d_in]."""
    assert_refused(shared_core, case, "core = core.mT.contiguous()")


@requirement("shared_core.refuses.other-number-of-experts", source=FORM)
@given(case=core_cases(experts=st.sampled_from([4, 5])))
def test_factors_of_other_numbers_of_experts_are_refused(shared_core, case):
    """A factor with one expert less, or with one that stands for all, is refused."""
    for name in ("v_in", "u_out", "v_out"):
        assert_refused(shared_core, case, f"{name} = {name}[1:]")
        assert_refused(shared_core, case, f"{name} = {name}[:1]")


@requirement("shared_core.refuses.other-rank", source=FORM)
@given(case=core_cases(experts=5, rank=st.sampled_from([2, 3])))
def test_u_and_v_of_different_ranks_are_refused(shared_core, case):
    """U and V of a wrapper with different ranks are refused."""
    for name in ("v_in", "v_out"):
        assert_refused(shared_core, case, f"{name} = {name}[..., 1:]")
        assert_refused(shared_core, case, f"{name} = {name}[..., :1].contiguous()")


@requirement("shared_core.refuses.bias-of-another-shape", source=FORM)
@given(case=core_cases(bias=True))
def test_a_bias_of_another_shape_is_refused(shared_core, case):
    """One bias for all experts, or one element an expert, is refused: neither is broadcast."""
    for edit in ("bias = bias[0]", "bias = bias[:, :1]", "bias = bias[:1]"):
        assert_refused(shared_core, case, edit)
