"""The requirements of the contract ``causal_lm``: Qwen2 on the ranks of a group."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.lm_checks import (
    assert_any_seed,
    assert_bias_counts,
    assert_cache,
    assert_cache_used_twice,
    assert_causal,
    assert_chunks,
    assert_default_dtype,
    assert_default_head_dim,
    assert_default_positions,
    assert_directory_unchanged,
    assert_empty_refused,
    assert_equal_tokens,
    assert_even_attention,
    assert_far_positions_refused,
    assert_fault_of_one_rank_refused,
    assert_function,
    assert_gaps,
    assert_ids_refused,
    assert_masks_checked,
    assert_missing_refused,
    assert_norm_epsilon,
    assert_norm_weights,
    assert_offset,
    assert_one_by_one,
    assert_output_bias_refused,
    assert_outputs_kept,
    assert_padded_steps,
    assert_padding,
    assert_padding_ids_ignored,
    assert_padding_then_decoding,
    assert_prompts_independent,
    assert_ranks_refused,
    assert_rounded_before_weight,
    assert_rows_independent,
    assert_two_reductions,
    assert_up_to_the_limit,
    parts_of,
)
from conformance.harness.lm_generation import (
    assert_cold_is_greedy,
    assert_eos_list,
    assert_eos_of_config,
    assert_eos_of_generation_config,
    assert_eos_overrules,
    assert_eos_scalar,
    assert_generation_repeats,
    assert_greedy,
    assert_in_vocabulary,
    assert_nothing_new,
    assert_padded_prompts,
    assert_ranks_sample_alike,
    assert_temperature,
    assert_temperature_refused,
)
from conformance.harness.qwen2_cases import extras, qwen_cases
from conformance.harness.requirement import requirement

QWEN2 = "transformers models/qwen2; Qwen2 (arXiv 2407.10671)"
MEGATRON = "Megatron-LM (arXiv 1909.08053)"
REPLICAS = "vLLM QKVParallelLinear"
ROTARY = "RoFormer (arXiv 2104.09864)"
GENERATION = "transformers generation/utils"

ANY = (1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 1, 1, 1, 1, 4)
"""Numbers of ranks of rules that are not about ranks; one costs the least."""
SEVERAL = (2, 2, 3, 2, 4)
ONE_RANK = {"one rank"}
"""What rules that are not about ranks are not told by."""
SHALLOW = st.sampled_from([1, 2])


def cases(ranks=ANY, layers=SHALLOW, **fixed):
    """Cases of one or two blocks, unless a rule is about more."""
    return qwen_cases(ranks, layers=layers, **fixed)


# The function


@requirement("causal_lm.function.one-rank", source=QWEN2, smoke=True, confusable=ONE_RANK)
@given(case=cases(ranks=(1,), layers=st.sampled_from([2, 3, 1])))
def test_one_rank_computes_qwen2(causal_lm, case):
    """On one rank, without a group, the logits are those of Qwen2."""
    assert_function(causal_lm, case)


@requirement("causal_lm.function.two-ranks", source=MEGATRON, smoke=True, several_ranks=True)
@given(case=cases(ranks=(2,)))
def test_two_ranks_compute_qwen2(causal_lm, case):
    """On two ranks the logits are those of the whole model."""
    assert_function(causal_lm, case)


@requirement("causal_lm.function.three-ranks", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=(3,)))
def test_three_ranks_compute_qwen2(causal_lm, case):
    """On three ranks, which do not divide the vocabulary, the logits are those of the whole model."""
    assert_function(causal_lm, case)


@requirement("causal_lm.function.four-ranks", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=(4,), heads=((8, 4, 6), (4, 2, 16), (8, 2, 12))))
def test_four_ranks_compute_qwen2(causal_lm, case):
    """On four ranks the logits are those of the whole model."""
    assert_function(causal_lm, case)


@requirement("causal_lm.function.replicated-heads", source=REPLICAS, several_ranks=True)
@given(case=cases(ranks=(4,), heads=((8, 2, 12), (4, 2, 16))))
def test_key_value_heads_are_replicated(causal_lm, case):
    """With more ranks than key/value heads, consecutive ranks share the head that they read."""
    assert_function(causal_lm, case)


@requirement("causal_lm.function.same-on-every-rank", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=SEVERAL, stored=st.sampled_from(["float32", "bfloat16"])))
def test_every_rank_has_the_same_logits(causal_lm, case):
    """The logits are the same on every rank, bit for bit."""
    assert_function(causal_lm, case)


@requirement("causal_lm.heads.grouped", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(ranks=(1, 2), heads=((8, 4, 6), (6, 3, 10), (8, 2, 12), (6, 2, 8))))
def test_query_heads_share_key_value_heads(causal_lm, case):
    """Query head h reads key/value head h // (heads / key/value heads)."""
    assert_function(causal_lm, case)


@requirement("causal_lm.heads.explicit-width", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_head_width_is_that_of_the_configuration(causal_lm, case):
    """Heads have the width that ``head_dim`` says, whatever the width of the model."""
    assert_function(causal_lm, case)


SQUARE = st.sampled_from([(4, 2, 14, 56), (4, 2, 10, 40), (6, 3, 12, 72), (2, 2, 20, 40)])


@requirement("causal_lm.heads.default-width", source=QWEN2, confusable=ONE_RANK)
@given(
    case=SQUARE.flatmap(
        lambda sizes: cases(ranks=(1, 1, sizes[1]), heads=(sizes[:3],), hidden=sizes[3])
    )
)
def test_head_width_defaults_to_that_of_the_model_over_the_heads(causal_lm, case):
    """Without ``head_dim`` heads are as wide as the model divided by their number."""
    assert_default_head_dim(causal_lm, case)


@requirement("causal_lm.head.tied", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(tied=True))
def test_tied_head_is_the_embedding(causal_lm, case):
    """With ``tie_word_embeddings`` and no head in the file, the head is the embedding."""
    assert_function(causal_lm, case)


@requirement("causal_lm.head.untied", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(tied=False))
def test_untied_head_is_its_own(causal_lm, case):
    """Without ``tie_word_embeddings`` the head is the one of the file."""
    assert_function(causal_lm, case)


@requirement("causal_lm.theta.rope-parameters", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(theta_at="rope_parameters", tokens=st.sampled_from([24, 31])))
def test_theta_is_read_from_rope_parameters(causal_lm, case):
    """The base of the rotary embedding is read from ``rope_parameters``, as transformers 5 has it."""
    assert_function(causal_lm, case)


@requirement("causal_lm.theta.top-level", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(theta_at="top", tokens=st.sampled_from([24, 31])))
def test_theta_is_read_from_the_top(causal_lm, case):
    """The base of the rotary embedding is read from ``rope_theta`` at the top."""
    assert_function(causal_lm, case)


# Dtypes


@requirement("causal_lm.dtype.bfloat16", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(stored="bfloat16"))
def test_bfloat16_rounds_as_bfloat16_does(causal_lm, case):
    """A model in bfloat16 is off by rounding alone, and gives bfloat16."""
    assert_function(causal_lm, case)


@requirement("causal_lm.dtype.float16", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(stored=st.sampled_from(["float32", "float16"])))
def test_float16_rounds_as_float16_does(causal_lm, case):
    """A model in float16 is off by rounding alone, and gives float16."""
    assert_function(causal_lm, case, dtype=torch.float16)


@requirement("causal_lm.dtype.float64", source=QWEN2, level="extended", confusable=ONE_RANK)
@given(case=cases())
def test_float64_is_float64_throughout(causal_lm, case):
    """A model in float64 computes every step in float64."""
    assert_function(causal_lm, case, dtype=torch.float64)


@requirement("causal_lm.dtype.of-the-configuration", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(stored=st.sampled_from(["bfloat16", "float16"])))
def test_dtype_defaults_to_that_of_the_configuration(causal_lm, case):
    """Without a dtype being asked for, the model has that of ``config.json``."""
    assert_default_dtype(causal_lm, case)


@requirement("causal_lm.dtype.asked-for", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(stored=st.sampled_from(["bfloat16", "float16"])))
def test_dtype_that_is_asked_for_is_taken(causal_lm, case):
    """The model has the dtype that was asked for, whatever is stored."""
    assert_function(causal_lm, case, dtype=torch.float32)


@requirement("causal_lm.dtype.many-keys", source=QWEN2, confusable={"one rank", "one of batch"})
@given(
    case=cases(
        ranks=(1, 1, 2), layers=1, batch=1, tokens=st.sampled_from([320, 340]), stored="bfloat16"
    )
)
def test_softmax_of_many_keys_does_not_lose_any(causal_lm, case):
    """In bfloat16 attention over many keys of like weight is off by rounding alone."""
    assert_even_attention(causal_lm, case)


# Biases and norms


@requirement("causal_lm.bias.query", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_query_bias_counts(causal_lm, case):
    """The bias of the query projection is added."""
    assert_bias_counts(causal_lm, case, "q")


@requirement("causal_lm.bias.key", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_key_bias_counts(causal_lm, case):
    """The bias of the key projection is added, before the rotation."""
    assert_bias_counts(causal_lm, case, "k")


@requirement("causal_lm.bias.value", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_value_bias_counts(causal_lm, case):
    """The bias of the value projection is added."""
    assert_bias_counts(causal_lm, case, "v")


@requirement("causal_lm.norm.weights", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_norm_weights_count(causal_lm, case):
    """Each of the norms has a weight of its own."""
    assert_norm_weights(causal_lm, case)


@requirement("causal_lm.norm.epsilon", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(layers=1))
def test_epsilon_is_under_the_root(causal_lm, case):
    """``rms_norm_eps`` is added to the mean square, under the root."""
    assert_norm_epsilon(causal_lm, case)


@requirement(
    "causal_lm.norm.rounded-before-the-weight", source=QWEN2, level="extended", confusable=ONE_RANK
)
@given(case=cases(layers=1, tied=False))
def test_norms_are_rounded_before_their_weight(causal_lm, case):
    """A norm is rounded to the model's dtype before it is multiplied with its weight."""
    assert_rounded_before_weight(causal_lm, case)


# The cache


@requirement("causal_lm.cache.one-by-one", source=QWEN2, smoke=True, confusable=ONE_RANK)
@given(case=cases(tokens=st.sampled_from([5, 7])))
def test_decoding_equals_prefill(causal_lm, case):
    """Tokens one by one with a cache have the logits that they have all at once."""
    assert_one_by_one(causal_lm, case)


@requirement("causal_lm.cache.chunks", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(tokens=st.sampled_from([9, 7, 11])))
def test_chunks_equal_prefill(causal_lm, case):
    """Chunks of any size with a cache have the logits that they have all at once."""
    assert_chunks(causal_lm, case, parts_of(case))


@requirement("causal_lm.cache.contents", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(ranks=(1, 2, 3, 4)))
def test_cache_has_the_heads_of_the_rank(causal_lm, case):
    """The cache has rotated keys, and values, of the rank's heads, for all tokens so far."""
    assert_cache(causal_lm, case)


@requirement("causal_lm.cache.used-twice", source=QWEN2, level="extended", confusable=ONE_RANK)
@given(case=cases())
def test_cache_can_be_gone_on_from_twice(causal_lm, case):
    """A cache is as it was after it has been gone on from."""
    assert_cache_used_twice(causal_lm, case)


@requirement("causal_lm.cache.prompts-independent", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_prompts_are_independent(causal_lm, case):
    """A prompt without a cache begins anew, whatever was computed before, long or short."""
    assert_prompts_independent(causal_lm, case)


@requirement("causal_lm.output.kept", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_outputs_are_not_overwritten(causal_lm, case):
    """Logits that were given stay as they are when the model is called again."""
    assert_outputs_kept(causal_lm, case)


# What influences a token, and what does not


@requirement("causal_lm.causal.later-tokens", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_later_tokens_have_no_influence(causal_lm, case):
    """Later tokens leave the logits of earlier ones as they are, bit for bit."""
    assert_causal(causal_lm, case)


@requirement("causal_lm.batch.rows-independent", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_rows_of_a_batch_are_independent(causal_lm, case):
    """Rows of a batch do not influence each other, and a row alone has the same logits."""
    assert_rows_independent(causal_lm, case)


@requirement("causal_lm.batch.one", source=QWEN2, confusable={"one rank", "one of batch"})
@given(case=cases(batch=1))
def test_batch_of_one(causal_lm, case):
    """A batch may have one row."""
    assert_function(causal_lm, case)


@requirement(
    "causal_lm.tokens.one", source=QWEN2, confusable={"one rank", "as many tokens as heads"}
)
@given(case=cases(tokens=1))
def test_one_token(causal_lm, case):
    """A prompt may have one token."""
    assert_function(causal_lm, case)


@requirement(
    "causal_lm.tokens.as-many-as-heads",
    source=QWEN2,
    confusable={"one rank", "as many tokens as heads"},
)
@given(case=cases(heads=((4, 2, 16), (6, 3, 10), (8, 2, 12)), tokens=st.sampled_from([2, 4, 6, 8])))
def test_as_many_tokens_as_heads(causal_lm, case):
    """Tokens are not taken for heads where there are as many."""
    assert_function(causal_lm, case)


@requirement("causal_lm.tokens.all-equal", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_equal_tokens(causal_lm, case):
    """A prompt may repeat one token; its logits are finite."""
    assert_equal_tokens(causal_lm, case)


@requirement("causal_lm.tokens.many", source=QWEN2, confusable={"one rank", "one of batch"})
@given(case=cases(layers=1, tokens=st.sampled_from([300, 260]), batch=1, ranks=(1, 1, 2)))
def test_many_tokens(causal_lm, case):
    """Prompts may be longer than any usual block of masks or tables."""
    assert_function(causal_lm, case)


@requirement("causal_lm.tokens.up-to-the-limit", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(tokens=9, max_positions=9))
def test_as_many_tokens_as_positions(causal_lm, case):
    """A text may have ``max_position_embeddings`` tokens."""
    assert_up_to_the_limit(causal_lm, case)


# Padding


@requirement("causal_lm.padding.left", source=GENERATION, smoke=True, confusable=ONE_RANK)
@given(case=cases())
def test_left_padding_is_not_seen(causal_lm, case):
    """Padding on the left is not seen and takes no positions."""
    assert_padding(causal_lm, case, "left")


@requirement("causal_lm.padding.right", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_right_padding_is_not_seen(causal_lm, case):
    """Padding on the right is not seen."""
    assert_padding(causal_lm, case, "right")


@requirement("causal_lm.padding.mixed", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_mixed_padding_is_not_seen(causal_lm, case):
    """Padding on the left, on the right and inside is not seen and takes no positions."""
    assert_padding(causal_lm, case, "mixed")


@requirement("causal_lm.padding.any-ids", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_ids_of_padding_do_not_matter(causal_lm, case):
    """Padding may hold any ids: the logits of real tokens are the same, bit for bit."""
    assert_padding_ids_ignored(causal_lm, case)


@requirement("causal_lm.padding.left-then-decoding", source=GENERATION, confusable=ONE_RANK)
@given(case=cases(tokens=st.sampled_from([9, 11])))
def test_decoding_after_left_padding(causal_lm, case):
    """Tokens that follow a prompt with padding on the left do not see it."""
    assert_padding_then_decoding(causal_lm, case, "left")


@requirement("causal_lm.padding.right-then-decoding", source=GENERATION, confusable=ONE_RANK)
@given(case=cases(tokens=st.sampled_from([9, 11])))
def test_decoding_after_right_padding(causal_lm, case):
    """Tokens that follow a prompt with padding on the right do not see it, and take its positions."""
    assert_padding_then_decoding(causal_lm, case, "right")


@requirement("causal_lm.padding.whole-steps", source=GENERATION, confusable=ONE_RANK)
@given(case=cases(tokens=st.sampled_from([9, 7])))
def test_rows_may_pause(causal_lm, case):
    """A row may have nothing but padding in a step; other rows, and its own later tokens, are right."""
    assert_padded_steps(causal_lm, case)


# Positions


@requirement("causal_lm.positions.default", source=ROTARY, confusable=ONE_RANK)
@given(case=cases())
def test_positions_count_from_zero(causal_lm, case):
    """Without positions they count from 0; given outright they make no difference."""
    assert_default_positions(causal_lm, case)


@requirement("causal_lm.positions.offset", source=ROTARY, confusable=ONE_RANK)
@given(case=cases(extra=extras(offset=st.integers(1, 150))))
def test_positions_are_relative(causal_lm, case):
    """The same number added to all positions of a row leaves its logits as they are."""
    assert_offset(causal_lm, case)


@requirement("causal_lm.positions.gaps", source=ROTARY, confusable=ONE_RANK)
@given(case=cases())
def test_positions_may_have_gaps(causal_lm, case):
    """Tokens are rotated to the positions that are given, at once and with a cache."""
    assert_gaps(causal_lm, case)


# What is refused


@requirement("causal_lm.refuses.id-beyond-the-vocabulary", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(extra=extras(beyond=st.integers(0, 3))))
def test_ids_beyond_the_vocabulary_are_refused(causal_lm, case):
    """An id that is not below the size of the vocabulary raises an exception on every rank."""
    assert_ids_refused(causal_lm, case, case.vocab + case.drawn["beyond"])


@requirement("causal_lm.refuses.negative-id", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(extra=extras(below=st.integers(1, 3))))
def test_negative_ids_are_refused(causal_lm, case):
    """A negative id raises an exception on every rank."""
    assert_ids_refused(causal_lm, case, -case.drawn["below"])


@requirement("causal_lm.refuses.empty", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_empty_sequences_are_refused(causal_lm, case):
    """A sequence without tokens raises an exception on every rank."""
    assert_empty_refused(causal_lm, case)


@requirement("causal_lm.refuses.far-position", source=QWEN2, level="extended", confusable=ONE_RANK)
@given(case=cases(max_positions=12))
def test_positions_beyond_the_limit_are_refused(causal_lm, case):
    """A position that is not below ``max_position_embeddings`` raises an exception."""
    assert_far_positions_refused(causal_lm, case)


@requirement(
    "causal_lm.refuses.mask-shape", source=GENERATION, level="extended", confusable=ONE_RANK
)
@given(case=cases())
def test_masks_of_another_shape_are_refused(causal_lm, case):
    """A mask of another shape than the ids raises an exception."""
    assert_masks_checked(causal_lm, case)


# Ranks, query heads, key/value heads, head width
MISFITS = st.sampled_from(
    [(2, 3, 3, 10), (3, 4, 2, 16), (4, 6, 3, 10), (3, 6, 2, 8), (2, 6, 3, 10)]
)


@requirement("causal_lm.refuses.heads-and-ranks", source=MEGATRON, several_ranks=True)
@given(
    case=MISFITS.flatmap(
        lambda sizes: cases(ranks=(1,), heads=(sizes[1:],), intermediate=96).map(
            lambda case: replace(case, ranks=sizes[0])
        )
    )
)
def test_ranks_that_do_not_divide_the_heads_are_refused(causal_lm, case):
    """Ranks that cannot share the heads raise an exception that names the sizes, or do it right."""
    assert_ranks_refused(causal_lm, case)


@requirement("causal_lm.refuses.width-and-ranks", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=SEVERAL, intermediate=st.sampled_from([47, 53, 59])))
def test_ranks_that_do_not_divide_the_mlp_are_refused(causal_lm, case):
    """Ranks that do not divide the MLP raise an exception that names the sizes, or do it right."""
    assert_ranks_refused(causal_lm, case)


@requirement("causal_lm.refuses.missing-tensor", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_missing_tensors_are_refused(causal_lm, case):
    """A missing tensor raises an exception that names it, on every rank."""
    assert_missing_refused(causal_lm, case)


@requirement("causal_lm.refuses.fault-of-one-rank", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=SEVERAL))
def test_a_fault_of_one_rank_stops_all(causal_lm, case):
    """A fault in the part of one rank raises an exception on every rank; none waits for another."""
    assert_fault_of_one_rank_refused(causal_lm, case)


@requirement("causal_lm.refuses.output-bias", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_a_bias_of_the_output_projection_is_refused(causal_lm, case):
    """A bias of the output projection, which Qwen2 does not have, raises an exception."""
    assert_output_bias_refused(causal_lm, case)


# Loading


@requirement("causal_lm.load.any-seed", source=QWEN2, confusable=ONE_RANK)
@given(case=cases())
def test_no_weight_is_left_at_random(causal_lm, case):
    """Every weight is loaded: under other random numbers the model is the same, bit for bit."""
    assert_any_seed(causal_lm, case)


@requirement("causal_lm.load.directory-unchanged", source=QWEN2, confusable=ONE_RANK)
@given(case=cases(ranks=(1, 1, 2)))
def test_the_directory_is_unchanged(causal_lm, case):
    """Loading writes nothing into the directory."""
    assert_directory_unchanged(causal_lm, case)


# Communication


@requirement("causal_lm.communication.two-reductions", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=SEVERAL, layers=1, tokens=5))
def test_a_block_communicates_two_reductions(causal_lm, case):
    """Each block communicates two reductions and nothing else, in prompts and in steps."""
    assert_two_reductions(causal_lm, case)


# Generation


@requirement("causal_lm.generate.greedy", source=GENERATION, smoke=True, confusable=ONE_RANK)
@given(case=cases())
def test_greedy_decoding_takes_the_most_likely_token(causal_lm, case):
    """Greedy decoding takes the most likely token, on any number of ranks."""
    assert_greedy(causal_lm, case)


@requirement("causal_lm.generate.left-padding", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_padded_prompts_go_on_as_if_alone(causal_lm, case):
    """Rows of prompts with padding on the left go on as if each were alone."""
    assert_padded_prompts(causal_lm, case)


@requirement(
    "causal_lm.generate.no-tokens", source=GENERATION, level="extended", confusable=ONE_RANK
)
@given(case=cases())
def test_no_new_tokens(causal_lm, case):
    """With ``max_new_tokens=0`` generation gives the prompts."""
    assert_nothing_new(causal_lm, case)


@requirement("causal_lm.generate.nothing-left-behind", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_generation_leaves_nothing_behind(causal_lm, case):
    """After generation the model gives what it gave before."""
    assert_generation_repeats(causal_lm, case)


@requirement("causal_lm.eos.number", source=GENERATION, confusable={"one rank", "one of batch"})
@given(case=cases(tied=False, batch=st.sampled_from([1, 1, 2])))
def test_a_row_ends_with_the_end_token(causal_lm, case):
    """A row ends with the end token, which is kept; with the last row generation stops."""
    assert_eos_scalar(causal_lm, case)


@requirement("causal_lm.eos.list", source=GENERATION, confusable={"one rank", "one of batch"})
@given(case=cases(tied=False, batch=st.sampled_from([1, 2, 3])))
def test_any_of_several_tokens_ends_a_row(causal_lm, case):
    """Any of several end tokens ends a row; other rows go on as if nothing had happened."""
    assert_eos_list(causal_lm, case)


@requirement("causal_lm.eos.of-config", source=GENERATION, confusable={"one rank", "one of batch"})
@given(case=cases(tied=False, batch=st.sampled_from([1, 2])))
def test_end_tokens_are_read_from_config(causal_lm, case):
    """Without end tokens in the call those of ``config.json`` end a row."""
    assert_eos_of_config(causal_lm, case)


@requirement(
    "causal_lm.eos.of-generation-config", source=GENERATION, confusable={"one rank", "one of batch"}
)
@given(case=cases(tied=False, batch=st.sampled_from([1, 2])))
def test_generation_config_overrules_config(causal_lm, case):
    """End tokens of ``generation_config.json`` overrule those of ``config.json``."""
    assert_eos_of_generation_config(causal_lm, case)


@requirement("causal_lm.eos.of-the-call", source=GENERATION, confusable=ONE_RANK)
@given(case=cases(tied=False))
def test_end_tokens_of_the_call_overrule_the_configuration(causal_lm, case):
    """End tokens that are given with the call are the only ones."""
    assert_eos_overrules(causal_lm, case)


# Sampling


@requirement("causal_lm.sample.same-on-every-rank", source=MEGATRON, several_ranks=True)
@given(case=cases(ranks=SEVERAL))
def test_ranks_sample_the_same_tokens(causal_lm, case):
    """Sampled tokens are the same on every rank, whatever random numbers each has."""
    assert_ranks_sample_alike(causal_lm, case)


@requirement("causal_lm.sample.temperature", source=GENERATION, confusable=ONE_RANK)
@given(case=cases(tokens=5))
def test_logits_are_divided_by_the_temperature(causal_lm, case):
    """Tokens are drawn by the softmax of the logits divided by the temperature."""
    assert_temperature(causal_lm, case)


@requirement("causal_lm.sample.cold", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_cold_sampling_is_greedy(causal_lm, case):
    """At a temperature near 0 sampling is greedy, without overflow."""
    assert_cold_is_greedy(causal_lm, case)


@requirement("causal_lm.sample.in-vocabulary", source=MEGATRON, confusable=ONE_RANK)
@given(case=cases(tokens=5, ranks=(1, 2, 3, 4)))
def test_sampled_tokens_are_of_the_vocabulary(causal_lm, case):
    """Every token of the vocabulary can be drawn, and nothing that only fills it up."""
    assert_in_vocabulary(causal_lm, case)


@requirement("causal_lm.sample.refuses-temperature", source=GENERATION, confusable=ONE_RANK)
@given(case=cases())
def test_sampling_needs_a_temperature_above_zero(causal_lm, case):
    """Sampling with a temperature that is not above 0 raises an exception."""
    assert_temperature_refused(causal_lm, case)
