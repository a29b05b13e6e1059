"""The requirements of the contract ``attention``.

Every case runs in float32 against the float64 reference, and a case that drew a 16-bit dtype runs in
that dtype too. Requirements called "sees" read off which keys a query attends to, without any
tolerance: queries are 0 and values one-hot, so that a key is seen exactly where the output is not 0.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.attention_cases import GROUPED_HEADS, attention_cases
from conformance.harness.attention_checks import (
    assert_close_where_keys_are_seen,
    assert_gradients_match,
    assert_lse_matches,
    assert_matches_oracle,
    assert_matches_oracle_where_keys_are_seen,
    assert_sees_exactly,
    expected_output,
    merged_halves,
    run,
    run_gradients,
    run_with_lse,
)
from conformance.harness.compare import assert_close_to, assert_identical
from conformance.harness.failures import ConformanceFailure
from conformance.harness.gpu_large import LargeCase, assert_large_cache, assert_large_queries
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import requirement

VASWANI = "arXiv 1706.03762, section 3.2.1"
FLASH = "flash-attention README, 'How to use FlashAttention'"
SDPA = "torch scaled_dot_product_attention documentation"
GQA = "arXiv 2305.13245"
LONGFORMER = "arXiv 2004.05150, section 3.1; flash-attention window_size"
GEMMA2 = "arXiv 2408.00118, section 2; google/gemma_pytorch"
GPT_OSS = "openai/gpt-oss; transformers GptOssAttention"

LEFT_WINDOWS = st.sampled_from([(1, 0), (0, 0), (2, 0), (3, 0), (5, 0), (7, 0)])
TWO_SIDED_WINDOWS = st.sampled_from([(1, 2), (0, 1), (3, 1), (None, 1), (2, None)])
SCALES = st.sampled_from([0.12, 1.0, 0.5])
SOFTCAPS = st.sampled_from([2.0, 0.5, 5.0, 30.0])
BOOLEAN_MASKS = st.sampled_from(["boolean", "boolean per head"])
ADDITIVE_MASKS = st.sampled_from(["bias", "bias per head", "infinite"])


# Output and inputs


@requirement("attention.output.shape-dtype-device", source=SDPA, smoke=True)
@given(case=attention_cases(value_width="equal"))
def test_output_has_the_shape_of_queries_and_values(attention, case):
    """The output is [batch, q_heads, q_len, value_dim] in the dtype and on the device of q."""
    in_every_lane(case, lambda call: run(attention, call), attention.device)


@requirement(
    "attention.output.value-width", source="DeepSeek-V2, arXiv 2405.04434", level="extended"
)
@given(case=attention_cases(value_width="different", causal=st.booleans()))
def test_values_may_be_of_another_width_than_keys(attention, case):
    """Values may be wider or narrower than keys; the scale follows the keys."""
    assert_matches_oracle(attention, case)


@requirement("attention.inputs.unchanged", source="unslothai/unsloth#5001")
@given(
    case=attention_cases(
        causal=st.booleans(), mask=st.sampled_from([None, "boolean", "infinite"]), magnitude=2.0
    )
)
def test_inputs_stay_as_they_were(attention, case):
    """No input tensor is written to, and the output shares memory with none of them."""
    # The subject compares every input of every call; here the calls are those that tempt most.
    in_every_lane(case, lambda call: run(attention, call), attention.device)


@requirement("attention.output.deterministic", source="flash-attention, deterministic forward")
@given(case=attention_cases(causal=st.booleans()))
def test_two_runs_are_identical(attention, case):
    """The same inputs give the same bits, also after a call with other inputs in between."""

    def check(call):
        first = run(attention, call).clone()
        (q, k, v), options = call.values()
        attention(q.flip(2), k * 2, v + 1, **options)
        assert_identical(run(attention, call), first, call, because="a second run differs")

    in_every_lane(case, check, attention.device)


# Full and causal attention


@requirement("attention.full.matches-oracle", source=VASWANI, smoke=True)
@given(case=attention_cases())
def test_full_attention_is_softmax_of_scaled_scores_times_values(attention, case):
    """Without options, the output is softmax(q kᵀ / sqrt(head_dim)) v."""
    assert_matches_oracle(attention, case)


@requirement("attention.full.sees-every-key", source=VASWANI, smoke=True)
@given(case=attention_cases())
def test_full_attention_sees_every_key(attention, case):
    """Without options, every query sees every key, later ones included."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.causal.matches-oracle", source=VASWANI, smoke=True, confusable={"q_len = kv_len"}
)
@given(case=attention_cases(causal=True, lengths="equal"))
def test_causal_attention_matches_the_oracle(attention, case):
    """Causal self-attention of a whole sequence is right at every position."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.causal.sees-no-future-key",
    source="arXiv 1706.03762, section 3.2.3",
    smoke=True,
    confusable={"q_len = kv_len"},
)
@given(case=attention_cases(causal=True, lengths="equal"))
def test_causal_attention_sees_the_past_and_itself(attention, case):
    """With as many queries as keys, query i sees keys 0 .. i and no other."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.causal.aligned-to-last-key", source="pytorch#108108; flash-attention 2.1", smoke=True
)
@given(case=attention_cases(causal=True, lengths="longer"))
def test_last_query_sees_every_key(attention, case):
    """With fewer queries than keys, query i sees keys 0 .. kv_len - q_len + i."""
    assert_sees_exactly(attention, case)


@requirement("attention.causal.query-block-matches-oracle", source="pytorch#108108")
@given(case=attention_cases(causal=True, lengths="longer"))
def test_query_block_against_a_longer_cache_matches_the_oracle(attention, case):
    """A block of queries against a longer cache is the tail of the whole sequence."""
    assert_matches_oracle(attention, case)


@requirement("attention.causal.more-queries-than-keys", source=FLASH, level="extended")
@given(case=attention_cases(causal=True, lengths="shorter"))
def test_more_queries_than_keys_leaves_the_first_queries_empty(attention, case):
    """With more queries than keys, the first q_len - kv_len queries see nothing and give zeros."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.causal.one-token-decode", source="flash-attention#282", confusable={"batch = q_len"}
)
@given(case=attention_cases(causal=True, lengths="longer", q_len=1))
def test_one_token_sees_the_whole_cache(attention, case):
    """A single causal query sees every key of the cache."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.causal.chunked-prefill",
    source="EleutherAI/gpt-neox#1178",
    confusable={"q_len = kv_len"},
)
@given(case=attention_cases(causal=True, lengths="equal"), chunk=st.integers(1, 5))
def test_chunked_prefill_equals_one_shot(attention, case, chunk):
    """Prefill in chunks of any size, one token included, equals the one-shot forward."""
    in_every_lane(case, lambda call: _check_chunks(attention, call, chunk), attention.device)


def _check_chunks(attention, call, chunk):
    (q, k, v), options = call.values()
    starts = range(0, q.shape[2], chunk)
    blocks = [
        attention(q[:, :, i : i + chunk], k[:, :, : i + chunk], v[:, :, : i + chunk], **options)
        for i in starts
    ]
    assert_close_to(torch.cat(blocks, dim=2), expected_output(call), call, name="chunked output")


@requirement(
    "attention.causal.future-changes-nothing", source=VASWANI, confusable={"q_len = kv_len"}
)
@given(case=attention_cases(causal=True, lengths="equal"))
def test_the_future_changes_nothing(attention, case):
    """Changing the last key and value leaves every earlier position identical, bit by bit."""

    def check(call):
        before = run(attention, call)[:, :, :-1].clone()
        edited = call.then("k[:, :, -1] = 7.0", "v[:, :, -1] = -7.0")
        after = run(attention, edited)[:, :, :-1]
        assert_identical(after, before, edited, because="the last key reached earlier queries")

    in_every_lane(case, check, attention.device)


# Grouped heads


@requirement("attention.gqa.query-head-reads-its-group", source=f"{GQA}; onnx#7274", smoke=True)
@given(case=attention_cases(heads=GROUPED_HEADS, causal=st.booleans(), lengths="longer"))
def test_query_head_reads_its_group(attention, case):
    """Query head h reads key/value head h // (q_heads // kv_heads)."""

    def check(call):
        probe = call.then(
            "v = torch.ones_like(v) * torch.arange(1, v.shape[1] + 1, device=v.device)[:, None, None]"
        )
        read = run(attention, probe).float().round().long() - 1
        group = case.q_heads // case.kv_heads
        expected = torch.arange(case.q_heads, device=read.device) // group
        wrong = (read != expected[:, None, None]).nonzero()
        if len(wrong):
            head = int(wrong[0, 1])
            raise ConformanceFailure(
                "wrong heads",
                f"query head {head} reads key/value head {int(read[tuple(wrong[0])])}, "
                f"it must read {head // group}",
                call=probe,
            )

    in_every_lane(case, check, attention.device)


@requirement("attention.gqa.matches-oracle", source=GQA)
@given(case=attention_cases(heads=GROUPED_HEADS, causal=st.booleans()))
def test_grouped_heads_match_the_oracle(attention, case):
    """Groups of query heads share keys and values, as if each had a copy."""
    assert_matches_oracle(attention, case)


@requirement("attention.gqa.multi-query", source="arXiv 1911.02150", confusable={"one kv head"})
@given(case=attention_cases(heads=((5, 1), (4, 1), (6, 1)), causal=st.booleans()))
def test_multi_query_attention_matches_the_oracle(attention, case):
    """All query heads may share one key/value head."""
    assert_matches_oracle(attention, case)


@requirement("attention.gqa.multi-head", source=VASWANI, confusable={"q_heads = kv_heads"})
@given(case=attention_cases(heads=((3, 3), (5, 5), (4, 4)), causal=st.booleans()))
def test_multi_head_attention_matches_the_oracle(attention, case):
    """Every query head may have key/value heads of its own."""
    assert_matches_oracle(attention, case)


@requirement("attention.gqa.gradients-summed-over-group", source="marin-community/levanter#449")
@given(case=attention_cases(heads=((6, 2), (6, 3), (4, 2), (8, 2))))
def test_gradients_of_keys_and_values_sum_over_the_group(attention, case):
    """The gradient of a key/value head is the sum over the query heads that share it."""
    assert_gradients_match(attention, case)


# Scale and soft cap


@requirement("attention.scale.default-is-inverse-sqrt-key-width", source="transformers#35984")
@given(case=attention_cases(widths=(12, 36, 20, 80, 8), magnitude=2.0))
def test_default_scale_is_the_inverse_square_root_of_the_key_width(attention, case):
    """Without a scale, scores are divided by sqrt(head_dim), whatever width a kernel pads it to."""
    assert_matches_oracle(attention, case)


@requirement("attention.scale.explicit", source="ggml-org/llama.cpp#8444; transformers#31891")
@given(case=attention_cases(scale=SCALES, causal=st.booleans(), magnitude=2.0))
def test_explicit_scale_replaces_the_default(attention, case):
    """An explicit scale is the factor on the scores, alone."""
    assert_matches_oracle(attention, case)


@requirement("attention.scale.zero", source=SDPA, level="extended", confusable={"q_len = kv_len"})
@given(case=attention_cases(scale=st.just(0.0), causal=st.booleans(), lengths="equal"))
def test_scale_of_zero_weighs_evenly(attention, case):
    """A scale of zero is a scale, not none given: every visible key weighs the same."""
    assert_matches_oracle(attention, case)


@requirement("attention.scale.zero-padded-width", source="transformers#35984; flash-attention#1347")
@given(case=attention_cases(scale=SCALES, widths=(12, 20, 36)))
def test_zero_padding_the_width_changes_nothing(attention, case):
    """With an explicit scale, channels of zeros appended to q and k change nothing."""

    def check(call):
        pad = "q, k = (torch.nn.functional.pad(x, (0, 4)) for x in (q, k))"
        assert_close_to(run(attention, call.then(pad)), expected_output(call), call.then(pad))

    in_every_lane(case, check, attention.device)


@requirement("attention.softcap.matches-oracle", source=GEMMA2, level="extended")
@given(case=attention_cases(softcap=SOFTCAPS, causal=st.booleans(), magnitude=3.0))
def test_softcap_squeezes_scores(attention, case):
    """A soft cap c turns a score s into c tanh(s / c), after the scale."""
    assert_matches_oracle(attention, case)


@requirement("attention.softcap.before-masks", source=GEMMA2, level="extended")
@given(
    case=attention_cases(
        softcap=SOFTCAPS, mask=st.sampled_from(["boolean", "infinite", "bias"]), magnitude=3.0
    )
)
def test_softcap_is_applied_before_masks(attention, case):
    """Masks are applied to capped scores: a hidden key stays hidden."""
    assert_matches_oracle(attention, case)


# Sliding windows


@requirement("attention.window.left-bound-is-inclusive", source=LONGFORMER, level="extended")
@given(case=attention_cases(causal=True, window=LEFT_WINDOWS, lengths="longer"))
def test_window_reaches_exactly_left_keys_back(attention, case):
    """A causal window (left, 0) shows a query itself and the left keys before it."""
    assert_sees_exactly(attention, case)


@requirement("attention.window.both-bounds", source=LONGFORMER, level="extended")
@given(case=attention_cases(window=TWO_SIDED_WINDOWS, lengths="longer"))
def test_two_sided_window_shows_exactly_its_bounds(attention, case):
    """A window (left, right) shows keys from position - left to position + right, both included."""
    assert_sees_exactly(attention, case)


@requirement("attention.window.causal-and-right", source=FLASH, level="extended")
@given(
    case=attention_cases(causal=True, window=st.sampled_from([(2, 3), (1, 1)]), lengths="longer")
)
def test_causal_wins_over_the_right_bound(attention, case):
    """With causal, a right bound beyond the query shows no future key."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.window.matches-oracle",
    source=LONGFORMER,
    level="extended",
    confusable={"q_len = kv_len"},
)
@given(case=attention_cases(causal=True, window=LEFT_WINDOWS, lengths="equal"))
def test_windowed_attention_matches_the_oracle(attention, case):
    """Causal attention with a window is right at every position of a sequence."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.window.decode-equals-prefill",
    source="karpathy/nanochat#456; trymirai/lalamo#200",
    level="extended",
    confusable={"q_len = kv_len"},
)
@given(
    case=attention_cases(causal=True, window=LEFT_WINDOWS, lengths="equal"),
    chunk=st.sampled_from([1, 3, 2]),
)
def test_decoding_keeps_the_window(attention, case, chunk):
    """Decoding one or several tokens at a time sees the same window as the whole forward."""
    in_every_lane(case, lambda call: _check_chunks(attention, call, chunk), attention.device)


@requirement("attention.window.with-padding", source="transformers#39408", level="extended")
@given(
    case=attention_cases(
        causal=True,
        window=LEFT_WINDOWS,
        padding=st.sampled_from(["left", "right"]),
        lengths="longer",
    )
)
def test_window_and_padding_both_hold(attention, case):
    """With a window and padding, a query sees the keys that both allow."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.window.with-documents",
    source="flash_attn_varlen_func, window_size",
    level="extended",
    confusable={"q_len = kv_len", "one batch row"},
)
@given(
    case=attention_cases(
        causal=st.booleans(),
        window=LEFT_WINDOWS,
        packing=st.sampled_from(["segments", "cumulative"]),
        lengths="equal",
        batch=1,
    )
)
def test_window_and_documents_both_hold(attention, case):
    """With a window and packed documents, a query sees the keys that both allow."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.window.wider-than-cache",
    source=LONGFORMER,
    level="extended",
    confusable={"window covers every key"},
)
@given(case=attention_cases(causal=True, window=st.just((64, 0)), lengths="longer"))
def test_window_wider_than_the_cache_is_no_window(attention, case):
    """A window wider than the cache shows every key up to the query."""
    assert_sees_exactly(attention, case)


# Masks


@requirement("attention.mask.true-means-visible", source=f"{SDPA}; pytorch#170415", smoke=True)
@given(case=attention_cases(mask=BOOLEAN_MASKS))
def test_true_means_visible(attention, case):
    """In a boolean mask True lets a query see a key, and False hides it."""
    assert_sees_exactly(attention, case)


@requirement("attention.mask.boolean-matches-oracle", source=SDPA)
@given(case=attention_cases(mask=BOOLEAN_MASKS))
def test_boolean_mask_matches_the_oracle(attention, case):
    """A boolean mask leaves the softmax over the visible keys alone."""
    assert_matches_oracle(attention, case)


@requirement("attention.mask.additive-is-added", source=SDPA)
@given(case=attention_cases(mask=ADDITIVE_MASKS))
def test_additive_mask_is_added_to_scores(attention, case):
    """A floating mask is added to the scaled scores; a positive entry favours a key."""
    assert_matches_oracle(attention, case)


@requirement("attention.mask.additive-hides", source="onnx#8068; transformers#38094")
@given(case=attention_cases(mask=st.sampled_from(["infinite", "lowest"])))
def test_additive_mask_of_minus_infinity_hides(attention, case):
    """An entry of -inf, or of the lowest finite number, hides a key; 0 keeps it."""
    assert_sees_exactly(attention, case)


@requirement("attention.mask.boolean-equals-additive", source="transformers#38094; onnx#8068")
@given(case=attention_cases(mask="boolean"))
def test_boolean_and_additive_forms_agree(attention, case):
    """A boolean mask and its additive form, 0 and -inf, give the same output."""

    def check(call):
        additive = call.then(
            "mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)"
        )
        assert_close_to(run(attention, additive), expected_output(call), additive)

    in_every_lane(case, check, attention.device)


@requirement("attention.mask.broadcasts", source=SDPA)
@given(
    case=attention_cases(mask=st.sampled_from(["boolean", "bias"])),
    part=st.sampled_from(["mask[:1]", "mask[:, :, :1]", "mask[:1, :, :1]", "mask[0, 0]"]),
)
def test_mask_broadcasts(attention, case, part):
    """A mask with an axis of size 1, or of two axes only, holds for every row, head or query."""

    def check(call):
        shared = call.then(f"mask = {part}")
        assert_close_to(run(attention, shared), expected_output(shared), shared)

    in_every_lane(case, check, attention.device)


@requirement("attention.mask.with-causal", source="NVIDIA-NeMo/Automodel#2658")
@given(
    case=attention_cases(
        causal=True, mask=st.sampled_from(["boolean", "infinite", "lowest"]), lengths="longer"
    )
)
def test_mask_and_causal_both_hold(attention, case):
    """With a mask and causal, a query sees the keys that both allow."""
    assert_sees_exactly(attention, case)


@requirement("attention.mask.hidden-key-changes-nothing", source="Wan2GP#1628; transformers#48363")
@given(case=attention_cases(mask=st.sampled_from(["boolean", "infinite"]), lengths="longer"))
def test_hidden_keys_change_nothing(attention, case):
    """Changing a key and value that no query sees leaves the output identical, bit by bit."""

    def check(call):
        hidden = "False" if case.mask == "boolean" else "-torch.inf"
        column = case.kv_len // 2  # not the first, which every query sees
        base = call.then(f"mask[..., {column}] = {hidden}")
        before = run(attention, base).clone()
        edited = base.then(f"k[:, :, {column}] = 9.0", f"v[:, :, {column}] = -9.0")
        assert_identical(
            run(attention, edited), before, edited, because="a hidden key reached the output"
        )

    in_every_lane(case, check, attention.device)


# Padding and caches


@requirement("attention.padding.sees-real-keys", source="unslothai/unsloth#9848")
@given(case=attention_cases(padding=st.sampled_from(["left", "right"])))
def test_padding_is_not_seen(attention, case):
    """Keys that are padding, on either side, are seen by no query."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.padding.causal-left", source="pytorch#103749", confusable={"q_len = kv_len"}
)
@given(case=attention_cases(padding="left", causal=True, lengths="equal"))
def test_left_padding_with_causal_matches_the_oracle(attention, case):
    """In a left-padded causal batch real positions are right, and padded queries give no NaN."""
    assert_matches_oracle_where_keys_are_seen(attention, case)


@requirement(
    "attention.padding.causal-right", source="transformers#17306", confusable={"q_len = kv_len"}
)
@given(case=attention_cases(padding="right", causal=True, lengths="equal"))
def test_right_padding_with_causal_matches_the_oracle(attention, case):
    """In a right-padded causal batch every position sees the real keys up to its own."""
    assert_matches_oracle(attention, case)


@requirement("attention.padding.equals-unpadded", source="unslothai/unsloth#9848")
@given(case=attention_cases(padding="left", causal=True, lengths="longer"))
def test_padded_rows_equal_unpadded_runs(attention, case):
    """Each row of a left-padded batch equals the run of that row alone, without its padding."""

    def check(call):
        padded = run(attention, call)
        (q, k, v), options = call.values()
        alone = padded.clone()
        for row, valid in enumerate(options["key_valid"]):
            real = int(valid.sum())
            tokens = min(real, q.shape[2])  # queries that are padding themselves see nothing
            alone[row, :, q.shape[2] - tokens :] = attention(
                q[row : row + 1, :, q.shape[2] - tokens :],
                k[row : row + 1, :, -real:],
                v[row : row + 1, :, -real:],
                causal=True,
            )[0]
        for output in (alone, padded):
            assert_close_where_keys_are_seen(output, expected_output(call), call)

    in_every_lane(case, check, attention.device)


@requirement("attention.padding.anywhere", source="transformers masking_utils", level="extended")
@given(case=attention_cases(padding="holes", causal=st.booleans(), lengths="longer"))
def test_padding_may_be_anywhere(attention, case):
    """Keys that are padding may be anywhere in a row, between real ones too."""
    assert_sees_exactly(attention, case)


@requirement("attention.padding.content-changes-nothing", source="unslothai/unsloth#9848")
@given(case=attention_cases(padding=st.sampled_from(["left", "right"])))
def test_content_of_padding_changes_nothing(attention, case):
    """What stands in padding slots changes no bit of the output."""

    def check(call):
        before = run(attention, call).clone()
        edited = call.then(
            "hidden = ~key_valid[:, None, :, None]",
            "k, v = k.masked_fill(hidden, 9.0), v.masked_fill(hidden, -9.0)",
        )
        assert_identical(
            run(attention, edited), before, edited, because="padding reached the output"
        )

    in_every_lane(case, check, attention.device)


@requirement("attention.cache.sees-written-slots", source=FLASH, level="extended")
@given(case=attention_cases(cache="garbage", causal=st.booleans(), lengths="longer"))
def test_only_written_slots_are_seen(attention, case):
    """In a preallocated cache only the first key_lengths slots are seen."""
    assert_sees_exactly(attention, case)


@requirement("attention.cache.aligned-to-last-written-slot", source=FLASH, level="extended")
@given(case=attention_cases(cache="garbage", causal=True, lengths="longer"))
def test_causal_is_aligned_to_the_last_written_slot(attention, case):
    """With key lengths and causal, the last query is at the last written slot of its row."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.cache.unwritten-slots-may-be-nan",
    source="flash-attention#2374; vllm#936",
    level="extended",
)
@given(case=attention_cases(cache="nan", causal=st.booleans(), lengths="longer"))
def test_nan_in_unwritten_slots_stays_there(attention, case):
    """NaN in slots that were never written reaches no output."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.cache.nan-reaches-no-gradient", source="flash-attention#2374", level="extended"
)
@given(case=attention_cases(cache="nan", causal=True, lengths="longer"))
def test_nan_in_unwritten_slots_reaches_no_gradient(attention, case):
    """NaN in slots that were never written reaches no gradient; theirs is zero."""
    assert_gradients_match(attention, case)


@requirement("attention.cache.nothing-written", source="vllm#936", level="extended")
@given(case=attention_cases(cache="nan", causal=st.booleans(), lengths="longer"))
def test_empty_cache_gives_zeros(attention, case):
    """A row of which nothing was written gives zeros, whatever its slots hold."""

    def check(call):
        # A key that holds NaN must be hidden in every slot, so the row's slots are all poisoned.
        edit = ("key_lengths[0] = 0", "k[0] = torch.nan", "v[0] = torch.nan")
        emptied = call.then(*edit)
        assert_close_to(run(attention, emptied), expected_output(emptied), emptied)

    in_every_lane(case, check, attention.device)


@requirement("attention.cache.shorter-than-queries", source=FLASH, level="extended")
@given(case=attention_cases(cache="nan", causal=True, lengths="longer"))
def test_cache_shorter_than_the_query_block_keeps_its_alignment(attention, case):
    """With fewer written slots than queries the last query is still at the last written slot."""

    def check(call):
        shorter = call.then(
            f"key_lengths[0] = {max(1, case.q_len // 2)}",
            "unused = (torch.arange(k.shape[2], device=k.device) >= key_lengths[:, None])",
            "unused = unused[:, None, :, None]",
            "k, v = (x.masked_fill(unused, torch.nan) for x in (k, v))",
        )
        output = run(attention, shorter)
        assert_close_where_keys_are_seen(output, expected_output(shorter), shorter)

    in_every_lane(case, check, attention.device)


@requirement("attention.cache.window", source="karpathy/nanochat#456", level="extended")
@given(case=attention_cases(cache="nan", causal=True, window=LEFT_WINDOWS, lengths="longer"))
def test_window_counts_from_the_last_written_slot(attention, case):
    """A window over a preallocated cache ends at the query's own slot."""
    assert_sees_exactly(attention, case)


# Explicit positions


@requirement("attention.positions.causal", source="ollama#14912", level="extended")
@given(case=attention_cases(positions="shuffled", causal=True, lengths="longer"))
def test_causal_compares_positions_not_slots(attention, case):
    """With positions, causal hides keys at later positions, wherever they are stored."""
    assert_sees_exactly(attention, case)


@requirement("attention.positions.window", source="ollama#15591", level="extended")
@given(
    case=attention_cases(positions="shuffled", causal=True, window=LEFT_WINDOWS, lengths="longer")
)
def test_window_compares_positions_not_slots(attention, case):
    """With positions, a window reaches back by position, wherever keys are stored."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.positions.ring-cache-after-wrap",
    source="ollama#15591; Lightning-AI/litgpt#2215",
    level="extended",
)
@given(case=attention_cases(positions="ring", causal=True, window=LEFT_WINDOWS, lengths="longer"))
def test_ring_cache_after_the_wrap_matches_the_oracle(attention, case):
    """A ring cache that has wrapped gives what the unbounded cache with a window gives."""
    assert_matches_oracle(attention, case)


@requirement("attention.positions.empty-slots", source="vllm#936", level="extended")
@given(case=attention_cases(positions="ring", causal=True, lengths="longer"))
def test_slots_without_a_position_are_not_seen(attention, case):
    """A slot with a negative position holds nothing: its NaN reaches no output."""

    def check(call):
        emptied = call.then(
            "k_positions[:, 0] = -1", "k[:, :, 0] = torch.nan", "v[:, :, 0] = torch.nan"
        )
        assert_close_to(run(attention, emptied), expected_output(emptied), emptied)

    in_every_lane(case, check, attention.device)


# Packed documents


@requirement(
    "attention.packed.segments-see-their-own",
    source="torch FlexAttention, document masks",
    level="extended",
    confusable={"q_len = kv_len"},
)
@given(case=attention_cases(packing="segments", causal=st.booleans(), lengths="equal"))
def test_documents_do_not_see_one_another(attention, case):
    """With segment ids, a query sees keys of its own document only."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.packed.segments-match-oracle",
    source="torch FlexAttention, document masks",
    level="extended",
    confusable={"q_len = kv_len"},
)
@given(case=attention_cases(packing="segments", causal=True, lengths="equal"))
def test_packed_segments_match_the_oracle(attention, case):
    """Packed causal documents, with segment ids, match the oracle."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.packed.cumulative-equals-separate",
    source="flash_attn_varlen_func",
    level="extended",
    confusable={"one batch row", "q_len = kv_len"},
)
@given(case=attention_cases(packing="cumulative", causal=True, lengths="equal", batch=1))
def test_packed_documents_equal_separate_runs(attention, case):
    """Documents packed by cumulative lengths equal the runs of each document alone."""

    def check(call):
        (q, k, v), options = call.values()
        bounds = options["cu_seqlens_q"].tolist()
        alone = [
            attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True)
            for a, b in itertools.pairwise(bounds)
        ]
        assert_close_to(torch.cat(alone, dim=2), expected_output(call), call, name="separate runs")
        assert_close_to(run(attention, call), expected_output(call), call)

    in_every_lane(case, check, attention.device)


@requirement(
    "attention.packed.cumulative-aligned-per-document",
    source="flash_attn_varlen_func, causal",
    level="extended",
    confusable={"one batch row"},
)
@given(case=attention_cases(packing="cumulative", causal=True, lengths="longer", batch=1))
def test_each_packed_document_is_aligned_to_its_last_key(attention, case):
    """With other cumulative lengths for keys, each document's last query sees all its keys."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.packed.cumulative-full",
    source="flash_attn_varlen_func",
    level="extended",
    confusable={"one batch row", "q_len = kv_len"},
)
@given(case=attention_cases(packing="cumulative", lengths="equal", batch=1))
def test_packed_documents_need_not_be_causal(attention, case):
    """Without causal, a query sees every key of its own document."""
    assert_sees_exactly(attention, case)


@requirement(
    "attention.packed.empty-document",
    source="flash_attn_varlen_func",
    level="extended",
    confusable={"one batch row", "q_len = kv_len"},
)
@given(case=attention_cases(packing="cumulative", causal=True, lengths="equal", batch=1))
def test_packed_document_may_be_empty(attention, case):
    """A document without tokens between two others changes nothing."""

    def check(call):
        edits = [f"{name} = {name}[[0, 1, 1, *range(2, len({name}))]]" for name in CU_SEQLENS]
        emptied = call.then(*edits)
        assert_close_to(run(attention, emptied), expected_output(call), emptied)

    in_every_lane(case, check, attention.device)


CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_k")


# Attention sinks


@requirement("attention.sinks.match-oracle", source=GPT_OSS, level="extended")
@given(case=attention_cases(sinks=True, causal=st.booleans()))
def test_sinks_take_part_in_the_denominator(attention, case):
    """A sink is one more logit of its head in the softmax denominator, without a value."""
    assert_matches_oracle(attention, case)


@requirement("attention.sinks.shrink-by-sigmoid", source="TransformerEngine#3551", level="extended")
@given(case=attention_cases(sinks=True, lengths="longer"))
def test_dominant_sinks_shrink_the_output(attention, case):
    """A dominant sink s shrinks the output by sigmoid(log-sum-exp - s), each head by its own."""

    def check(call):
        dominant = call.then(
            "sinks = (4 + torch.arange(q.shape[1], device=q.device)).to(q.dtype)", sinks="sinks"
        )
        assert_close_to(run(attention, dominant), expected_output(dominant), dominant)

    in_every_lane(case, check, attention.device)


@requirement("attention.sinks.minus-infinity-is-none", source=GPT_OSS, level="extended")
@given(case=attention_cases(sinks=True, causal=st.booleans(), lengths="longer"))
def test_sink_of_minus_infinity_is_no_sink(attention, case):
    """A sink of -inf changes nothing, and gives no NaN."""

    def check(call):
        without = call.then("sinks = torch.full_like(sinks, -torch.inf)")
        assert_close_to(run(attention, without), expected_output(call.without("sinks")), without)

    in_every_lane(case, check, attention.device)


@requirement("attention.sinks.gradient", source="TransformerEngine#3551", level="extended")
@given(case=attention_cases(sinks=True, causal=st.booleans(), lengths="longer"))
def test_sinks_get_their_gradient(attention, case):
    """The gradient of the sinks, and those of q, k and v beside them, match the oracle."""
    assert_gradients_match(attention, case)


# Rows that see nothing


def _with_empty_rows(call):
    """The call with a mask that hides every key from the first query, and some from the others."""
    return call.then("mask[:, :, 0] = False")


@requirement("attention.empty-row.zeros", source="pytorch#103749; flash-attention attention_ref")
@given(case=attention_cases(mask="boolean"))
def test_rows_that_see_nothing_give_zeros(attention, case):
    """A query that sees no key gives exact zeros, and the others are not disturbed."""

    def check(call):
        call = _with_empty_rows(call)
        output = run(attention, call)
        assert_close_to(output, expected_output(call), call)
        zeros = torch.zeros_like(output[:, :, 0])
        assert_identical(output[:, :, 0].abs(), zeros, call, because="an empty row is not zero")

    in_every_lane(case, check, attention.device)


@requirement("attention.empty-row.zero-gradients", source="pytorch#110213")
@given(case=attention_cases(mask="boolean"))
def test_rows_that_see_nothing_give_zero_gradients(attention, case):
    """A query that sees no key has a zero gradient and puts no NaN into any other."""

    def check(call):
        call = _with_empty_rows(call)
        grads = run_gradients(attention, call)
        for name in ("q", "k", "v"):
            if not bool(torch.isfinite(grads[name]).all()):
                raise ConformanceFailure(
                    "non-finite", f"the gradient of {name} is not finite", call=call
                )
        row = grads["q"][:, :, 0]
        assert_identical(
            row.abs(), torch.zeros_like(row), call, because="an empty row has a gradient"
        )

    in_every_lane(case, check, attention.device)


@requirement("attention.empty-row.every-key-padded", source="transformers#17306", confusable=set())
@given(case=attention_cases(padding="right", causal=st.booleans()))
def test_batch_row_that_is_all_padding_gives_zeros(attention, case):
    """A batch row without a real key gives zeros; the other rows are not disturbed."""

    def check(call):
        emptied = call.then("key_valid[0] = False")
        assert_close_to(run(attention, emptied), expected_output(emptied), emptied)

    in_every_lane(case, check, attention.device)


# Log-sum-exp and partial results


@requirement(
    "attention.lse.matches-oracle", source="arXiv 2205.14135, algorithm 1", level="extended"
)
@given(case=attention_cases(causal=st.booleans(), scale=st.sampled_from([None, 0.3])))
def test_log_sum_exp_matches_the_oracle(attention, case):
    """The second output is the natural log of the softmax denominator of the scaled scores."""
    assert_lse_matches(attention, case)


@requirement("attention.lse.includes-sinks", source=GPT_OSS, level="extended")
@given(case=attention_cases(sinks=True, causal=st.booleans(), lengths="longer"))
def test_log_sum_exp_includes_the_sink(attention, case):
    """With sinks, the log-sum-exp is that of the denominator with the sink in it."""
    assert_lse_matches(attention, case)


@requirement("attention.lse.with-options", source="arXiv 2205.14135", level="extended")
@given(
    case=attention_cases(
        mask=st.sampled_from(["bias", "boolean", None]),
        softcap=st.sampled_from([None, 2.0]),
        window=st.sampled_from([None, (2, 3)]),
        padding=st.sampled_from([None, "left"]),
        lengths="longer",
        magnitude=3.0,
    )
)
def test_log_sum_exp_is_that_of_the_final_scores(attention, case):
    """The log-sum-exp is over the visible keys, of scores after soft cap and additive mask."""
    assert_lse_matches(attention, case)


@requirement("attention.lse.empty-row-is-minus-infinity", source="pytorch#103963", level="extended")
@given(case=attention_cases(mask="boolean"))
def test_log_sum_exp_of_an_empty_row_is_minus_infinity(attention, case):
    """A row that sees no key has a log-sum-exp of -inf."""

    def check(call):
        call = _with_empty_rows(call)
        lse = run_with_lse(attention, call)[1][:, :, 0]
        expected = torch.full_like(lse, -torch.inf)
        assert_identical(lse, expected, call.then(return_lse="True"), because="not -inf")

    in_every_lane(case, check, attention.device)


@requirement("attention.lse.same-output", source="arXiv 2205.14135", level="extended")
@given(case=attention_cases(causal=st.booleans()))
def test_output_is_the_same_with_log_sum_exp(attention, case):
    """Asking for the log-sum-exp does not change the output beyond rounding."""

    def check(call):
        output = run_with_lse(attention, call)[0]
        assert_close_to(output, expected_output(call), call.then(return_lse="True"))

    in_every_lane(case, check, attention.device)


@requirement(
    "attention.lse.merges-split-keys", source="arXiv 2205.14135, section 3.1", level="extended"
)
@given(case=attention_cases(mask="boolean", lengths="longer"))
def test_partial_results_merge_to_the_whole(attention, case):
    """Results over two parts of the keys, merged by their log-sum-exps, give the whole."""

    def check(call):
        merged = merged_halves(attention, call, first_keys=call.case.kv_len // 2 or 1)
        assert_close_to(merged, _merge_expectation(call), call, name="merged output")

    in_every_lane(case, check, attention.device)


@requirement("attention.lse.merges-with-empty-part", source="arXiv 2307.08691", level="extended")
@given(case=attention_cases(mask="boolean", lengths="longer"))
def test_empty_partial_result_merges_as_nothing(attention, case):
    """A part in which a row sees no key changes nothing when it is merged."""

    def check(call):
        first = call.case.kv_len // 2 or 1
        call = call.then(f"mask[:, :, 0, {first}:] = False", f"mask[:, :, -1, :{first}] = False")
        merged = merged_halves(attention, call, first_keys=first)
        assert_close_to(merged, _merge_expectation(call), call, name="merged output")

    in_every_lane(case, check, attention.device)


def _merge_expectation(call):
    # Two parts are rounded to the dtype before they are merged and the result once more.
    return expected_output(call).widened(3)


# Gradients


@requirement("attention.gradient.full", source="pytorch#103749")
@given(case=attention_cases())
def test_gradients_of_full_attention_match_the_oracle(attention, case):
    """The gradients of q, k and v match the oracle's."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.causal", source="NATTEN#347")
@given(case=attention_cases(causal=True, lengths="longer"))
def test_gradients_of_causal_attention_match_the_oracle(attention, case):
    """The gradients of causal attention match the oracle's, with a cache longer than the queries."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.masked", source="pytorch#110213")
@given(case=attention_cases(mask=st.sampled_from(["boolean", "infinite", "bias"])))
def test_gradients_with_masks_match_the_oracle(attention, case):
    """The gradients of masked attention match the oracle's; hidden keys have none."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.padding", source="unslothai/unsloth#9848")
@given(case=attention_cases(padding=st.sampled_from(["left", "right"]), lengths="longer"))
def test_gradients_with_padding_match_the_oracle(attention, case):
    """The gradients of a padded batch match the oracle's; padding has none."""
    assert_gradients_match(attention, case)


@requirement(
    "attention.gradient.packed",
    source="flash_attn_varlen_func",
    level="extended",
    confusable={"q_len = kv_len", "one batch row"},
)
@given(
    case=attention_cases(
        packing=st.sampled_from(["segments", "cumulative"]), causal=True, lengths="equal", batch=1
    )
)
def test_gradients_of_packed_documents_match_the_oracle(attention, case):
    """The gradients of packed documents match the oracle's; none crosses a boundary."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.softcap", source=GEMMA2, level="extended")
@given(case=attention_cases(softcap=SOFTCAPS, causal=True, lengths="longer", magnitude=2.0))
def test_gradients_with_softcap_match_the_oracle(attention, case):
    """The gradients flow through the soft cap."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.window", source=LONGFORMER, level="extended")
@given(case=attention_cases(causal=True, window=LEFT_WINDOWS, lengths="longer"))
def test_gradients_with_a_window_match_the_oracle(attention, case):
    """The gradients of windowed attention match the oracle's."""
    assert_gradients_match(attention, case)


@requirement("attention.gradient.scale-and-value-width", source="pytorch#112577", level="extended")
@given(case=attention_cases(scale=SCALES, value_width="different"))
def test_gradients_with_scale_and_value_width_match_the_oracle(attention, case):
    """The gradients follow an explicit scale and another value width."""
    assert_gradients_match(attention, case)


# Memory layout


MEMORY = st.sampled_from(["transposed", "fused", "expanded", "offset"])


@requirement("attention.memory.strides", source="pytorch#112577; transformers#35342")
@given(case=attention_cases(memory=MEMORY, causal=st.booleans()))
def test_strides_do_not_matter(attention, case):
    """Transposed, sliced, expanded and offset views give what contiguous copies give."""
    assert_matches_oracle(attention, case)


@requirement("attention.memory.strides-with-mask", source="pytorch#112577")
@given(case=attention_cases(memory=MEMORY, mask=st.sampled_from(["boolean", "bias per head"])))
def test_strides_do_not_matter_with_a_mask(attention, case):
    """Views give what contiguous copies give with an explicit mask as well."""
    assert_matches_oracle(attention, case)


@requirement("attention.memory.gradients-of-views", source="transformers#35342")
@given(case=attention_cases(memory=MEMORY))
def test_gradients_of_views_match_the_oracle(attention, case):
    """The gradients with respect to views match the oracle's."""
    assert_gradients_match(attention, case)


@requirement(
    "attention.memory.offsets-past-int32",
    source="SageAttention#386; vllm#50427",
    level="extended",
)
@given(
    case=attention_cases(
        dtypes=("bfloat16", "float16"), heads=((4, 2),), kv_len=6, q_len=3, batch=5
    )
)
def test_element_offsets_may_pass_two_to_the_31(attention, case):
    """Keys and values whose element offsets exceed 2³¹ are read where they are."""

    def check(call):
        # Address space of over 2³¹ elements, of which only the pages that hold keys are touched.
        width = case.head_dim
        stride = 2**31 // (case.kv_len - 2)
        far = call.then(
            f"far = torch.empty({stride * case.kv_len}, dtype=k.dtype, device=k.device)",
            f"k = far.as_strided(k.shape, ({case.kv_heads * width}, {width}, {stride}, 1)).copy_(k)",
        )
        assert_close_to(run(attention, far), expected_output(call), far)

    in_every_lane(case, check, attention.device)


# Invariances


@requirement("attention.invariance.batch-rows-are-independent", source="vllm#936")
@given(case=attention_cases(causal=st.booleans()))
def test_batch_rows_do_not_depend_on_each_other(attention, case):
    """Each batch row alone gives what it gives in the batch."""

    def check(call):
        (q, k, v), options = call.values()
        rows = [
            attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], **options) for i in range(len(q))
        ]
        assert_close_to(torch.cat(rows), expected_output(call), call, name="rows alone")

    in_every_lane(case, check, attention.device)


@requirement(
    "attention.invariance.heads-are-independent", source="jsbaan/transformer-from-scratch#6"
)
@given(case=attention_cases(causal=st.booleans()))
def test_heads_do_not_depend_on_each_other(attention, case):
    """Each key/value head with its query heads alone gives what it gives among the others."""

    def check(call):
        (q, k, v), options = call.values()
        group = case.q_heads // case.kv_heads
        heads = [
            attention(
                q[:, g * group : (g + 1) * group], k[:, g : g + 1], v[:, g : g + 1], **options
            )
            for g in range(case.kv_heads)
        ]
        assert_close_to(torch.cat(heads, dim=1), expected_output(call), call, name="heads alone")

    in_every_lane(case, check, attention.device)


@requirement("attention.invariance.order-of-keys", source=VASWANI)
@given(case=attention_cases(mask=st.sampled_from([None, "boolean", "bias"])))
def test_order_of_keys_does_not_matter(attention, case):
    """Without positions, permuting keys, values and mask columns together changes nothing."""

    def check(call):
        edits = ["order = torch.randperm(k.shape[2], generator=g).to(k.device)"]
        edits += ["k, v = k[:, :, order], v[:, :, order]"]
        edits += ["mask = mask[..., order]"] if case.mask else []
        permuted = call.then(*edits)
        assert_close_to(run(attention, permuted), expected_output(call), permuted)

    in_every_lane(case, check, attention.device)


@requirement("attention.invariance.order-of-queries", source=VASWANI)
@given(case=attention_cases())
def test_permuted_queries_permute_the_output(attention, case):
    """Full attention of permuted queries is the permuted output."""

    def check(call):
        permuted = call.then("q = q.flip(2)")
        restored = run(attention, permuted).flip(2)
        assert_close_to(restored, expected_output(call), permuted)

    in_every_lane(case, check, attention.device)


# Extreme but legal inputs


def _evenly_weighed(call, score=0.0):
    """What ``call`` gives when all its scores are equal, of this size a channel.

    Implementations that merge partial results hold log-sum-exps in float32, whose rounding moves
    the weights by about 2⁻²⁴ of the score. The variant attn-split-keys was off by up to 1.6 times
    that over 1200 cases (scores of 2304 and 4608, torch 2.13, CPU), so four are left.
    """
    size = score * call.case.head_dim**0.5
    return expected_output(call.then("q, k = q * 0, k * 0")).allowing(4 * 2.0**-24 * size)


@requirement("attention.extreme.large-equal-scores", source="transformers#17437")
@given(case=attention_cases(causal=st.booleans(), widths=(16, 64), lengths="longer"))
def test_large_equal_scores_give_the_mean(attention, case):
    """Equal scores, however large, weigh every visible key the same."""

    def check(call):
        equal = call.then("q, k = torch.full_like(q, 24.0), torch.full_like(k, 24.0)")
        assert_close_to(run(attention, equal), _evenly_weighed(call, score=24.0**2), equal)

    in_every_lane(case, check, attention.device)


@requirement("attention.extreme.peaked-scores", source="transformers#17437")
@given(case=attention_cases(causal=st.booleans(), magnitude=st.sampled_from([8.0, 30.0])))
def test_peaked_scores_match_the_oracle(attention, case):
    """Scores far apart give a softmax that is nearly one-hot, and no NaN."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.extreme.products-beyond-float16", source="transformers#17437; flash-attention#613"
)
@given(case=attention_cases(widths=(16, 64), lengths="longer", dtypes=("float16", "bfloat16")))
def test_dot_products_may_exceed_float16(attention, case):
    """Dot products above 65504 before scaling give no infinity when the scaled scores are finite."""

    def check(call):
        # Every key but one is opposed to every query: one score is far above all others.
        one_hot = call.then(
            "q = torch.full_like(q, 90.0)",
            "k = torch.full_like(k, -90.0)",
            f"k[:, :, {case.kv_len // 2}] = 90.0",
        )
        expected = expected_output(
            call.then(
                "q, k = torch.full_like(q, 20.0), torch.full_like(k, -20.0)",
                f"k[:, :, {case.kv_len // 2}] = 20.0",
            )
        )
        assert_close_to(run(attention, one_hot), expected, one_hot)

    in_every_lane(case, check, attention.device)


@requirement(
    "attention.extreme.lowest-mask-with-large-scores",
    source="transformers#17306",
    confusable={"q_len = kv_len"},
)
@given(
    case=attention_cases(
        padding="left",
        causal=True,
        lengths="equal",
        widths=(16, 64),
        dtypes=("float16", "bfloat16"),
    ),
)
def test_masked_large_negative_scores_stay_finite(attention, case):
    """Large negative scores under masks overflow to no NaN, in padded rows either."""

    def check(call):
        opposed = call.then("q, k = torch.full_like(q, 9.0), torch.full_like(k, -9.0)")
        expected = _evenly_weighed(call, score=9.0**2)
        assert_close_where_keys_are_seen(run(attention, opposed), expected, opposed)

    in_every_lane(case, check, attention.device)


@requirement("attention.extreme.denormals", source="IEEE 754, subnormal numbers")
@given(case=attention_cases(causal=st.booleans(), lengths="longer"))
def test_denormal_queries_and_keys_weigh_evenly(attention, case):
    """Denormal queries and keys give scores of 0, so the mean of the visible values."""

    def check(call):
        tiny = "torch.finfo(q.dtype).tiny / 4"
        denormal = call.then(f"q, k = torch.full_like(q, {tiny}), torch.full_like(k, {tiny})")
        assert_close_to(run(attention, denormal), _evenly_weighed(call), denormal)

    in_every_lane(case, check, attention.device)


@requirement("attention.extreme.single-key", source=VASWANI)
@given(case=attention_cases(kv_len=1, causal=False, magnitude=4.0))
def test_single_key_gives_its_value(attention, case):
    """With one key the output is its value, whatever the scores."""
    assert_matches_oracle(attention, case)


@requirement(
    "attention.extreme.length-one",
    source=VASWANI,
    confusable={"q_len = kv_len", "one batch row", "batch = q_len", "batch = kv_len"},
)
@given(case=attention_cases(kv_len=1, q_len=1, causal=st.booleans(), batch=1))
def test_length_one_works(attention, case):
    """A sequence of one token attends to itself."""
    assert_matches_oracle(attention, case)


@requirement("attention.extreme.odd-widths", source="transformers#35984")
@given(case=attention_cases(widths=(5, 1, 33, 7), causal=st.booleans()))
def test_odd_head_widths_work(attention, case):
    """Head widths that are no multiple of 8 match the oracle."""
    assert_matches_oracle(attention, case)


@requirement("attention.extreme.values-beyond-float16", source="IEEE 754; bfloat16")
@given(case=attention_cases(causal=st.booleans(), dtypes=("bfloat16",), lengths="longer"))
def test_bfloat16_values_may_exceed_float16(attention, case):
    """Values beyond 65504, which bfloat16 holds and float16 does not, stay finite and right."""

    def check(call):
        large = call.then("v = v * 2.0**20")
        assert_close_to(run(attention, large), expected_output(large), large)

    in_every_lane(case, check, attention.device)


# Tiles: kernels work in blocks of 64 or 128 queries, keys and channels

TILE_LENGTHS = ((64, 64), (65, 65), (128, 128), (130, 130), (66, 128), (5, 192), (129, 256))


@requirement("attention.tiles.causal", source="flash-attention, block sizes")
@given(case=attention_cases(causal=True, batch=2), lengths=st.sampled_from(TILE_LENGTHS))
def test_causal_attention_is_right_across_tiles(attention, case, lengths):
    """Causal attention sees exactly its keys across blocks of 64 and 128 queries and keys."""
    assert_sees_exactly(attention, _resized(case, lengths))


@requirement("attention.tiles.window", source="flash-attention, block sizes", level="extended")
@given(
    case=attention_cases(causal=True, window=st.sampled_from([(40, 0), (64, 0), (9, 0), (100, 0)])),
    lengths=st.sampled_from([(130, 130), (66, 128), (5, 192)]),
)
def test_windows_are_exact_across_tiles(attention, case, lengths):
    """A window that spans blocks of 64 and 128 shows exactly its keys."""
    assert_sees_exactly(attention, _resized(case, lengths))


@requirement("attention.tiles.matches-oracle", source="flash-attention, block sizes")
@given(
    case=attention_cases(causal=st.booleans(), padding=st.sampled_from([None, "right"])),
    lengths=st.sampled_from(TILE_LENGTHS),
)
def test_attention_matches_the_oracle_across_tiles(attention, case, lengths):
    """Attention of more than one block of queries and keys matches the oracle."""
    assert_matches_oracle_where_keys_are_seen(attention, _resized(case, lengths))


@requirement("attention.tiles.gradients", source="NATTEN#347")
@given(
    case=attention_cases(causal=True), lengths=st.sampled_from([(65, 65), (66, 128), (130, 130)])
)
def test_gradients_match_the_oracle_across_tiles(attention, case, lengths):
    """The gradients of more than one block of queries and keys match the oracle's."""
    assert_gradients_match(attention, _resized(case, lengths))


@requirement("attention.tiles.widths", source="flash-attention, head dimensions up to 256")
@given(case=attention_cases(widths=(128, 96, 160, 256), causal=st.booleans()))
def test_wide_heads_match_the_oracle(attention, case):
    """Heads of 96 to 256 channels use every channel."""
    assert_matches_oracle(attention, case)


@requirement("attention.tiles.many-heads", source=GQA)
@given(case=attention_cases(heads=((16, 4), (24, 8), (32, 8)), causal=st.booleans()))
def test_many_heads_match_the_oracle(attention, case):
    """Sixteen query heads and more each read their own group."""
    assert_matches_oracle(attention, case)


def _resized(case, lengths):
    """The case with other numbers of queries and keys."""
    return replace(case, q_len=lengths[0], kv_len=lengths[1])


# Precision


@requirement("attention.precision.long-rows", source="transformers#17437")
@given(
    case=attention_cases(
        heads=((4, 2),),
        q_len=3,
        kv_len=st.sampled_from([700, 1100, 1500]),
        widths=(8, 16),
        batch=5,
        magnitude=st.sampled_from([0.1, 1.0]),
    ),
)
def test_error_does_not_grow_with_the_number_of_keys(attention, case):
    """Over a thousand keys the denominator is not summed in the 16-bit dtype."""

    def check(call):
        # Values of one sign: a sum that stalls shows as a gain instead of hiding in the noise.
        positive = call.then("v = v.abs() + 1")
        assert_close_to(run(attention, positive), expected_output(positive), positive)

    in_every_lane(case, check, attention.device)


@requirement("attention.combined.sequence", source=FLASH, confusable={"q_len = kv_len"})
@given(
    case=attention_cases(
        lengths="equal",
        causal=True,
        mask=st.sampled_from([None, "boolean", "bias", "infinite"]),
        padding=st.sampled_from([None, "left", "right"]),
        scale=st.sampled_from([None, 0.2]),
        memory=st.sampled_from(["contiguous", "transposed", "fused"]),
        magnitude=st.sampled_from([1.0, 3.0]),
    )
)
def test_options_combine_over_a_sequence(attention, case):
    """Masks, padding, scale and strides hold together over a whole sequence."""
    assert_matches_oracle_where_keys_are_seen(attention, case)


@requirement("attention.combined.query-block", source=FLASH)
@given(
    case=attention_cases(
        lengths="longer",
        causal=st.booleans(),
        mask=st.sampled_from([None, "boolean", "bias per head", "infinite"]),
        padding=st.sampled_from([None, "left"]),
        scale=st.sampled_from([None, 0.2]),
        memory=st.sampled_from(["contiguous", "transposed", "expanded"]),
        magnitude=st.sampled_from([1.0, 3.0]),
    )
)
def test_options_combine_over_a_query_block(attention, case):
    """Masks, padding, scale and strides hold together for a block against a cache."""
    assert_matches_oracle_where_keys_are_seen(attention, case)


@requirement("attention.combined.everything", source=FLASH, level="extended")
@given(
    case=attention_cases(
        lengths="longer",
        value_width=st.sampled_from(["equal", "different"]),
        causal=st.booleans(),
        window=st.sampled_from([None, (2, 0), (3, 1), (None, 2)]),
        mask=st.sampled_from([None, "boolean", "bias per head"]),
        cache=st.sampled_from([None, "nan"]),
        scale=st.sampled_from([None, 0.2]),
        softcap=st.sampled_from([None, 3.0]),
        sinks=st.booleans(),
        memory=st.sampled_from(["contiguous", "transposed"]),
    )
)
def test_everything_combines(attention, case):
    """Every option holds together with every other."""
    assert_matches_oracle(attention, case)


# More elements than an int32 counts

WRAPPED_QUERIES = "fla-org/flash-linear-attention#1080"
WRAPPED_KEYS = "pytorch#190857; vllm-project/vllm#50427"
LARGE = st.sampled_from([LargeCase("queries"), LargeCase("queries", tokens_first=True)])
LARGE_CACHE = st.sampled_from(
    [LargeCase("cache", heads=256), LargeCase("cache", heads=256, tokens_first=True)]
)


@requirement("attention.large.queries", source=WRAPPED_QUERIES, level="extended", gpu=True)
@given(case=LARGE)
def test_queries_beyond_int32_offsets(attention, case):
    """With more than 2^31 elements of queries and output, each row is still that of its query."""
    assert_large_queries(attention, case)


@requirement("attention.large.cache", source=WRAPPED_KEYS, level="extended", gpu=True)
@given(case=LARGE_CACHE)
def test_keys_beyond_int32_offsets(attention, case):
    """With more than 2^31 elements of keys and values, each head still reads its own."""
    assert_large_cache(attention, case)
