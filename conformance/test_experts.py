"""The requirements of the contract ``experts``: tokens that are routed, and what experts make of them.

The oracle runs every expert on every token and takes what was chosen. Rules about which element goes
where are checked bit by bit, with integers; rules about numbers within what rounding does.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.experts_cases import (
    EVERY_EXPERT,
    HALF_PAIRS,
    ODD_PAIRS,
    SQUARE_PAIRS,
    experts_cases,
    integer_cases,
)
from conformance.harness.experts_checks import (
    assert_connected,
    assert_each_gradient,
    assert_equal_experts,
    assert_exact,
    assert_exact_gradients,
    assert_expert_of_each_token,
    assert_gradients,
    assert_matches_oracle,
    assert_output_of_every_dtype,
    assert_own_memory,
    assert_permuted,
    assert_refused,
    assert_scaled,
    assert_split,
    assert_two_runs,
)
from conformance.harness.gpu_large import LargeCase, assert_large_tokens
from conformance.harness.requirement import requirement

GLU = "GLU variants (arXiv 2002.05202)"
MIXTRAL = "Mixtral (arXiv 2401.04088)"
MOE = "transformers, integrations/moe.py"
GPT_OSS = "openai/gpt-oss, gpt_oss/torch/model.py"
LLAMA4 = "transformers, models/llama4/modeling_llama4.py"

LAYOUTS = st.sampled_from(["interleaved", "concatenated"])
EITHER = st.booleans()
SEVERAL = st.sampled_from([2, 3])
SOME_SENTINELS = st.sampled_from(["slots", "both"])
ANY_ROUTING = st.sampled_from(["distinct", "any", "repeated", "few"])
SIXTEEN = st.sampled_from(["bfloat16", "float16"])
NORMAL = st.sampled_from(["float32", "bfloat16"])
"""In float16 small outputs are subnormal, and four times as many bits of them are kept."""

EVERY = experts_cases()
INTEGERS = integer_cases()
SENTINELS = integer_cases(sentinels=SOME_SENTINELS, slots=SEVERAL)
WHOLE_TOKENS = integer_cases(sentinels="tokens")
REFUSED = integer_cases(slots=SEVERAL)


# What is computed


@requirement("experts.forward.values", source=MIXTRAL, smoke=True)
@given(case=EVERY)
def test_output_is_the_weighted_sum_of_experts(experts, case):
    """A token's output is Σ weight · down(silu(gate x) ⊙ up x) over its slots."""
    assert_matches_oracle(experts, case)


@requirement("experts.forward.bits", source=MIXTRAL, smoke=True)
@given(case=INTEGERS)
def test_integers_give_exact_outputs(experts, case):
    """Where every product and sum is an integer that float32 holds, the output is exact."""
    assert_exact(experts, case)


@requirement("experts.activation.on-the-gate", source=GLU)
@given(case=experts_cases(gate_scale=st.sampled_from([8.0, 0.25])))
def test_activation_is_of_the_gate_and_not_of_up(experts, case):
    """The activation is applied to the gate's projection, and up is multiplied as it is."""
    assert_matches_oracle(experts, case)


@requirement("experts.activation.saturated", source=GLU)
@given(case=experts_cases(gate_scale=st.sampled_from([150.0, 600.0])))
def test_large_gates_give_finite_outputs(experts, case):
    """Where the gate is some hundreds, SiLU is 0 or the gate itself, and never NaN."""
    assert_matches_oracle(experts, case)


@requirement("experts.activation.gelu", source=GLU, level="extended")
@given(case=experts_cases(activation="gelu"))
def test_gelu_is_exact(experts, case):
    """``"gelu"`` is x Φ(x), with the error function."""
    assert_matches_oracle(experts, case)


@requirement("experts.activation.gelu-tanh", source=GLU, level="extended")
@given(case=experts_cases(activation="gelu_tanh"))
def test_gelu_tanh_is_the_approximation(experts, case):
    """``"gelu_tanh"`` is the approximation of GELU by the hyperbolic tangent."""
    assert_matches_oracle(experts, case)


@requirement("experts.activation.relu", source=GLU, level="extended")
@given(case=experts_cases(activation="relu"))
def test_relu_is_zero_below_zero(experts, case):
    """``"relu"`` is max(x, 0)."""
    assert_matches_oracle(experts, case)


# How the weights lie


@requirement("experts.layout.concatenated", source=MOE)
@given(case=integer_cases(transposed=False))
def test_concatenated_rows_are_the_gate_and_then_up(experts, case):
    """In the layout ``"concatenated"`` the first half of the rows is the gate, the second is up."""
    assert_exact(experts, case)


@requirement("experts.layout.interleaved", source=GPT_OSS, level="extended")
@given(case=integer_cases(layout="interleaved", transposed=EITHER))
def test_interleaved_rows_are_gate_and_up_in_turn(experts, case):
    """In the layout ``"interleaved"`` the rows are g₀, u₀, g₁, u₁ and so on, in pairs."""
    assert_exact(experts, case)


@requirement("experts.layout.transposed", source=GPT_OSS, level="extended")
@given(case=integer_cases(transposed=True, layout=LAYOUTS))
def test_transposed_weights_have_their_last_axes_exchanged(experts, case):
    """With ``transposed`` weights are [experts, in, out], whichever layout the outputs have."""
    assert_exact(experts, case)


@requirement(
    "experts.layout.half-square", source=MOE, confusable={"2 intermediate = hidden", "one slot"}
)
@given(case=integer_cases(HALF_PAIRS))
def test_layout_is_not_guessed_where_gate_and_up_are_square(experts, case):
    """Where 2 · intermediate = hidden, ``gate_up_proj`` is [experts, out, in] all the same."""
    assert_exact(experts, case)


@requirement("experts.layout.square", source=MOE, confusable={"intermediate = hidden", "one slot"})
@given(case=integer_cases(SQUARE_PAIRS))
def test_layout_is_not_guessed_where_down_is_square(experts, case):
    """Where intermediate = hidden, ``down_proj`` is [experts, out, in] all the same."""
    assert_exact(experts, case)


@requirement(
    "experts.layout.half-square-transposed",
    source=GPT_OSS,
    level="extended",
    confusable={"2 intermediate = hidden", "one slot"},
)
@given(case=integer_cases(HALF_PAIRS, transposed=True, layout=LAYOUTS))
def test_transposed_is_obeyed_where_gate_and_up_are_square(experts, case):
    """Where 2 · intermediate = hidden, ``transposed`` alone tells that the axes are exchanged."""
    assert_exact(experts, case)


@requirement(
    "experts.layout.square-transposed",
    source=GPT_OSS,
    level="extended",
    confusable={"intermediate = hidden", "one slot"},
)
@given(case=integer_cases(SQUARE_PAIRS, transposed=True, layout=LAYOUTS))
def test_transposed_is_obeyed_where_down_is_square(experts, case):
    """Where intermediate = hidden, ``transposed`` alone tells that the axes are exchanged."""
    assert_exact(experts, case)


@requirement("experts.layout.any-width", source=MOE)
@given(case=experts_cases(ODD_PAIRS))
def test_widths_need_not_be_multiples_of_anything(experts, case):
    """Hidden and intermediate sizes that no vector unit divides are computed like others."""
    assert_matches_oracle(experts, case)


@requirement("experts.layout.any-width-gradients", source=MOE)
@given(case=integer_cases(ODD_PAIRS))
def test_gradients_of_any_width_are_exact(experts, case):
    """So are their gradients."""
    assert_exact_gradients(experts, case)


@requirement("experts.layout.strided", source="torch, strided tensors")
@given(
    case=integer_cases(slots=SEVERAL),
)
def test_tensors_may_have_any_strides(experts, case):
    """Slices of larger tensors and transposed views are read as what they show."""
    assert_exact_gradients(
        experts,
        case,
        "hidden = torch.nn.functional.pad(hidden, (3, 2))[:, 3:-2]",
        "indices, weights = (x.t().contiguous().t() for x in (indices, weights))",
        "gate_up_proj = gate_up_proj.mT.contiguous().mT",
        "down_proj = torch.nn.functional.pad(down_proj, (0, 0, 1, 0, 1, 0))[1:, 1:]",
    )


# Weights of slots


@requirement("experts.weights.on-the-output", source=MIXTRAL)
@given(case=experts_cases(weighting="far from one"))
def test_weights_are_on_the_outputs_of_experts(experts, case):
    """A slot's weight, which may be negative or above 1, multiplies what its expert gives, once."""
    assert_matches_oracle(experts, case)


@requirement("experts.weights.on-the-input", source=LLAMA4, level="extended")
@given(case=experts_cases(weighting="far from one", weight_on_input=True, transposed=EITHER))
def test_weights_are_on_the_inputs_of_experts(experts, case):
    """With ``weight_on_input`` a slot's weight multiplies what its expert is given, and no more."""
    assert_matches_oracle(experts, case)


@requirement("experts.weights.on-the-input-gradients", source=LLAMA4, level="extended")
@given(
    case=integer_cases(weight_on_input=True, routing=ANY_ROUTING, slots=SEVERAL, transposed=EITHER)
)
def test_gradients_pass_through_weights_on_the_input(experts, case):
    """With ``weight_on_input`` the gradients are those of that function."""
    assert_exact_gradients(experts, case)


@requirement("experts.weights.scale", source=MIXTRAL)
@given(case=experts_cases(dtype=NORMAL, slots=st.sampled_from([1, 2])))
def test_four_times_the_weights_give_four_times_the_output(experts, case):
    """The output is linear in the weights: they are neither normalised nor clamped."""
    assert_scaled(experts, case)


@requirement("experts.weights.zero", source=MIXTRAL)
@given(case=integer_cases(weighting="some zero", slots=SEVERAL))
def test_slots_of_weight_zero_have_gradients(experts, case):
    """A weight of zero adds nothing to the output, and has the gradient that any weight has."""
    assert_exact_gradients(experts, case)


@requirement("experts.weights.wide", source="transformers, models/qwen3_moe")
@given(case=experts_cases(wide_weights=True, dtype=SIXTEEN, slots=SEVERAL))
def test_weights_may_be_in_float32(experts, case):
    """With float32 weights beside 16-bit inputs the output has the dtype of ``hidden``."""
    assert_matches_oracle(experts, case)


@requirement("experts.weights.wide-gradients", source="transformers, models/qwen3_moe")
@given(case=experts_cases(wide_weights=True, dtype=SIXTEEN, slots=SEVERAL))
def test_gradients_of_float32_weights_are_in_float32(experts, case):
    """The gradient of float32 weights is in float32, beside gradients in 16 bits."""
    assert_gradients(experts, case)


@requirement("experts.weights.equal-experts", source=MIXTRAL)
@given(case=integer_cases(slots=st.sampled_from([2, 3, 4])))
def test_equal_experts_with_weights_that_sum_to_one_are_one_expert(experts, case):
    """With experts that are all equal and weights that sum to 1, a token has what one expert gives."""
    assert_equal_experts(experts, case)


# Slots


@requirement(
    "experts.slots.one", source="Switch Transformer (arXiv 2101.03961)", confusable={"one slot"}
)
@given(case=integer_cases(slots=1))
def test_one_slot_is_one_expert(experts, case):
    """With one slot a token has what its expert gives, times its weight."""
    assert_exact(experts, case)


@requirement("experts.slots.sum", source=MIXTRAL)
@given(case=integer_cases(slots=st.sampled_from([2, 3, 4]), experts=st.sampled_from([6, 8])))
def test_slots_are_summed(experts, case):
    """With several slots the output is the sum over all of them."""
    assert_exact(experts, case)


@requirement("experts.slots.every-expert", source=MIXTRAL, confusable={"every expert"})
@given(case=integer_cases(slots=EVERY_EXPERT))
def test_slots_may_be_all_experts(experts, case):
    """With as many slots as experts every expert counts."""
    assert_exact_gradients(experts, case)


@requirement("experts.slots.repeated", source="onnx/onnx#3547")
@given(case=integer_cases(slots=SEVERAL, routing="repeated"))
def test_several_slots_of_one_expert_all_count(experts, case):
    """A token that has an expert in several slots gets it in each of them, with each weight."""
    assert_exact(experts, case)


@requirement("experts.slots.repeated-gradients", source="onnx/onnx#3547")
@given(case=integer_cases(slots=SEVERAL, routing="repeated"))
def test_gradients_of_several_slots_of_one_expert_all_count(experts, case):
    """So are the gradients: each slot adds its own."""
    assert_exact_gradients(experts, case)


@requirement("experts.slots.order", source=MIXTRAL)
@given(case=integer_cases(slots=SEVERAL))
def test_order_of_slots_does_not_matter(experts, case):
    """Indices and weights permuted alike give the same output."""
    edits = ("indices, weights = indices[:, order], weights[:, order]",)
    assert_permuted(experts, case, str(case.slots), edits, outputs=False)


@requirement("experts.slots.many", source=MOE, level="extended")
@given(
    case=experts_cases(
        slots=st.sampled_from([128, 192]),
        routing="one a token",
        weighting="even",
        dtype="bfloat16",
    )
)
def test_many_slots_are_summed_in_float32(experts, case):
    """Sums over slots are in float32 at least: in 16 bits, many small terms do not get lost."""
    assert_matches_oracle(experts, case)


# Experts


@requirement(
    "experts.index.tagged",
    source="fixtures/known_bugs/moe.yaml",
    confusable={"one slot", "weights of one"},
)
@given(case=integer_cases(experts=st.sampled_from([12, 20, 128]), slots=1, weighting="one"))
def test_tokens_go_to_the_experts_of_their_indices(experts, case):
    """Index e is the e-th expert, also where there are more than ten."""
    assert_expert_of_each_token(experts, case)


@requirement("experts.index.more-than-ten", source="fixtures/known_bugs/moe.yaml")
@given(case=integer_cases(experts=st.sampled_from([12, 20, 33]), slots=SEVERAL))
def test_more_than_ten_experts_are_in_the_order_of_their_numbers(experts, case):
    """With more than ten experts both projections, and gradients, are those of the index."""
    assert_exact_gradients(experts, case)


@requirement("experts.index.renamed", source=MIXTRAL)
@given(case=integer_cases(experts=st.sampled_from([5, 6, 12])))
def test_renaming_experts_does_not_matter(experts, case):
    """Experts in another order, with indices that follow them, give the same output."""
    edits = (
        "gate_up_proj, down_proj = gate_up_proj[order], down_proj[order]",
        "indices = order.argsort()[indices]",
    )
    assert_permuted(experts, case, str(case.experts), edits, outputs=False)


@requirement(
    "experts.index.one-expert",
    source=MIXTRAL,
    confusable={"one expert", "one slot", "every expert"},
)
@given(case=integer_cases(experts=1, slots=1))
def test_one_expert_is_a_gated_layer(experts, case):
    """With a single expert all tokens go through it."""
    assert_exact_gradients(experts, case)


# Tokens


@requirement("experts.tokens.order", source=MIXTRAL)
@given(case=integer_cases(tokens=st.sampled_from([11, 31])))
def test_order_of_tokens_does_not_matter(experts, case):
    """Tokens in another order give the same outputs in that order."""
    edits = ("hidden, indices, weights = hidden[order], indices[order], weights[order]",)
    assert_permuted(experts, case, str(case.tokens), edits, outputs=True)


@requirement("experts.tokens.split", source=MIXTRAL)
@given(case=integer_cases(tokens=st.sampled_from([11, 31])))
def test_tokens_do_not_depend_on_each_other(experts, case):
    """Tokens in two calls have the outputs that they have in one; none is dropped."""
    assert_split(experts, case)


@requirement("experts.tokens.many", source=MIXTRAL)
@given(case=integer_cases(tokens=st.sampled_from([97, 150, 301]), routing=ANY_ROUTING))
def test_many_tokens_are_put_back_where_they_came_from(experts, case):
    """With hundreds of tokens, in no order of experts, each has its own output."""
    assert_exact_gradients(experts, case)


@requirement("experts.tokens.one", source=MIXTRAL, confusable={"less than two tokens", "one slot"})
@given(case=integer_cases(tokens=1))
def test_one_token_is_computed_like_many(experts, case):
    """A single token keeps its axis, and has the output that it has among others."""
    assert_exact_gradients(experts, case)


@requirement("experts.tokens.none", source=MIXTRAL, confusable={"less than two tokens", "one slot"})
@given(case=integer_cases(tokens=0))
def test_no_tokens_give_no_outputs(experts, case):
    """Without tokens the output is [0, hidden], and the gradients are zero."""
    assert_exact_gradients(experts, case)


@requirement("experts.tokens.nan-stays", source="transformers, models/qwen3_moe", level="extended")
@given(case=integer_cases())
def test_nan_in_one_token_leaves_the_others_alone(experts, case):
    """NaN in a token does not change the output of any other."""
    edit = f"hidden[{case.tokens // 2}] = torch.nan"
    assert_exact(experts, case, edit, rows=f"torch.arange({case.tokens}) != {case.tokens // 2}")


# Experts without tokens


@requirement("experts.empty.gradients", source="tgale96/grouped_gemm#36")
@given(case=integer_cases(experts=st.sampled_from([6, 8]), slots=SEVERAL, routing="few"))
def test_experts_without_tokens_have_gradients_of_zero(experts, case):
    """The gradient of an expert that no token goes to is exactly zero, whatever memory held."""
    assert_exact_gradients(experts, case)


@requirement("experts.empty.all-on-one", source="tgale96/grouped_gemm#36")
@given(case=integer_cases(slots=SEVERAL, routing="one"))
def test_all_tokens_may_go_to_one_expert(experts, case):
    """With all tokens on one expert, whichever it is, outputs and gradients are right."""
    assert_exact_gradients(experts, case)


@requirement("experts.empty.nan-stays", source="transformers, models/qwen3_moe", level="extended")
@given(case=integer_cases(experts=st.sampled_from([6, 8]), slots=SEVERAL, routing="few"))
def test_nan_in_an_idle_expert_is_not_seen(experts, case):
    """NaN in the weights of an expert without tokens reaches no output, and no token's gradient."""
    assert_exact_gradients(
        experts,
        case,
        f"idle = [e for e in range({case.experts}) if e not in indices]",
        "gate_up_proj[idle] = torch.nan",
        "down_proj[idle] = torch.nan",
        names=("hidden", "weights"),
    )


@requirement(
    "experts.empty.connected",
    source="deepspeedai/DeepSpeed, experts without tokens",
    level="extended",
    confusable={"less than two tokens", "nothing but sentinels", "one slot"},
)
@given(case=st.one_of(integer_cases(tokens=0), integer_cases(sentinels="all")))
def test_gradients_without_tokens_are_zeros_and_not_none(experts, case):
    """Where no token has an expert, the backward pass runs and gives zeros: ranks stay in step."""
    assert_connected(experts, case)


# Slots without an expert


@requirement("experts.sentinel.adds-nothing", source=MOE)
@given(case=SENTINELS)
def test_slots_without_an_expert_add_nothing(experts, case):
    """An index that is the number of experts adds nothing to its token, whatever its weight."""
    assert_exact(experts, case)


@requirement("experts.sentinel.whole-token", source=MOE)
@given(case=WHOLE_TOKENS)
def test_tokens_without_any_expert_give_zeros(experts, case):
    """A token all of whose slots are without an expert gives zeros."""
    assert_exact(experts, case)


@requirement("experts.sentinel.last-expert", source=MOE)
@given(case=integer_cases(sentinels=st.sampled_from(["slots", "tokens"]), routing="last"))
def test_the_last_expert_is_an_expert(experts, case):
    """The index before the sentinel is the last expert, which counts."""
    assert_exact_gradients(experts, case)


@requirement("experts.sentinel.gradients", source=MOE)
@given(case=SENTINELS)
def test_slots_without_an_expert_have_no_part_in_gradients(experts, case):
    """The gradient of such a slot's weight is zero, and it adds nothing to the others."""
    assert_exact_gradients(experts, case)


@requirement("experts.sentinel.any-weight", source=MOE)
@given(case=SENTINELS)
def test_weights_of_slots_without_an_expert_are_not_read(experts, case):
    """The weight of such a slot may be NaN or infinite."""
    odd = "torch.nan" if case.seed % 2 else "torch.inf"
    assert_exact(experts, case, f"weights[indices == {case.experts}] = {odd}")


@requirement("experts.sentinel.any-weight-gradients", source="huggingface/transformers#48205")
@given(case=SENTINELS)
def test_weights_of_slots_without_an_expert_reach_no_gradient(experts, case):
    """Also then all gradients are what they are without it."""
    odd = "torch.nan" if case.seed % 2 else "torch.inf"
    assert_exact_gradients(experts, case, f"weights[indices == {case.experts}] = {odd}")


@requirement("experts.sentinel.any-token", source=MOE)
@given(case=WHOLE_TOKENS)
def test_tokens_without_any_expert_are_not_read(experts, case):
    """A token all of whose slots are without an expert may hold NaN, and gives zeros."""
    odd = "torch.nan" if case.seed % 2 else "torch.inf"
    assert_exact(experts, case, f"hidden[1::3] = {odd}")


@requirement("experts.sentinel.any-token-gradients", source="huggingface/transformers#48205")
@given(case=WHOLE_TOKENS)
def test_tokens_without_any_expert_reach_no_gradient(experts, case):
    """Its NaN reaches no gradient: neither its own nor that of any weight."""
    odd = "torch.nan" if case.seed % 2 else "torch.inf"
    assert_exact_gradients(experts, case, f"hidden[1::3] = {odd}")


@requirement("experts.sentinel.every-slot", source=MOE, confusable={"nothing but sentinels"})
@given(case=integer_cases(sentinels="all", slots=SEVERAL))
def test_nothing_but_sentinels_gives_zeros(experts, case):
    """Where no slot has an expert, all outputs and all gradients are zero."""
    assert_exact_gradients(experts, case)


# Gradients


@requirement("experts.gradient.of-inputs", source=MIXTRAL)
@given(case=EVERY)
def test_gradients_reach_hidden_and_weights(experts, case):
    """The gradients of ``hidden`` and ``weights`` are those of the sum."""
    assert_gradients(experts, case, ("hidden", "weights"))


@requirement("experts.gradient.of-projections", source=MIXTRAL)
@given(case=EVERY)
def test_gradients_reach_both_projections(experts, case):
    """The gradients of ``gate_up_proj`` and ``down_proj`` are those of the sum."""
    assert_gradients(experts, case, ("gate_up_proj", "down_proj"))


@requirement("experts.gradient.of-layouts", source=GPT_OSS, level="extended")
@given(case=integer_cases(layout=LAYOUTS, transposed=EITHER, routing=ANY_ROUTING))
def test_gradients_lie_as_the_weights_do(experts, case):
    """Gradients of interleaved and of transposed weights lie as the weights do."""
    assert_exact_gradients(experts, case)


@requirement("experts.gradient.of-activations", source=GLU, level="extended")
@given(case=experts_cases(activation=st.sampled_from(["gelu", "gelu_tanh"])))
def test_gradients_pass_through_other_activations(experts, case):
    """The gradients through GELU and its approximation are those of each."""
    assert_gradients(experts, case)


@requirement("experts.gradient.of-one", source=MIXTRAL)
@given(case=INTEGERS)
def test_each_input_may_be_the_only_one_that_needs_a_gradient(experts, case):
    """Where all other inputs are frozen, an input has the gradient that it has among them."""
    assert_each_gradient(experts, case)


# Outputs


@requirement("experts.output.dtype", source=MIXTRAL)
@given(case=experts_cases(routing=ANY_ROUTING, wide_weights=EITHER))
def test_output_is_like_hidden(experts, case):
    """The output is [tokens, hidden], in the dtype and on the device of ``hidden``."""
    assert_output_of_every_dtype(experts, case)


@requirement("experts.output.deterministic", source=MOE)
@given(case=experts_cases(slots=SEVERAL))
def test_two_runs_are_identical(experts, case):
    """The same inputs give the same bits, also after a call with other inputs in between."""
    assert_two_runs(experts, case)


@requirement("experts.output.own-memory", source=MOE)
@given(case=INTEGERS)
def test_a_later_call_leaves_outputs_alone(experts, case):
    """What a call has returned is not written to by the next."""
    assert_own_memory(experts, case)


@requirement("experts.output.inputs-unchanged", source=MOE)
@given(case=integer_cases(sentinels=st.sampled_from(["none", "slots"]), slots=SEVERAL))
def test_inputs_are_not_changed(experts, case):
    """Neither hidden nor indices, weights or projections are written to, in either pass."""
    assert_exact_gradients(experts, case)


# What is refused


@requirement("experts.refuses.negative-index", source="huggingface/transformers, index checks")
@given(case=REFUSED)
def test_negative_indices_are_refused(experts, case):
    """An index below 0 raises an exception: it is not the last expert."""
    assert_refused(experts, case, f"indices[{case.tokens // 2}, 1] = -1")


@requirement("experts.refuses.index-beyond", source="huggingface/transformers, index checks")
@given(case=REFUSED)
def test_indices_beyond_the_sentinel_are_refused(experts, case):
    """An index above the number of experts raises an exception."""
    assert_refused(experts, case, f"indices[{case.tokens // 2}, 1] = {case.experts + 1}")


@requirement("experts.refuses.fewer-weights", source=MIXTRAL)
@given(case=REFUSED)
def test_weights_of_another_shape_are_refused(experts, case):
    """Weights that do not have the shape of the indices raise an exception."""
    edits = ("weights = weights[:, :1]", "weights = weights[:-1]", "weights = weights[0]")
    assert_refused(experts, case, edits[case.seed % 3])


@requirement("experts.refuses.other-tokens", source=MIXTRAL)
@given(case=REFUSED)
def test_indices_of_other_tokens_are_refused(experts, case):
    """Indices and weights of fewer or more tokens than ``hidden`` has raise an exception."""
    edits = (
        "indices, weights = indices[:-1], weights[:-1]",
        "indices, weights = (torch.cat([x, x[:1]]) for x in (indices, weights))",
    )
    assert_refused(experts, case, edits[case.seed % 2])


@requirement("experts.refuses.other-hidden", source=MIXTRAL)
@given(case=REFUSED)
def test_weights_of_another_width_are_refused(experts, case):
    """Projections for another hidden size than that of ``hidden`` raise an exception."""
    edits = ("hidden = hidden[:, :-1]", "down_proj = down_proj[:, :-1]")
    assert_refused(experts, case, edits[case.seed % 2])


@requirement("experts.refuses.odd-rows", source=MIXTRAL)
@given(case=REFUSED)
def test_gate_and_up_of_another_height_are_refused(experts, case):
    """``gate_up_proj`` that does not have twice as many rows as intermediate raises an exception."""
    edits = ("gate_up_proj = gate_up_proj[:, :-1]", "gate_up_proj = gate_up_proj[:, :-2]")
    assert_refused(experts, case, edits[case.seed % 2])


@requirement("experts.refuses.other-experts", source=MIXTRAL)
@given(case=REFUSED)
def test_projections_of_different_experts_are_refused(experts, case):
    """Two projections with different numbers of experts raise an exception."""
    edits = ("gate_up_proj = torch.cat([gate_up_proj, gate_up_proj[:1]])",)
    assert_refused(experts, case, *edits)


@requirement("experts.refuses.layout", source=MIXTRAL, level="extended")
@given(case=REFUSED)
def test_unknown_layouts_are_refused(experts, case):
    """A layout that there is not raises an exception."""
    assert_refused(experts, case, layout="'up_gate'")


@requirement("experts.refuses.activation", source=MIXTRAL, level="extended")
@given(case=REFUSED)
def test_unknown_activations_are_refused(experts, case):
    """An activation that there is not raises an exception."""
    assert_refused(experts, case, activation="'swish2'")


# More elements than an int32 counts


@requirement(
    "experts.large.tokens", source="linkedin/Liger-Kernel#1248", level="extended", gpu=True
)
@given(case=st.just(LargeCase("tokens", heads=1, width=512)))
def test_tokens_beyond_int32_offsets(experts, case):
    """With more than 2^31 elements of hidden states each token still has its own output."""
    assert_large_tokens(experts, case)
