"""The requirements of the contract ``loglikelihood``: scores that a request has alone.

The oracle runs the model on what stands before each token, alone and in float64.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.likelihood_cases import (
    COMPANY,
    LONG,
    ONE_CONTEXT,
    ONE_TOKEN,
    SHORT,
    SINGLE,
    SMALLEST,
    as_tuples,
    letters,
    likelihood_cases,
    nested,
    one_context,
    repeated,
    several,
    split_anywhere,
    truncated_cases,
    two_tokens,
    with_pad,
)
from conformance.harness.likelihood_checks import (
    assert_additive,
    assert_as_written,
    assert_autograd_back,
    assert_cross_entropy,
    assert_greedy,
    assert_in_both_orders,
    assert_mode_back,
    assert_mode_back_after_error,
    assert_new_weights,
    assert_no_graph,
    assert_none,
    assert_one_per_token,
    assert_other_model,
    assert_other_requests,
    assert_right,
    assert_rows,
    assert_sums_to_one,
    assert_tie,
    assert_tokens_right,
    assert_wide,
    assert_width,
    with_bad,
)
from conformance.harness.likelihood_subject import assert_refused
from conformance.harness.requirement import requirement

HARNESS = "EleutherAI/lm-evaluation-harness, lm_eval/models/huggingface.py"
LOSS = "huggingface/transformers, loss/loss_utils.py"

ALONE = {"one request", "equal lengths"}
"""What belongs to cases of one request."""

SIDES = st.sampled_from(["right", "left"])
BOTH = st.sampled_from(["states", "attention"])
BATCHED = st.integers(2, 4)
SIXTEEN = st.sampled_from(["bfloat16", "float16"])
EVERY = likelihood_cases(
    kind=BOTH,
    batch_size=st.integers(1, 7),
    padding_side=SIDES,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
BATCHES = likelihood_cases(kind=BOTH, batch_size=BATCHED)
LOOKED_UP = likelihood_cases(batch_size=BATCHED)
TRAINING = st.sampled_from(["training", "training but for dropout", "evaluation but for dropout"])


# Values


@requirement("loglikelihood.score.values", source=HARNESS, smoke=True)
@given(case=EVERY)
def test_scores_are_log_probabilities_of_continuations(loglikelihood, case):
    """The log probability of each token is that of a softmax after all before it, and no other."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.score.tokens", source=HARNESS)
@given(case=BATCHES)
def test_each_token_has_its_log_probability(loglikelihood, case):
    """``logprobs`` are those of the continuation's tokens, one by one and in their order."""
    assert_tokens_right(loglikelihood, case)


@requirement(
    "loglikelihood.score.one-per-token",
    source="facebookresearch/lingua#28",
    confusable={"contexts as long as continuations"},
)
@given(case=likelihood_cases(several(least=4), batch_size=BATCHED))
def test_there_are_as_many_numbers_as_tokens(loglikelihood, case):
    """A continuation of n tokens has n log probabilities: none of the context's, none missing."""
    assert_one_per_token(loglikelihood, case)


@requirement("loglikelihood.score.one-token", source=HARNESS)
@given(case=likelihood_cases(ONE_TOKEN, kind=BOTH, batch_size=st.integers(1, 3)))
def test_continuations_of_one_token(loglikelihood, case):
    """A continuation of one token is predicted by the last logits of its context."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.score.one-token-context", source=HARNESS)
@given(case=likelihood_cases(ONE_CONTEXT, kind=BOTH, batch_size=st.integers(1, 3)))
def test_contexts_of_one_token(loglikelihood, case):
    """A context of one token is enough: the first of the continuation is predicted by it."""
    assert_right(loglikelihood, case)


@requirement(
    "loglikelihood.score.two-tokens",
    source=HARNESS,
    confusable={*ALONE, "contexts as long as continuations"},
)
@given(case=likelihood_cases(st.just(((1, 1),)), batch_size=st.integers(1, 2)))
def test_one_token_after_one_token(loglikelihood, case):
    """The shortest request there is, a token after a token, has a score."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.score.cross-entropy", source=LOSS, smoke=True)
@given(case=likelihood_cases(kind=BOTH, batch_size=BATCHED))
def test_score_is_the_loss_of_a_text_with_a_masked_context(loglikelihood, case):
    """A score is −cross entropy of the shifted labels, in sum, where the context's are −100."""
    assert_cross_entropy(loglikelihood, case)


@requirement("loglikelihood.score.additive", source=HARNESS)
@given(case=likelihood_cases(several(SHORT, most=4), batch_size=BATCHED))
def test_scores_are_additive_over_tokens(loglikelihood, case):
    """A score is the sum of those of its tokens, each a continuation of all before it."""
    assert_additive(loglikelihood, case)


@requirement("loglikelihood.score.probabilities", source=HARNESS, confusable=ALONE)
@given(case=likelihood_cases(SINGLE, batch_size=BATCHED, kind=BOTH))
def test_probabilities_of_all_tokens_add_up_to_one(loglikelihood, case):
    """The probabilities of all continuations of one token add up to 1."""
    assert_sums_to_one(loglikelihood, case, 1)


@requirement("loglikelihood.score.probabilities-of-pairs", source=HARNESS, confusable=ALONE)
@given(case=likelihood_cases(SINGLE, batch_size=BATCHED, vocab=st.integers(3, 4)))
def test_probabilities_of_all_pairs_add_up_to_one(loglikelihood, case):
    """The probabilities of all continuations of two tokens add up to 1."""
    assert_sums_to_one(loglikelihood, case, 2)


# Batches


@requirement("loglikelihood.batch.of-one", source=HARNESS)
@given(case=likelihood_cases(kind=BOTH))
def test_batches_of_one(loglikelihood, case):
    """Each request alone in a batch has its score."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.batch.last-is-smaller", source=HARNESS)
@given(case=likelihood_cases(several(least=3, most=3) | several(least=5, most=5), batch_size=2))
def test_last_batch_is_smaller(loglikelihood, case):
    """Requests that do not fill the last batch have their scores, each once."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.batch.larger-than-requests", source=HARNESS)
@given(case=likelihood_cases(kind=BOTH, batch_size=st.sampled_from([7, 16, 64])))
def test_batch_size_above_the_number_of_requests(loglikelihood, case):
    """A batch may hold more requests than there are."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.batch.longer-company", source="allenai/open-instruct#75")
@given(case=likelihood_cases(COMPANY, kind=BOTH, batch_size=st.integers(2, 5)))
def test_short_requests_among_long_ones(loglikelihood, case):
    """A short request has the score that it has alone in a batch of much longer ones."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.batch.at-most-so-many-rows", source=HARNESS, level="extended")
@given(case=likelihood_cases(several(least=5), batch_size=BATCHED))
def test_no_batch_has_more_rows(loglikelihood, case):
    """The model is never given more rows than ``batch_size``, for which there may be no memory."""
    assert_rows(loglikelihood, case)


@requirement("loglikelihood.order.of-requests", source=HARNESS)
@given(case=likelihood_cases(several(least=4), batch_size=st.integers(1, 3)))
def test_scores_are_in_the_order_of_requests(loglikelihood, case):
    """Scores are in the order of the requests, whatever order they are run in."""
    assert_in_both_orders(loglikelihood, case)


@requirement("loglikelihood.order.repeated", source=HARNESS)
@given(case=likelihood_cases(build=repeated, batch_size=st.integers(1, 4)))
def test_a_request_that_comes_again_has_its_score_again(loglikelihood, case):
    """Requests that come several times have as many scores, each in its place."""
    assert_right(loglikelihood, case)


# Padding


@requirement("loglikelihood.padding.right", source="bigscience-workshop/t-zero#29")
@given(case=likelihood_cases(COMPANY, kind=BOTH, batch_size=BATCHED))
def test_padding_on_the_right(loglikelihood, case):
    """Padding behind a request changes nothing, nor is it what is scored."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.padding.left", source="Stability-AI/lm-evaluation-harness#102")
@given(case=likelihood_cases(COMPANY, kind=BOTH, batch_size=BATCHED, padding_side="left"))
def test_padding_on_the_left(loglikelihood, case):
    """Padding before a request is not attended to, and its first token has position 0."""
    assert_right(loglikelihood, case)


@requirement(
    "loglikelihood.padding.real-token",
    source="mugezhang-1/modded-ipagpt-training, evaluate_small.py",
)
@given(case=likelihood_cases(build=with_pad, batch_size=BATCHED, padding_side=SIDES))
def test_token_that_pads_is_a_token_in_requests(loglikelihood, case):
    """``pad_id`` in contexts and continuations is a token like any other."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.padding.any-token", source=HARNESS)
@given(
    case=likelihood_cases(
        COMPANY, kind=BOTH, batch_size=BATCHED, padding_side=SIDES, pad_id=st.integers(1, 10)
    )
)
def test_any_token_pads(loglikelihood, case):
    """Scores do not depend on ``pad_id``, which may be any token."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.padding.both-real", source=HARNESS)
@given(case=likelihood_cases(build=two_tokens, batch_size=BATCHED, padding_side=SIDES, kind=BOTH))
def test_requests_of_two_tokens_alone(loglikelihood, case):
    """Requests in which the same few tokens come again and again have scores by their places."""
    assert_right(loglikelihood, case)


# What requests share


@requirement("loglikelihood.sharing.context", source="NVIDIA/Model-Optimizer#1577")
@given(case=likelihood_cases(build=one_context, kind=BOTH, batch_size=st.integers(1, 3)))
def test_continuations_of_one_context(loglikelihood, case):
    """Continuations of one context, short and long, have each its score."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.sharing.choices", source=HARNESS)
@given(case=likelihood_cases(build=letters, batch_size=st.integers(1, 4)))
def test_single_tokens_to_choose_from(loglikelihood, case):
    """Multiple choice by one token: the same few continuations after several contexts."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.sharing.prefix", source="NVIDIA/Model-Optimizer#2066")
@given(case=likelihood_cases(build=nested, kind=BOTH, batch_size=st.integers(1, 3)))
def test_contexts_that_begin_alike(loglikelihood, case):
    """Requests of one text, one the beginning of another, have each the score of its own part."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.sharing.split-anywhere", source=HARNESS)
@given(case=likelihood_cases(several(least=2), build=split_anywhere, batch_size=st.integers(1, 4)))
def test_requests_that_differ_only_in_where_they_are_split(loglikelihood, case):
    """One text with its continuation beginning here or there has other scores."""
    assert_right(loglikelihood, case)


# Truncation


@requirement("loglikelihood.truncation.around-the-limit", source="facebookresearch/lingua#28")
@given(case=truncated_cases(shorter=True, batch_size=st.integers(1, 4)))
def test_lengths_around_the_limit(loglikelihood, case):
    """Of n tokens n − 1 are given to the model, so that nothing is lost up to one above the limit."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.truncation.default", source=HARNESS)
@given(case=truncated_cases(batch_size=st.integers(1, 4), kind=BOTH))
def test_limit_is_that_of_the_model(loglikelihood, case):
    """Without ``max_length`` the limit is the model's ``max_position_embeddings``."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.truncation.far-beyond", source=HARNESS)
@given(
    case=truncated_cases(
        st.lists(st.integers(4, 40), min_size=2, max_size=3, unique=True),
        shorter=True,
        batch_size=st.integers(1, 4),
        kind=BOTH,
    )
)
def test_contexts_far_beyond_the_limit(loglikelihood, case):
    """However long the context is, it is its beginning that is lost."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.truncation.continuation-fills", source=HARNESS)
@given(case=truncated_cases(shorter=True, fills=True, batch_size=st.integers(1, 3)))
def test_continuation_as_long_as_the_limit(loglikelihood, case):
    """A continuation of ``max_length`` tokens keeps the last token of its context, and is scored."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.truncation.padded", source=HARNESS)
@given(case=truncated_cases(shorter=True, batch_size=BATCHED, padding_side="left", kind=BOTH))
def test_truncated_requests_among_padded_ones(loglikelihood, case):
    """Truncated requests in one batch with short ones, which are padded on the left."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.truncation.width", source=HARNESS)
@given(case=truncated_cases(shorter=True, batch_size=st.integers(1, 4)))
def test_model_is_given_no_more_than_the_limit(loglikelihood, case):
    """The model is never given more than ``max_length`` tokens at once."""
    assert_width(loglikelihood, case)


# Greedy


@requirement("loglikelihood.greedy.most-likely", source=HARNESS)
@given(case=BATCHES)
def test_most_likely_continuations_are_greedy(loglikelihood, case):
    """A continuation of which every token is the most likely one is greedy."""
    assert_greedy(loglikelihood, case)


@requirement("loglikelihood.greedy.first-is-other", source=HARNESS)
@given(case=LOOKED_UP)
def test_another_first_token_is_not_greedy(loglikelihood, case):
    """A continuation is not greedy if its first token is not, though all others are."""
    assert_greedy(loglikelihood, case, wrong=("first",))


@requirement("loglikelihood.greedy.last-is-other", source=HARNESS)
@given(case=LOOKED_UP)
def test_another_last_token_is_not_greedy(loglikelihood, case):
    """A continuation is not greedy if its last token is not, though all others are."""
    assert_greedy(loglikelihood, case, wrong=("last",))


@requirement("loglikelihood.greedy.each-request", source=HARNESS)
@given(case=likelihood_cases(several(least=4), batch_size=BATCHED, padding_side=SIDES))
def test_each_request_is_greedy_or_not(loglikelihood, case):
    """Greedy and other continuations in one batch are told apart."""
    assert_greedy(loglikelihood, case, wrong=(None, "last", None, "first"))


@requirement("loglikelihood.greedy.small-differences", source=HARNESS)
@given(case=likelihood_cases(batch_size=BATCHED, dtype="bfloat16"))
def test_most_likely_by_little(loglikelihood, case):
    """What is most likely by little is told from what is not: by logits, or float32 and wider."""
    little = "model.logits_SV.data.mul_(2**-8)"
    assert_greedy(loglikelihood, case, little, wrong=(None, "last"))


@requirement("loglikelihood.greedy.ties", source=HARNESS, confusable=ALONE)
@given(case=likelihood_cases(SINGLE, batch_size=BATCHED))
def test_one_of_the_most_likely_is_greedy(loglikelihood, case):
    """Of tokens that are equally likely, and more than all others, one is greedy, or each."""
    assert_tie(loglikelihood, case)


# Numerics


@requirement("loglikelihood.numerics.sixteen-bits", source=HARNESS)
@given(case=likelihood_cases(batch_size=BATCHED, padding_side=SIDES, dtype=SIXTEEN))
def test_logits_of_sixteen_bits(loglikelihood, case):
    """Logits of 16 bits become log probabilities in float32 or wider: no rounding is added."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.numerics.wide-scores", source=HARNESS)
@given(case=LOOKED_UP)
def test_scores_are_wide(loglikelihood, case):
    """``logprobs`` are float32 or wider, whatever the model computes in."""
    assert_wide(loglikelihood, case)


@requirement("loglikelihood.numerics.large-logits", source=HARNESS)
@given(case=LOOKED_UP)
def test_large_logits(loglikelihood, case):
    """Logits of tens of thousands have finite log probabilities."""
    assert_right(loglikelihood, case, "model.logits_SV.data.mul_(1e4)")


@requirement("loglikelihood.numerics.impossible-tokens", source=HARNESS)
@given(case=LOOKED_UP)
def test_tokens_that_cannot_be(loglikelihood, case):
    """A logit of −inf is a probability of 0: its log is −inf, and others are as if it were not."""
    assert_right(loglikelihood, case, "model.logits_SV.data[:, 1::4] = -torch.inf")


# What is left behind


@requirement("loglikelihood.mode.evaluation", source=HARNESS)
@given(case=likelihood_cases(kind=BOTH, batch_size=BATCHED, mode=TRAINING))
def test_model_is_run_in_evaluation_mode(loglikelihood, case):
    """Dropout is off, whatever mode the model is given in, and whatever mode its parts have."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.mode.restored", source=HARNESS)
@given(case=likelihood_cases(batch_size=BATCHED, mode=st.sampled_from(["training", "evaluation"])))
def test_model_has_its_mode_back(loglikelihood, case):
    """A model that was in training mode is so afterwards, and one that was not is not."""
    assert_mode_back(loglikelihood, case)


@requirement("loglikelihood.mode.of-parts-restored", source=HARNESS, level="extended")
@given(case=likelihood_cases(batch_size=BATCHED, mode=TRAINING))
def test_every_part_has_its_own_mode_back(loglikelihood, case):
    """A part that has another mode than the model has that mode afterwards."""
    assert_mode_back(loglikelihood, case)


@requirement("loglikelihood.mode.restored-after-error", source=HARNESS, level="extended")
@given(case=likelihood_cases(batch_size=BATCHED, mode="training"))
def test_model_has_its_mode_back_after_an_error(loglikelihood, case):
    """A model that raises has its mode back too, and its exception is not kept back."""
    assert_mode_back_after_error(loglikelihood, case)


@requirement("loglikelihood.gradients.none", source=HARNESS)
@given(case=likelihood_cases(kind=BOTH, batch_size=BATCHED))
def test_nothing_is_recorded_for_gradients(loglikelihood, case):
    """The model is run without gradients, and log probabilities require none."""
    assert_no_graph(loglikelihood, case)


@requirement("loglikelihood.gradients.switch-restored", source=HARNESS)
@given(case=LOOKED_UP)
def test_autograd_is_on_again(loglikelihood, case):
    """Whoever trains goes on: autograd records afterwards if it did before."""
    assert_autograd_back(loglikelihood, case)


@requirement("loglikelihood.state.new-weights", source="LawrenceRLiu/MoE_Factorize_Compress")
@given(case=likelihood_cases(kind=BOTH, batch_size=st.integers(1, 3)))
def test_new_weights_are_seen(loglikelihood, case):
    """A model whose weights were changed in place is run anew: nothing is kept from call to call."""
    assert_new_weights(loglikelihood, case)


@requirement("loglikelihood.state.other-model", source=HARNESS)
@given(case=LOOKED_UP)
def test_another_model_has_its_own_scores(loglikelihood, case):
    """The same requests to another model have other scores."""
    assert_other_model(loglikelihood, case)


@requirement("loglikelihood.state.other-requests", source=HARNESS)
@given(case=LOOKED_UP)
def test_other_requests_have_their_own_scores(loglikelihood, case):
    """Other requests of the same lengths to the same model have their own scores."""
    assert_other_requests(loglikelihood, case)


# Requests


@requirement("loglikelihood.requests.none", source=HARNESS)
@given(case=LOOKED_UP)
def test_no_requests_have_no_scores(loglikelihood, case):
    """No requests have no scores."""
    assert_none(loglikelihood, case)


@requirement("loglikelihood.requests.tuples", source=HARNESS)
@given(case=LOOKED_UP)
def test_requests_are_any_sequences(loglikelihood, case):
    """Requests and ids may be tuples as well as lists."""
    assert_as_written(loglikelihood, case, as_tuples)


@requirement("loglikelihood.requests.unchanged", source=HARNESS)
@given(case=likelihood_cases(several(LONG | SMALLEST), kind=BOTH, batch_size=BATCHED, max_length=9))
def test_requests_and_model_are_not_changed(loglikelihood, case):
    """Neither the lists of the requests nor the weights of the model are changed."""
    assert_right(loglikelihood, case)


@requirement("loglikelihood.refused.empty-context", source=HARNESS)
@given(case=LOOKED_UP)
def test_empty_context_is_refused(loglikelihood, case):
    """An empty context raises: nothing predicts the first token."""
    call = with_bad(case, ((), (1, 2))).call(device=loglikelihood.device)
    assert_refused(loglikelihood, call, "an empty context")


@requirement("loglikelihood.refused.empty-continuation", source=HARNESS)
@given(case=LOOKED_UP)
def test_empty_continuation_is_refused(loglikelihood, case):
    """An empty continuation raises: there is nothing to score."""
    call = with_bad(case, ((1, 2), ())).call(device=loglikelihood.device)
    assert_refused(loglikelihood, call, "an empty continuation")


@requirement("loglikelihood.refused.long-continuation", source=HARNESS)
@given(case=likelihood_cases(batch_size=BATCHED, max_length=st.none() | st.integers(5, 9)))
def test_continuation_beyond_the_limit_is_refused(loglikelihood, case):
    """A continuation of more than ``max_length`` tokens raises, for its beginning would be lost."""
    for more in (1, 2):
        call = with_bad(case, ((1, 2), (3,) * (case.limit + more))).call(
            device=loglikelihood.device
        )
        assert_refused(loglikelihood, call, f"a continuation of {case.limit + more} tokens")


@requirement("loglikelihood.refused.id-outside-vocabulary", source=HARNESS)
@given(case=LOOKED_UP)
def test_id_outside_the_vocabulary_is_refused(loglikelihood, case):
    """An id that is not in the vocabulary raises, also that of the last token, which is only scored."""
    for id in (case.vocab, -1):
        for request in (((1, id, 2), (3,)), ((1, 2), (id, 3)), ((1, 2), (3, id))):
            call = with_bad(case, request).call(device=loglikelihood.device)
            assert_refused(loglikelihood, call, f"the id {id} in {request}")


@requirement("loglikelihood.refused.id-that-is-lost", source=HARNESS, level="extended")
@given(case=likelihood_cases(batch_size=BATCHED, max_length=st.integers(6, 9)))
def test_id_outside_the_vocabulary_is_refused_where_it_is_lost(loglikelihood, case):
    """An id that is not in the vocabulary raises also where it is truncated away."""
    request = ((case.vocab, *(1,) * case.limit), (2, 3))
    call = with_bad(case, request).call(device=loglikelihood.device)
    assert_refused(loglikelihood, call, f"the id {case.vocab} in {request}")


@requirement("loglikelihood.refused.padding-side", source=HARNESS)
@given(
    case=likelihood_cases(batch_size=BATCHED, padding_side=st.sampled_from(["", "both", "LEFT"]))
)
def test_another_padding_side_is_refused(loglikelihood, case):
    """A ``padding_side`` that is neither ``"right"`` nor ``"left"`` raises."""
    assert_refused(loglikelihood, case.call(device=loglikelihood.device), case.padding_side)
