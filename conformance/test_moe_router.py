"""The requirements of the contract ``moe_router``: which experts, and with what weights."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.compare import assert_identical
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import requirement
from conformance.harness.router_cases import router_cases
from conformance.harness.router_checks import (
    assert_chooses,
    assert_gradient,
    assert_loss,
    assert_loss_gradient,
    assert_loss_is,
    assert_lowest_index,
    assert_nan_is_seen,
    assert_one,
    assert_refused,
    assert_routes,
    assert_routes_edited,
    assert_same_shifted,
    assert_sum_is_one,
    assert_tokens_independent,
    assert_weights_of_experts,
    run,
)

SWITCH = "arXiv 2101.03961, Switch Transformer"
MIXTRAL = "arXiv 2401.04088, Mixtral of Experts"
QWEN = "huggingface/transformers, models/qwen3_moe/modeling_qwen3_moe.py"
DEEPSEEK = "arXiv 2412.19437, DeepSeek-V3"
DEEPSEEK_CODE = "deepseek-ai/DeepSeek-V3, inference/model.py"

SCORES = st.sampled_from(["softmax", "sigmoid"])
FACTORS = st.sampled_from([0.5, 2.5, 16.0])
EVERY = router_cases(score=SCORES, normalize=st.booleans())
PLAIN = router_cases(normalize=st.booleans())
ONE = {"one expert a token"}


# Scores and weights


@requirement("moe_router.softmax.not-normalised", source=QWEN, smoke=True)
@given(case=router_cases())
def test_softmax_weights_are_probabilities_over_all_experts(moe_router, case):
    """Weights are softmax probabilities over all experts, whose sum over the chosen is below 1."""
    assert_routes(moe_router, case)


@requirement("moe_router.softmax.normalised", source=MIXTRAL, smoke=True)
@given(case=router_cases(normalize=True))
def test_normalised_softmax_weights_are_divided_by_their_sum(moe_router, case):
    """With ``normalize`` weights are the probabilities of the chosen, divided by their sum."""
    assert_routes(moe_router, case)


@requirement("moe_router.sigmoid.not-normalised", source=DEEPSEEK)
@given(case=router_cases(score="sigmoid"))
def test_sigmoid_weights_are_scores_each_by_itself(moe_router, case):
    """With sigmoid scores each weight is the sigmoid of its own logit."""
    assert_routes(moe_router, case)


@requirement("moe_router.sigmoid.normalised", source=DEEPSEEK)
@given(case=router_cases(score="sigmoid", normalize=True))
def test_normalised_sigmoid_weights_are_divided_by_their_sum(moe_router, case):
    """With sigmoid scores and ``normalize`` a weight is the score over the sum of the chosen."""
    assert_routes(moe_router, case)


@requirement("moe_router.normalised.sum-is-one", source=MIXTRAL)
@given(case=router_cases(score=SCORES, normalize=True))
def test_normalised_weights_sum_to_one(moe_router, case):
    """A token's normalised weights sum to 1."""
    assert_sum_is_one(moe_router, case)


@requirement("moe_router.weights.of-their-experts", source=MIXTRAL)
@given(case=EVERY)
def test_the_weight_in_a_slot_is_that_of_the_expert_in_it(moe_router, case):
    """The weight in a slot belongs to the expert that the same slot names."""
    assert_weights_of_experts(moe_router, case)


@requirement("moe_router.weights.close-logits", source=QWEN)
@given(
    case=router_cases(
        logits="close", experts=st.sampled_from([64, 96, 128]), normalize=st.booleans()
    )
)
def test_experts_whose_logits_are_neighbours_are_told_apart(moe_router, case):
    """Scores are in float32 at least: logits of 16 bits a step apart have different scores."""
    assert_routes(moe_router, case)


@requirement("moe_router.weights.large-logits", source=SWITCH)
@given(case=router_cases(logits="large", score=SCORES, normalize=st.booleans()))
def test_large_logits_have_finite_weights(moe_router, case):
    """Logits of thousands give probabilities of 0 and 1, and neither infinity nor NaN."""
    assert_routes(moe_router, case)


@requirement("moe_router.weights.shifted-logits", source=SWITCH)
@given(case=PLAIN, shift=st.sampled_from([-96.0, 32.0, 128.0]))
def test_a_constant_on_all_logits_changes_no_softmax(moe_router, case, shift):
    """A constant on a token's logits changes neither experts nor softmax weights."""
    # First rounded to steps that 16 bits keep behind the shift.
    step = "logits = (logits.float() * 2).round() / 2"
    assert_same_shifted(moe_router, case, step, f"logits = (logits + {shift}).to(logits.dtype)")


@requirement("moe_router.weights.equal-logits", source=SWITCH)
@given(case=router_cases(logits="equal", score=SCORES, normalize=st.booleans()))
def test_equal_logits_have_equal_weights(moe_router, case):
    """A token whose logits are equal goes to any ``top_k`` experts, with equal weights."""
    assert_routes(moe_router, case)


@requirement("moe_router.weights.masked-experts", source=QWEN)
@given(case=router_cases(logits="masked", score=SCORES, normalize=st.booleans()))
def test_a_logit_of_minus_infinity_is_an_expert_that_is_never_chosen(moe_router, case):
    """An expert whose logit is -inf is not chosen, and the weights of others are finite."""
    assert_routes(moe_router, case)


@requirement("moe_router.weights.nan-is-seen", source=QWEN)
@given(case=EVERY)
def test_nan_is_not_hidden(moe_router, case):
    """NaN in a token's logits raises or is in its weights, and changes no other token."""
    assert_nan_is_seen(moe_router, case)


# Which experts


@requirement("moe_router.choice.largest-scores", source=MIXTRAL)
@given(case=EVERY)
def test_the_experts_with_the_largest_scores_are_chosen(moe_router, case):
    """A token goes to the ``top_k`` experts with the largest scores, each once."""
    assert_chooses(moe_router, case)


@requirement("moe_router.choice.many-experts", source=QWEN)
@given(
    case=router_cases(
        experts=st.sampled_from([128, 192, 256]),
        top_k=st.sampled_from([6, 8]),
        normalize=st.booleans(),
    )
)
def test_hundreds_of_experts(moe_router, case):
    """Of 128 to 256 experts the right ones are chosen, in 16 bits as well."""
    assert_routes(moe_router, case)


@requirement("moe_router.choice.ties", source=MIXTRAL)
@given(case=router_cases(logits="tied", score=SCORES, normalize=st.booleans()))
def test_of_experts_with_equal_scores_any_are_chosen_once(moe_router, case):
    """Where scores are equal at the end of the chosen, any of them are, each once."""
    assert_routes(moe_router, case)


@requirement("moe_router.choice.ties-lowest-index", source=QWEN, level="extended")
@given(
    case=router_cases(
        logits="tied", score=SCORES, experts=st.sampled_from([12, 16, 24]), normalize=st.booleans()
    )
)
def test_of_experts_with_equal_scores_the_first_are_chosen(moe_router, case):
    """Of experts with equal scores those with the lowest index are chosen."""
    assert_lowest_index(moe_router, case)


@requirement("moe_router.choice.one-expert", source=SWITCH, confusable=ONE)
@given(case=router_cases(top_k=1, score=SCORES))
def test_one_expert_a_token_has_its_score_for_weight(moe_router, case):
    """With ``top_k`` 1 and no normalisation the weight is the score, and not 1."""
    assert_routes(moe_router, case)


@requirement("moe_router.choice.one-expert-normalised", source=MIXTRAL, confusable=ONE)
@given(case=router_cases(top_k=1, normalize=True, score=SCORES))
def test_one_expert_a_token_normalised_has_weight_one(moe_router, case):
    """With ``top_k`` 1 and ``normalize`` every weight is 1."""
    assert_one(moe_router, case)


@requirement("moe_router.choice.all-experts", source=MIXTRAL, confusable={"experts = top_k"})
@given(
    case=st.sampled_from([4, 6, 9]).flatmap(
        lambda n: router_cases(experts=n, top_k=n, score=SCORES, normalize=st.booleans())
    )
)
def test_all_experts_are_chosen_if_top_k_says_so(moe_router, case):
    """With as many as there are every expert is chosen once, and softmax weights sum to 1."""
    assert_routes(moe_router, case)


# A selection bias


@requirement("moe_router.bias.chooses", source=DEEPSEEK)
@given(case=router_cases(bias="random", score=SCORES))
def test_the_bias_is_part_of_what_chooses(moe_router, case):
    """Experts are chosen by score plus bias."""
    assert_chooses(moe_router, case)


@requirement("moe_router.bias.not-in-weights", source=DEEPSEEK)
@given(case=router_cases(bias="random", score=SCORES, normalize=st.booleans()))
def test_the_bias_is_not_part_of_weights(moe_router, case):
    """Weights are the scores of the chosen experts, without the bias they were chosen by."""
    assert_routes(moe_router, case)


@requirement("moe_router.bias.constant", source=DEEPSEEK)
@given(case=router_cases(bias="random", score=SCORES, groups=st.just(None)))
def test_a_constant_on_all_biases_changes_nothing(moe_router, case):
    """A constant on all biases changes neither experts nor weights."""
    assert_same_shifted(moe_router, case, "bias = bias + 0.75")


@requirement("moe_router.bias.in-float32", source=DEEPSEEK)
@given(case=router_cases(bias="large", score="sigmoid", experts=st.sampled_from([12, 16, 24])))
def test_the_bias_is_not_rounded(moe_router, case):
    """Biases that 16 bits do not tell apart choose different experts."""
    assert_routes(moe_router, case)


# Groups of experts


@requirement("moe_router.groups.best-expert", source="arXiv 2405.04434, DeepSeek-V2")
@given(case=router_cases(groups="any", score=SCORES))
def test_without_a_bias_a_group_is_as_good_as_its_best_expert(moe_router, case):
    """Without a bias the groups with the best experts are kept, and others' are not chosen."""
    assert_routes(moe_router, case)


@requirement("moe_router.groups.best-two", source=DEEPSEEK_CODE)
@given(case=router_cases(groups="any", score="sigmoid", bias="random", normalize=st.booleans()))
def test_with_a_bias_a_group_is_as_good_as_its_best_two(moe_router, case):
    """With a bias the groups with the largest sums of two scores with their biases are kept."""
    assert_routes(moe_router, case)


@requirement("moe_router.groups.negative-scores", source=DEEPSEEK_CODE)
@given(case=router_cases(groups="any", score="sigmoid", bias="negative", normalize=st.booleans()))
def test_no_expert_of_another_group_is_chosen_whatever_the_sign(moe_router, case):
    """Experts of groups that are not kept are not chosen where all scores are negative either."""
    assert_routes(moe_router, case)


# The scaling factor


@requirement("moe_router.scaling.weights", source=DEEPSEEK_CODE)
@given(case=router_cases(scaling=FACTORS, score=SCORES))
def test_the_factor_is_on_the_weights(moe_router, case):
    """Weights are multiplied by the scaling factor."""
    assert_routes(moe_router, case)


@requirement("moe_router.scaling.after-normalising", source=DEEPSEEK_CODE)
@given(case=router_cases(scaling=FACTORS, score=SCORES, normalize=True))
def test_the_factor_comes_after_normalising(moe_router, case):
    """Normalised weights are scaled at the end: they sum to the factor."""
    assert_sum_is_one(moe_router, case)
    assert_routes(moe_router, case)


@requirement("moe_router.options.any-combination", source=DEEPSEEK_CODE)
@given(
    case=router_cases(
        groups="any",
        score=SCORES,
        normalize=st.booleans(),
        bias=st.sampled_from([None, "random", "negative"]),
        scaling=st.sampled_from([1.0, 2.5]),
    )
)
def test_options_go_together(moe_router, case):
    """Every combination of score, normalisation, bias, groups and factor is routed as one by one."""
    assert_routes(moe_router, case)


# Gradients


@requirement("moe_router.gradient.logits", source=SWITCH)
@given(case=EVERY)
def test_gradients_reach_all_logits_that_weights_depend_on(moe_router, case):
    """Gradients reach the logits through the weights, those of experts not chosen too."""
    assert_gradient(moe_router, case)


@requirement("moe_router.gradient.one-expert", source=SWITCH, confusable=ONE)
@given(case=router_cases(top_k=1, score=SCORES))
def test_the_router_learns_with_one_expert_a_token(moe_router, case):
    """With ``top_k`` 1 and no normalisation the gradient of the logits is that of the score."""
    assert_gradient(moe_router, case)


@requirement("moe_router.gradient.options", source=DEEPSEEK)
@given(
    case=router_cases(
        score="sigmoid", normalize=st.booleans(), bias="random", scaling=st.sampled_from([1.0, 2.5])
    )
)
def test_gradients_have_factor_and_no_bias(moe_router, case):
    """Gradients are those of the weights: with the scaling factor, without the bias."""
    assert_gradient(moe_router, case)


# The load-balancing loss


@requirement("moe_router.loss.value", source=SWITCH)
@given(case=router_cases(loss=True, normalize=st.booleans()))
def test_the_loss_is_that_of_switch_transformers(moe_router, case):
    """The loss is experts · Σ f P, with the slots and the probabilities averaged over tokens."""
    assert_loss(moe_router, case)


@requirement("moe_router.loss.balanced", source=SWITCH)
@given(
    case=st.sampled_from([(6, 2), (8, 3), (12, 5)]).flatmap(
        lambda sizes: router_cases(
            loss=True,
            normalize=st.booleans(),
            logits="rolled",
            experts=sizes[0],
            top_k=sizes[1],
            tokens=st.sampled_from([2 * sizes[0], 3 * sizes[0]]),
        )
    )
)
def test_the_loss_of_balanced_routing_is_top_k(moe_router, case):
    """Where every expert has as many slots and as much probability, the loss is ``top_k``."""
    assert_loss_is(moe_router, case, lambda call: case.top_k)


@requirement("moe_router.loss.collapsed", source=SWITCH)
@given(case=router_cases(loss=True, logits="alike", normalize=st.booleans()))
def test_the_loss_of_collapsed_routing_is_larger(moe_router, case):
    """Where all tokens go to the same experts, the loss is experts times their probability."""
    assert_loss_is(moe_router, case, collapsed)


@requirement("moe_router.loss.gradient", source=SWITCH)
@given(case=router_cases(loss=True, normalize=st.booleans()))
def test_gradients_reach_the_logits_through_the_probabilities(moe_router, case):
    """The gradient of the loss is that of P alone, for f is a count, and is not zero."""
    assert_loss_gradient(moe_router, case)


@requirement("moe_router.loss.of-what-is-chosen", source=DEEPSEEK)
@given(
    case=router_cases(
        loss=True,
        score=SCORES,
        bias=st.sampled_from([None, "random"]),
        groups=st.sampled_from([None, "any"]),
        scaling=st.sampled_from([1.0, 2.5]),
    )
)
def test_the_loss_counts_the_experts_that_are_chosen(moe_router, case):
    """f counts the experts chosen by bias and groups; P is the softmax, whatever the scores are."""
    assert_loss(moe_router, case)


@requirement("moe_router.loss.changes-no-weights", source=SWITCH)
@given(case=PLAIN)
def test_asking_for_the_loss_changes_nothing(moe_router, case):
    """Weights and experts are the same bits whether the loss is asked for or not."""

    def check(call):
        asked = call.then(return_balancing_loss="True")
        loss, plain = run(moe_router, asked), run(moe_router, call)
        for found, before in zip(loss.by_expert(), plain.by_expert()):
            assert_identical(found, before, asked, because="asking for the loss changes the rest")

    in_every_lane(case, check, moe_router.device)


def collapsed(call) -> float:
    """Experts times the probability of the chosen ones, averaged over tokens."""
    logits, top_k = call.values()[0][0].detach().cpu().double(), call.case.top_k
    return float(len(logits[0]) * logits.softmax(-1).topk(top_k).values.sum() / len(logits))


# Tokens


@requirement("moe_router.tokens.permuted", source=MIXTRAL)
@given(case=EVERY)
def test_tokens_in_another_order_are_routed_alike(moe_router, case):
    """Tokens in another order have the same experts and weights, in that order."""
    assert_routes_edited(
        moe_router, case, "logits = logits[torch.randperm(len(logits), generator=g)]"
    )


@requirement("moe_router.tokens.alone", source=MIXTRAL)
@given(case=EVERY)
def test_a_token_alone_is_routed_as_among_others(moe_router, case):
    """A token's routing does not depend on which other tokens there are."""
    assert_tokens_independent(moe_router, case)


@requirement("moe_router.tokens.all-to-the-same", source=MIXTRAL)
@given(
    case=router_cases(
        logits="alike", tokens=st.sampled_from([17, 33]), score=SCORES, normalize=st.booleans()
    )
)
def test_no_token_is_dropped(moe_router, case):
    """However many tokens go to one expert, all of them do."""
    assert_routes(moe_router, case)


@requirement("moe_router.tokens.none", source=MIXTRAL)
@given(case=EVERY)
def test_no_tokens_have_no_weights(moe_router, case):
    """Logits [0, experts] give weights and indices [0, top_k]."""
    in_every_lane(
        case, lambda call: run(moe_router, call.then("logits = logits[:0]")), moe_router.device
    )


# The output


@requirement("moe_router.output.shape-dtype-device", source=QWEN)
@given(case=router_cases(score=SCORES, normalize=st.booleans(), loss=st.booleans()))
def test_weights_are_floating_and_experts_are_int64(moe_router, case):
    """Weights are in float32 or the dtype of the logits, experts int64, both [tokens, top_k]."""
    in_every_lane(case, lambda call: run(moe_router, call), moe_router.device)


@requirement("moe_router.output.inputs-unchanged", source=MIXTRAL)
@given(
    case=st.one_of(
        router_cases(normalize=True),
        router_cases(score=SCORES, normalize=True, bias="random", groups="any"),
    )
)
def test_logits_and_bias_are_not_changed(moe_router, case):
    """The logits and the bias of the caller are not changed, nor given back."""
    # The subject compares every input of every call; here the calls are those that tempt most.
    in_every_lane(case, lambda call: run(moe_router, call), moe_router.device)


@requirement("moe_router.output.deterministic", source=QWEN)
@given(case=EVERY)
def test_two_runs_are_identical(moe_router, case):
    """The same logits give the same bits, also after a call with others in between."""

    def check(call):
        first = run(moe_router, call)
        first = [part.detach().clone() for part in (first.weights_TK, first.indices_TK)]
        run(moe_router, call, call.values()[0][0].flip(0) * 2)
        again = run(moe_router, call)
        for found, before in zip((again.weights_TK, again.indices_TK), first):
            assert_identical(found, before, call, because="a second run differs")

    in_every_lane(case, check, moe_router.device)


@requirement("moe_router.inputs.any-strides", source=QWEN, level="extended")
@given(case=EVERY)
def test_logits_may_have_any_strides(moe_router, case):
    """Logits that are a transposed view are routed by index, not as they lie in memory."""
    assert_routes_edited(moe_router, case, "logits = logits.T.contiguous().T")


# What is refused


@requirement("moe_router.refuses.top-k", source=MIXTRAL)
@given(case=EVERY, more=st.sampled_from([0, -1, 1, 5]))
def test_a_top_k_that_cannot_be_is_refused(moe_router, case, more):
    """A ``top_k`` below 1 or above the number of experts raises."""
    assert_refused(moe_router, case, top_k=str(more if more < 1 else case.experts + more))


@requirement("moe_router.refuses.too-few-in-groups", source=DEEPSEEK_CODE)
@given(case=router_cases(groups="any", bias=st.sampled_from([None, "random"])))
def test_a_top_k_above_what_groups_keep_is_refused(moe_router, case):
    """A ``top_k`` above the number of experts of the groups that are kept raises."""
    number, kept = case.groups
    assert_refused(moe_router, case, top_k=str(kept * case.experts // number + 1))


@requirement("moe_router.refuses.groups", source=DEEPSEEK_CODE)
@given(case=router_cases(experts=st.sampled_from([8, 16])), number=st.sampled_from([3, 5, 7]))
def test_groups_that_do_not_divide_the_experts_are_refused(moe_router, case, number):
    """Groups that do not divide the experts raise."""
    assert_refused(moe_router, case, groups=repr((number, 2)), top_k="2")


@requirement("moe_router.refuses.bias-of-another-length", source=DEEPSEEK)
@given(
    case=router_cases(bias="random", score="sigmoid"),
    edit=st.sampled_from(["bias[:1]", "bias[:-1]", "torch.cat([bias, bias])"]),
)
def test_a_bias_of_another_length_is_refused(moe_router, case, edit):
    """A bias without exactly one number an expert raises, one that could be broadcast too."""
    assert_refused(moe_router, case, f"bias = {edit}")


@requirement("moe_router.refuses.unknown-score", source=DEEPSEEK)
@given(case=router_cases(), score=st.sampled_from(["tanh", "Sigmoid", "", "softplus"]))
def test_a_score_that_there_is_not_is_refused(moe_router, case, score):
    """A ``score`` that is neither ``"softmax"`` nor ``"sigmoid"`` raises."""
    assert_refused(moe_router, case, score=repr(score))
