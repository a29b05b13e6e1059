"""The requirements of the contract ``shared_core_block``: a block whose experts are compressed.

The oracle computes every expert for every token from dense weights in float64.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.core_block_cases import FUSED, SQUARE, block_cases
from conformance.harness.core_block_checks import (
    assert_dense,
    assert_factors_are_parameters,
    assert_gradients,
    assert_independent,
    assert_no_tokens,
    assert_output,
    assert_own_values,
    assert_parameters,
    assert_permuted,
    assert_refused,
    assert_state_restored,
    assert_twice,
    assert_unselected_get_nothing,
)
from conformance.harness.core_cases import DTYPES
from conformance.harness.requirement import requirement

BLOCK = "LawrenceRLiu/MoE_Factorize_Compress, src/compressed_moe_model.py"
ROUTING = "transformers, modeling_qwen3_moe and modeling_mixtral: the router's weights"
RETURNED = "transformers, modeling_mixtral before 5: blocks that give (output, logits)"
STATE = "LawrenceRLiu/MoE_Factorize_Compress, src/shared_core.py (cores in buffers, mended later)"

ANY = block_cases(dtype=DTYPES)
SIMPLE = block_cases()
FEW_TOKENS = block_cases(experts=6, top_k=2, batch=1, tokens=st.integers(2, 3))
"""So few that some experts are chosen by none."""


# Outputs


@requirement("shared_core_block.output.values", source=BLOCK, smoke=True)
@given(case=ANY)
def test_output_is_the_weighted_sum_of_dense_experts(shared_core_block, case):
    """A token's output is the weighted sum of down(silu(gate x) ⊙ up x) over its experts."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.normalised", source=ROUTING)
@given(case=block_cases(normalize=True, dtype=DTYPES))
def test_weights_sum_to_one_if_normalised(shared_core_block, case):
    """With ``normalize`` the chosen experts' probabilities are divided by their sum."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.not-normalised", source=ROUTING)
@given(case=block_cases(normalize=False, dtype=DTYPES))
def test_weights_are_probabilities_if_not_normalised(shared_core_block, case):
    """Without ``normalize`` the weights are the probabilities over all experts."""
    assert_output(shared_core_block, case)


@requirement(
    "shared_core_block.output.one-expert-a-token",
    source=ROUTING,
    confusable={"one expert a token"},
)
@given(case=block_cases(top_k=1, dtype=DTYPES))
def test_one_expert_a_token(shared_core_block, case):
    """With top_k = 1 the weight is 1 if normalised, and the largest probability if not."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.all-experts", source=ROUTING, confusable={"all experts"})
@given(case=block_cases(top_k="all", dtype=DTYPES))
def test_all_experts_for_every_token(shared_core_block, case):
    """With top_k = E every token has every expert, with the full softmax as weights."""
    assert_output(shared_core_block, case)


@requirement(
    "shared_core_block.output.square",
    source=BLOCK,
    confusable={"hidden = intermediate"},
)
@given(case=block_cases(SQUARE))
def test_output_of_square_projections(shared_core_block, case):
    """With hidden = intermediate no projection is transposed or takes another's place."""
    assert_output(shared_core_block, case)


@requirement(
    "shared_core_block.output.fused-width",
    source=BLOCK,
    confusable={"hidden = double_intermediate"},
)
@given(case=block_cases(FUSED))
def test_output_where_two_projections_are_as_wide_as_the_input(shared_core_block, case):
    """With hidden = 2 · intermediate gate and up are not taken for one projection."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.gate-and-up", source=BLOCK)
@given(case=SIMPLE)
def test_gate_and_up_are_not_exchanged(shared_core_block, case):
    """SiLU is of the gate alone: with a gate three times as large as up, exchanging them shows."""
    assert_output(
        shared_core_block, case, "gate_proj = {**gate_proj, 'core': 3 * gate_proj['core']}"
    )


@requirement("shared_core_block.output.one-rank", source=BLOCK, confusable={"one rank"})
@given(case=block_cases(wrapper_ranks=st.sampled_from([(2, 2, 2), (3, 3, 3)])))
def test_projections_of_one_rank(shared_core_block, case):
    """With equal ranks each projection keeps its own wrappers."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.one-token", source=BLOCK, confusable={"one token"})
@given(case=block_cases(batch=1, tokens=1, dtype=DTYPES))
def test_one_token(shared_core_block, case):
    """A single token, as in decoding, has its experts."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.no-tokens", source=BLOCK, confusable={"one token"})
@given(case=st.one_of(block_cases(tokens=0), block_cases(batch=0)))
def test_no_tokens(shared_core_block, case):
    """No tokens give no tokens, in the shape that was given."""
    assert_no_tokens(shared_core_block, case)


@requirement("shared_core_block.output.same-experts-for-all", source=BLOCK)
@given(case=block_cases(one_expert=True, tokens=st.integers(6, 9)))
def test_all_tokens_on_the_same_experts(shared_core_block, case):
    """Where all tokens choose the same experts none is dropped."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.equal-experts", source=BLOCK)
@given(case=block_cases(normalize=True))
def test_equal_experts_are_a_dense_block(shared_core_block, case):
    """With U = 0 all experts are the cores, and normalised weights make a plain gated MLP."""
    assert_dense(shared_core_block, case)


@requirement("shared_core_block.output.dtype", source=BLOCK)
@given(case=block_cases(dtype=st.sampled_from(["bfloat16", "float16"])))
def test_output_in_16_bits(shared_core_block, case):
    """A block in 16 bits gives 16 bits, as exact as these are."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.output.same-twice", source=BLOCK)
@given(case=SIMPLE)
def test_a_second_call_gives_the_same_bits(shared_core_block, case):
    """The output does not depend on earlier calls."""
    assert_twice(shared_core_block, case)


@requirement("shared_core_block.tokens.permuted", source=BLOCK)
@given(case=SIMPLE)
def test_order_and_rows_of_tokens_make_no_difference(shared_core_block, case):
    """Tokens in another order, and in one row instead of several, keep their outputs."""
    assert_permuted(shared_core_block, case)


@requirement("shared_core_block.tokens.independent", source=BLOCK)
@given(case=SIMPLE)
def test_a_token_alone_has_the_same_output(shared_core_block, case):
    """A token's output does not depend on the tokens beside it."""
    assert_independent(shared_core_block, case)


@requirement("shared_core_block.returned.bare-tensor", source=RETURNED)
@given(case=block_cases(batch=2, dtype=DTYPES))
def test_output_is_a_bare_tensor(shared_core_block, case):
    """Without ``return_logits`` the block gives a tensor of the input's shape, and no tuple."""
    assert_output(shared_core_block, case)


@requirement("shared_core_block.returned.with-logits", source=RETURNED)
@given(case=block_cases(return_logits=True, batch=st.integers(2, 3), dtype=DTYPES))
def test_logits_are_returned_where_asked_for(shared_core_block, case):
    """With ``return_logits`` it gives (output, logits [batch · tokens, experts]) before softmax."""
    assert_output(shared_core_block, case)


# Gradients


@requirement("shared_core_block.gradient.cores", source=BLOCK)
@given(case=SIMPLE)
def test_cores_get_gradients_from_all_experts_used(shared_core_block, case):
    """The gradient of each core is the sum over tokens and their experts."""
    assert_gradients(shared_core_block, case, "core")


@requirement("shared_core_block.gradient.wrappers", source=BLOCK)
@given(case=SIMPLE)
def test_wrappers_get_gradients_from_their_tokens(shared_core_block, case):
    """The gradients of wrappers are those of the tokens of their expert."""
    assert_gradients(shared_core_block, case, "u_in", "v_in", "u_out", "v_out")


@requirement("shared_core_block.gradient.experts-chosen-alone", source=BLOCK)
@given(case=FEW_TOKENS)
def test_experts_that_no_token_chose_get_no_gradient(shared_core_block, case):
    """Wrappers of experts that no token has chosen get no gradient, or exact zeros."""
    assert_unselected_get_nothing(shared_core_block, case)


@requirement("shared_core_block.gradient.router", source=ROUTING)
@given(case=SIMPLE)
def test_router_gets_its_gradient(shared_core_block, case):
    """The router learns through the weights of the chosen experts, normalised or not."""
    assert_gradients(shared_core_block, case, "router")


@requirement("shared_core_block.gradient.hidden", source=BLOCK)
@given(case=SIMPLE)
def test_input_gets_its_gradient(shared_core_block, case):
    """The gradient of the input comes through the experts and through the router."""
    assert_gradients(shared_core_block, case, "hidden")


# Parameters


@requirement("shared_core_block.parameters.complete", source=BLOCK)
@given(case=SIMPLE)
def test_router_and_factors_are_the_parameters(shared_core_block, case):
    """Router and factors are Parameters that can be trained, and nothing else is."""
    assert_factors_are_parameters(shared_core_block, case)


@requirement("shared_core_block.parameters.stored-once", source=STATE)
@given(case=SIMPLE)
def test_each_core_is_stored_once(shared_core_block, case):
    """The block holds each core once, and nothing beside the router and the factors."""
    assert_parameters(shared_core_block, case)


@requirement("shared_core_block.parameters.stored-once-after-to", source=STATE)
@given(case=SIMPLE)
def test_each_core_is_stored_once_after_moving(shared_core_block, case):
    """After ``.to`` and in copies each core is stored once."""
    moves = ("after .to(torch.float64)", "after .to(torch.bfloat16)", "after copy.deepcopy")
    assert_parameters(shared_core_block, case, *moves)


@requirement("shared_core_block.parameters.own-values", source=BLOCK)
@given(case=SIMPLE)
def test_block_has_values_of_its_own(shared_core_block, case):
    """What becomes of the tensors that were given does not change the block."""
    assert_own_values(shared_core_block, case)


@requirement("shared_core_block.parameters.restored", source=STATE)
@given(case=SIMPLE)
def test_state_that_is_loaded_gives_the_same_bits(shared_core_block, case):
    """A block of other values that loads the state gives the outputs of the one that saved it."""
    assert_state_restored(shared_core_block, case)


# Refusals


@requirement("shared_core_block.refuses.missing-factor", source=BLOCK)
@given(case=SIMPLE)
def test_a_missing_factor_is_refused(shared_core_block, case):
    """A projection without one of its five factors is refused: nothing takes its place."""
    for edit in ("del gate_proj['u_out']", "del up_proj['core']", "del down_proj['v_in']"):
        assert_refused(shared_core_block, case, [edit])


@requirement("shared_core_block.refuses.unknown-factor", source=BLOCK)
@given(case=SIMPLE)
def test_an_unknown_factor_is_refused(shared_core_block, case):
    """A projection with a factor of another name is refused: nothing is dropped."""
    assert_refused(shared_core_block, case, ["up_proj['u_mid'] = up_proj['u_in']"])


@requirement("shared_core_block.refuses.mis-shaped-factor", source=BLOCK)
@given(case=SIMPLE)
def test_a_mis_shaped_factor_is_refused(shared_core_block, case):
    """Wrappers of the other side, a transposed core, and a factor of fewer experts are refused."""
    swapped = "up_proj['u_in'], up_proj['u_out'] = up_proj['u_out'], up_proj['u_in']"
    transposed = "gate_proj['core'] = gate_proj['core'].mT.contiguous()"
    for edit in (swapped, transposed, "down_proj['v_out'] = down_proj['v_out'][:-1]"):
        assert_refused(shared_core_block, case, [edit])


@requirement("shared_core_block.refuses.projections-of-other-widths", source=BLOCK)
@given(case=SIMPLE)
def test_projections_that_do_not_fit_are_refused(shared_core_block, case):
    """down in the place of up, and an up of another width than gate, are refused."""
    assert_refused(shared_core_block, case, ["up_proj, down_proj = down_proj, up_proj"])
    wider = f"up_proj = factors({case.hidden}, {case.intermediate + 1}, 2)"
    assert_refused(shared_core_block, case, [wider])
    one = f"up_proj = factors({case.hidden}, 1, 2)"
    assert_refused(shared_core_block, case, [one])


@requirement("shared_core_block.refuses.router-of-other-experts", source=BLOCK)
@given(case=SIMPLE)
def test_a_router_of_other_experts_is_refused(shared_core_block, case):
    """A router with one expert more or less than the projections have is refused."""
    assert_refused(shared_core_block, case, ["router = torch.cat([router, router[:1]])"])
    assert_refused(shared_core_block, case, ["router = router[:-1]"])


@requirement("shared_core_block.refuses.top-k", source=ROUTING)
@given(case=SIMPLE)
def test_more_experts_a_token_than_there_are_are_refused(shared_core_block, case):
    """top_k above the number of experts is refused, at the latest when the block is called."""
    assert_refused(shared_core_block, case, options={"top_k": str(case.experts + 1)})
