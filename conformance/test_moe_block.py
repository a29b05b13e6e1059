"""The requirements of the contract ``moe_block``: router, experts and shared expert in one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.compare import assert_identical
from conformance.harness.lanes import in_every_lane
from conformance.harness.moe_block_cases import block_cases
from conformance.harness.moe_block_checks import (
    assert_experts_permuted,
    assert_gradients,
    assert_identical_experts,
    assert_logits,
    assert_matches,
    assert_nan_stays,
    assert_no_tokens,
    assert_router_permuted,
    assert_same_as,
    assert_tokens_alone,
    assert_tokens_permuted,
    assert_unused_have_no_gradient,
    run,
)
from conformance.harness.requirement import requirement

MIXTRAL = "arXiv 2401.04088, Mixtral of Experts"
QWEN3 = "huggingface/transformers, models/qwen3_moe/modeling_qwen3_moe.py"
QWEN2 = "huggingface/transformers, models/qwen2_moe/modeling_qwen2_moe.py"
DEEPSEEK = "deepseek-ai/DeepSeek-V3, inference/model.py"

SCORES = st.sampled_from(["softmax", "sigmoid"])
NORMALISED = st.booleans()
PLAIN = block_cases(normalize=NORMALISED)
SHARED = block_cases(shared="any", shared_gate=True, normalize=NORMALISED)
EITHER = block_cases(
    score=SCORES,
    normalize=NORMALISED,
    shared=st.sampled_from([None, "any"]),
    shared_gate=st.booleans(),
)
"""With and without a shared expert, for rules that are not about it."""
ONE_TOKEN = {"one token", "batch = tokens"}


# The mixture


@requirement("moe_block.output.probabilities", source=QWEN3, smoke=True)
@given(case=block_cases())
def test_output_is_the_sum_of_experts_by_probability(moe_block, case):
    """The output is the sum of a token's experts, weighted by softmax probabilities over all."""
    assert_matches(moe_block, case)


@requirement("moe_block.output.normalised", source=MIXTRAL, smoke=True)
@given(case=block_cases(normalize=True))
def test_output_is_the_mean_of_experts(moe_block, case):
    """With ``normalize`` the weights of a token's experts are divided by their sum."""
    assert_matches(moe_block, case)


@requirement("moe_block.output.sigmoid", source=DEEPSEEK)
@given(case=block_cases(score="sigmoid", normalize=NORMALISED))
def test_output_with_sigmoid_scores(moe_block, case):
    """With sigmoid scores weights are those of each expert by itself, normalised or not."""
    assert_matches(moe_block, case)


@requirement("moe_block.output.bias", source=DEEPSEEK)
@given(case=block_cases(score="sigmoid", bias="random", normalize=NORMALISED))
def test_the_bias_chooses_experts_and_weighs_none(moe_block, case):
    """A selection bias changes which experts a token goes to, and no weight."""
    assert_matches(moe_block, case)


@requirement("moe_block.output.groups", source=DEEPSEEK)
@given(
    case=block_cases(
        groups="any", score="sigmoid", bias=st.sampled_from([None, "random", "negative"])
    )
)
def test_experts_are_those_of_the_groups_that_are_kept(moe_block, case):
    """With groups a token goes to experts of the kept groups alone."""
    assert_matches(moe_block, case)


@requirement("moe_block.output.scaling", source=DEEPSEEK)
@given(case=block_cases(scaling=st.sampled_from([0.5, 2.5]), normalize=NORMALISED, score=SCORES))
def test_the_factor_is_on_routed_experts(moe_block, case):
    """The scaling factor multiplies what the routed experts give."""
    assert_matches(moe_block, case)


@requirement("moe_block.shared.added", source=DEEPSEEK)
@given(case=block_cases(shared="any", normalize=NORMALISED))
def test_the_shared_expert_is_added_with_weight_one(moe_block, case):
    """What the shared expert gives every token is added with weight 1."""
    assert_matches(moe_block, case)


@requirement("moe_block.shared.gated", source=QWEN2)
@given(case=SHARED)
def test_the_shared_expert_has_its_gate(moe_block, case):
    """With ``shared_gate`` the shared expert is multiplied by the sigmoid of the token's gate."""
    assert_matches(moe_block, case)


@requirement("moe_block.shared.not-scaled", source=DEEPSEEK)
@given(
    case=block_cases(
        shared="any", scaling=st.sampled_from([0.5, 2.5]), score=SCORES, normalize=NORMALISED
    )
)
def test_the_factor_is_not_on_the_shared_expert(moe_block, case):
    """The scaling factor is on the routed experts, and not on the shared one."""
    assert_matches(moe_block, case)


@requirement("moe_block.options.any-combination", source=DEEPSEEK)
@given(
    case=block_cases(
        groups="any",
        score=SCORES,
        normalize=NORMALISED,
        bias=st.sampled_from([None, "random"]),
        scaling=st.sampled_from([1.0, 2.5]),
        shared=st.sampled_from([None, "any"]),
        shared_gate=st.booleans(),
    )
)
def test_options_go_together(moe_block, case):
    """Every combination of routing options and shared expert computes what its parts do."""
    assert_matches(moe_block, case)


# Sizes


@requirement("moe_block.sizes.square-gate-up", source=QWEN3, confusable={"2 intermediate = hidden"})
@given(
    case=st.sampled_from([20, 24]).flatmap(
        lambda n: block_cases(hidden=n, intermediate=n // 2, normalize=NORMALISED)
    )
)
def test_gate_and_up_that_are_square_are_not_transposed(moe_block, case):
    """Where twice the intermediate size is the hidden size, the layout is the same."""
    assert_matches(moe_block, case)


@requirement("moe_block.sizes.square-down", source=QWEN3, confusable={"intermediate = hidden"})
@given(
    case=st.sampled_from([20, 24]).flatmap(
        lambda n: block_cases(hidden=n, intermediate=n, normalize=NORMALISED)
    )
)
def test_a_down_projection_that_is_square_is_not_transposed(moe_block, case):
    """Where the intermediate size is the hidden size, the layout is the same."""
    assert_matches(moe_block, case)


@requirement("moe_block.sizes.square-router", source=QWEN3, confusable={"experts = hidden"})
@given(
    case=st.sampled_from([12, 16]).flatmap(
        lambda n: block_cases(hidden=n, experts=n, normalize=NORMALISED)
    )
)
def test_a_router_that_is_square_is_not_transposed(moe_block, case):
    """Where there are as many experts as hidden dimensions, the router's rows are experts."""
    assert_matches(moe_block, case)


# Experts


@requirement("moe_block.experts.twelve-and-more", source=QWEN3)
@given(case=block_cases(experts=st.sampled_from([12, 16]), normalize=NORMALISED))
def test_experts_above_ten_are_in_their_places(moe_block, case):
    """Row e of the router belongs to expert e, where e has two digits too."""
    assert_matches(moe_block, case)


@requirement("moe_block.experts.permuted", source=MIXTRAL)
@given(case=block_cases(normalize=NORMALISED, bias=st.sampled_from([None, "random"]), score=SCORES))
def test_experts_and_router_in_another_order_change_nothing(moe_block, case):
    """Experts in another order with the rows of the router in the same order change nothing."""
    assert_experts_permuted(moe_block, case)


@requirement("moe_block.experts.router-permuted", source=MIXTRAL)
@given(case=PLAIN)
def test_the_router_in_another_order_changes_the_output(moe_block, case):
    """The rows of the router in another order, without the experts, give other experts' output."""
    assert_router_permuted(moe_block, case)


@requirement("moe_block.experts.identical", source=MIXTRAL)
@given(case=block_cases(normalize=True, score=SCORES))
def test_experts_that_are_one_give_that_one(moe_block, case):
    """Where all experts are the same, a mixture with normalised weights is that expert."""
    assert_identical_experts(moe_block, case)


@requirement("moe_block.experts.one-a-token", source=QWEN3, confusable={"one expert a token"})
@given(case=block_cases(top_k=1, score=SCORES, normalize=NORMALISED))
def test_one_expert_a_token(moe_block, case):
    """With ``top_k`` 1 the output is the best expert's, times its score unless normalised."""
    assert_matches(moe_block, case)


@requirement("moe_block.experts.all", source=MIXTRAL, confusable={"experts = top_k"})
@given(
    case=st.sampled_from([5, 6, 9]).flatmap(
        lambda n: block_cases(experts=n, top_k=n, score=SCORES, normalize=NORMALISED)
    )
)
def test_all_experts_are_a_dense_mixture(moe_block, case):
    """With ``top_k`` all experts the output is the mixture of all."""
    assert_matches(moe_block, case)


# Tokens


@requirement("moe_block.tokens.permuted", source=MIXTRAL)
@given(case=EITHER)
def test_tokens_in_another_order_have_the_same_outputs(moe_block, case):
    """Tokens in another order, over batch rows too, have their outputs in that order."""
    assert_tokens_permuted(moe_block, case)


@requirement("moe_block.tokens.reshaped", source=MIXTRAL)
@given(case=EITHER, flat=st.sampled_from(["[None]", "[:, None]"]))
def test_batch_rows_and_tokens_are_alike(moe_block, case, flat):
    """The same tokens in one row, or a row each, have the same outputs."""
    assert_same_as(moe_block, case, f"hidden = hidden.flatten(0, 1){flat}")


@requirement("moe_block.tokens.alone", source=MIXTRAL)
@given(
    case=block_cases(normalize=NORMALISED, dtype="float32", shared=st.sampled_from([None, "any"]))
)
def test_a_token_alone_has_the_same_output(moe_block, case):
    """A token's output does not depend on which other tokens there are."""
    assert_tokens_alone(moe_block, case)


@requirement("moe_block.tokens.nan-stays", source=QWEN3)
@given(case=EITHER)
def test_nan_in_a_token_stays_there(moe_block, case):
    """A token of NaN raises, or has NaN for its output, and changes no other token."""
    assert_nan_stays(moe_block, case)


@requirement("moe_block.tokens.all-to-the-same", source=MIXTRAL)
@given(
    case=block_cases(
        routing="alike", batch=3, tokens=st.sampled_from([7, 11]), normalize=NORMALISED
    )
)
def test_no_token_is_dropped(moe_block, case):
    """Where all tokens go to the same experts, these process all of them."""
    assert_matches(moe_block, case)


@requirement("moe_block.tokens.one", source=QWEN3, confusable=ONE_TOKEN)
@given(
    case=block_cases(batch=1, tokens=1, normalize=NORMALISED, shared=st.sampled_from([None, "any"]))
)
def test_one_token(moe_block, case):
    """A single token of a single batch row is a batch of one."""
    assert_matches(moe_block, case)


@requirement("moe_block.tokens.none", source=QWEN3)
@given(case=EITHER, edit=st.sampled_from(["hidden[:0]", "hidden[:, :0]", "hidden[:0, :0]"]))
def test_no_tokens(moe_block, case, edit):
    """Without batch rows, or without tokens, the output is empty and of the same shape."""
    assert_no_tokens(moe_block, case, f"hidden = {edit}")


# Gradients


@requirement("moe_block.gradient.all", source=MIXTRAL)
@given(case=PLAIN)
def test_gradients_reach_hidden_router_and_experts(moe_block, case):
    """Gradients of the hidden states, the router and both projections are those of the mixture."""
    assert_gradients(moe_block, case)


@requirement("moe_block.gradient.shared", source=QWEN2)
@given(case=SHARED)
def test_gradients_reach_the_shared_expert_and_its_gate(moe_block, case):
    """Gradients reach both projections of the shared expert, and its gate."""
    assert_gradients(moe_block, case)


@requirement("moe_block.gradient.sigmoid", source=DEEPSEEK)
@given(
    case=block_cases(
        score="sigmoid",
        normalize=NORMALISED,
        bias=st.sampled_from([None, "random"]),
        scaling=st.sampled_from([1.0, 2.5]),
    )
)
def test_gradients_with_sigmoid_scores_and_a_factor(moe_block, case):
    """Gradients are those of sigmoid scores and of the factor, and have no bias in them."""
    assert_gradients(moe_block, case)


@requirement("moe_block.gradient.one-expert", source=QWEN3, confusable={"one expert a token"})
@given(case=block_cases(top_k=1, score=SCORES))
def test_the_router_learns_with_one_expert_a_token(moe_block, case):
    """With ``top_k`` 1 and no normalisation the router has the gradient of the score."""
    assert_gradients(moe_block, case, "router")


@requirement("moe_block.gradient.unused-zero", source=MIXTRAL)
@given(
    case=block_cases(routing=st.sampled_from(["alike", "alike", "spread"]), normalize=NORMALISED)
)
def test_experts_without_tokens_have_gradients_of_zero(moe_block, case):
    """The gradients of an expert that no token goes to are exactly zero."""
    assert_unused_have_no_gradient(moe_block, case)


# The output


@requirement("moe_block.output.shape-dtype-device", source=QWEN3)
@given(case=block_cases(batch=2, tokens=st.sampled_from([3, 5]), normalize=NORMALISED))
def test_the_output_is_one_tensor(moe_block, case):
    """The output is a tensor of the shape, dtype and device of the hidden states, and no tuple."""
    in_every_lane(case, lambda call: run(moe_block, call), moe_block.device)


@requirement("moe_block.logits.returned", source=QWEN3, level="extended")
@given(case=PLAIN)
def test_logits_are_returned_if_asked_for(moe_block, case):
    """With ``return_logits`` the block gives (output, logits [batch · tokens, experts])."""
    assert_logits(moe_block, case)


@requirement("moe_block.output.inputs-unchanged", source=MIXTRAL)
@given(
    case=st.one_of(
        EITHER, block_cases(shared="any", shared_gate=True, bias="random", score="sigmoid")
    )
)
def test_hidden_states_and_weights_are_not_changed(moe_block, case):
    """The hidden states and all weights stay as they are, and none is given back."""
    # The subject compares every input of every call; here the calls are those that tempt most.
    in_every_lane(case, lambda call: run(moe_block, call), moe_block.device)


@requirement("moe_block.output.deterministic", source=QWEN3)
@given(case=EITHER)
def test_two_runs_are_identical(moe_block, case):
    """The same inputs give the same bits, also after a call with others in between."""

    def check(call):
        first = run(moe_block, call).detach().clone()
        run(moe_block, call.then("hidden = hidden.flip(0, 1) * 2"))
        assert_identical(run(moe_block, call), first, call, because="a second run differs")

    in_every_lane(case, check, moe_block.device)


@requirement("moe_block.inputs.any-strides", source=QWEN3, level="extended")
@given(case=EITHER)
def test_hidden_states_may_have_any_strides(moe_block, case):
    """Hidden states of a model whose tokens come before batch rows in memory are taken by index."""
    turned = "hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)"
    assert_same_as(moe_block, case, turned)
