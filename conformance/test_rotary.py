"""The requirements of the contract ``rotary``.

Every case runs in float32 against the float64 reference, and a case that drew a 16-bit dtype runs
in that dtype too. Requirements about pairs put a one into a single channel and look where it comes
out, without any tolerance.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.compare import assert_close_to
from conformance.harness.gpu_large import LargeCase, assert_large_rotation
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import requirement
from conformance.harness.rotary_cases import (
    RULES,
    any_layout,
    any_positions,
    layered_cases,
    rotary_cases,
)
from conformance.harness.rotary_checks import (
    assert_calls_match,
    assert_composes,
    assert_deterministic,
    assert_gradient_matches,
    assert_heads_commute,
    assert_identity_at_zero,
    assert_matches_oracle,
    assert_neighbours_differ,
    assert_norms_preserved,
    assert_not_rotated,
    assert_other_output,
    assert_pairs_exactly,
    assert_passes_through,
    assert_same_output,
    assert_scores_relative,
    assert_stateless,
    assert_tables_belong_to_types,
    expected_output,
    run,
)

ROFORMER = "RoFormer, arXiv 2104.09864, section 3.2.2"
RELATIVE = "RoFormer, arXiv 2104.09864, equation 16"
LLAMA = "transformers modeling_llama, apply_rotary_pos_emb"
GPTJ = "transformers modeling_gptj, rotate_every_two"
DEEPSEEK = "transformers modeling_deepseek_v3, apply_rotary_pos_emb_interleave"
NANOGPT = "KellerJordan/modded-nanogpt, class Rotary"
NEOX = "transformers modeling_gpt_neox, rotary_pct"
INTERPOLATION = "Position Interpolation, arXiv 2306.15595"
HF_ROPE = "transformers modeling_rope_utils"
YARN = "YaRN, arXiv 2309.00071; transformers _compute_yarn_parameters"
LLAMA3 = "transformers _compute_llama3_parameters"
LONGROPE = "LongRoPE, arXiv 2402.13753; transformers _compute_longrope_parameters"
GEMMA3 = "Gemma 3, arXiv 2503.19786, section 2"
FLASH_ROTARY = "Dao-AILab/flash-attention, ops/triton/rotary.py, BLOCK_M and BLOCK_K"
LAGUNA = "transformers Laguna, partial_rotary_factor of a layer type"

PAIRED_LAYOUTS = st.sampled_from(["half", "interleaved", "interleaved-to-half"])
SCATTERED = st.sampled_from(["shuffled", "per-row", "offset"])
ANY_RULE = st.sampled_from(RULES)
FACTORS = st.sampled_from([1.0, 2.0, 0.5, 1.25])
MANY = st.sampled_from([65, 128, 64, 130, 96, 129])


# Output and inputs


@requirement("rotary.output.shape-dtype-device", source=LLAMA, smoke=True)
@given(case=rotary_cases(positions=any_positions()))
def test_output_is_like_the_input(rotary, case):
    """The output has the shape, the dtype and the device of x."""
    in_every_lane(case, lambda call: run(rotary, call), rotary.device)


@requirement("rotary.inputs.unchanged", source="unslothai/unsloth#5001")
@given(case=rotary_cases(positions=SCATTERED))
def test_input_stays_as_it_was(rotary, case):
    """Neither x nor the positions are written to, and the output shares no memory with them."""
    # The subject compares every input of every call; a second call shows what the first one kept.
    because = "the call is repeated"
    assert_same_output(rotary, case, lambda call: call, because=because)


@requirement("rotary.output.deterministic", source="torch documentation, 'Reproducibility'")
@given(case=rotary_cases(positions=any_positions()))
def test_two_runs_are_identical(rotary, case):
    """The same inputs give the same bits, also after a call at other positions in between."""
    assert_deterministic(rotary, case, "positions = positions * 3 + 7")


@requirement("rotary.memory.non-contiguous", source="torch documentation, 'Tensor Views'")
@given(
    case=rotary_cases(
        positions=SCATTERED,
        memory=st.sampled_from(["transposed", "expanded", "fused", "offset", "expanded-heads"]),
    )
)
def test_memory_layout_does_not_matter(rotary, case):
    """Transposed, expanded and sliced inputs are rotated as contiguous ones are."""
    assert_matches_oracle(rotary, case)


# Layouts: which channels pair, and how a pair turns


@requirement("rotary.layout.half", source=LLAMA, smoke=True)
@given(case=rotary_cases(positions=SCATTERED))
def test_half_split_pairs_turn_by_position_times_frequency(rotary, case):
    """Channels p and p + P, as (a, b), become (a cos - b sin, b cos + a sin)."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layout.interleaved", source=GPTJ, level="extended")
@given(case=rotary_cases(positions=SCATTERED, layout="interleaved"))
def test_interleaved_pairs_turn_in_place(rotary, case):
    """Channels 2p and 2p + 1 turn as a pair and stay where they are."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layout.interleaved-to-half", source=DEEPSEEK, level="extended")
@given(case=rotary_cases(positions=SCATTERED, layout="interleaved-to-half"))
def test_interleaved_pairs_are_written_back_as_halves(rotary, case):
    """Channels 2p and 2p + 1 turn as a pair and come out as channels p and p + P."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layout.half-truncated", source=NANOGPT, level="extended")
@given(case=rotary_cases(positions=SCATTERED, layout="half-truncated"))
def test_half_truncated_pairs_turn_the_other_way(rotary, case):
    """Half of the pairs turn clockwise, with frequencies from 1 to 1 / theta; the others stay."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.pairs.half", source="jzhang38/TinyLlama#24")
@given(case=rotary_cases(positions="offset"))
def test_half_split_pairs_are_p_and_p_plus_half(rotary, case):
    """A one in channel p reaches channels p and p + P, and no other."""
    assert_pairs_exactly(rotary, case)


@requirement("rotary.pairs.interleaved", source="pytorch/torchtitan#801", level="extended")
@given(case=rotary_cases(positions="offset", layout="interleaved"))
def test_interleaved_pairs_are_neighbours(rotary, case):
    """A one in channel 2p or 2p + 1 reaches these two channels, and no other."""
    assert_pairs_exactly(rotary, case)


@requirement("rotary.pairs.interleaved-to-half", source=DEEPSEEK, level="extended")
@given(case=rotary_cases(positions="offset", layout="interleaved-to-half"))
def test_interleaved_to_half_pairs_change_places(rotary, case):
    """A one in channel 2p or 2p + 1 reaches channels p and p + P, and no other."""
    assert_pairs_exactly(rotary, case)


@requirement("rotary.pairs.half-truncated", source=NANOGPT, level="extended")
@given(case=rotary_cases(positions="offset", layout="half-truncated"))
def test_half_truncated_leaves_half_of_the_pairs_alone(rotary, case):
    """A one in channel p reaches p and p + P where p < P / 2, and only itself elsewhere."""
    assert_pairs_exactly(rotary, case)


@requirement("rotary.heads.alike", source="facebookresearch/xformers#841")
@given(case=rotary_cases(positions=SCATTERED))
def test_all_heads_turn_alike(rotary, case):
    """The same vector in every head comes out the same: the angle is that of the token."""
    assert_calls_match(
        rotary, case, lambda call: call.then("x = x[:, :1].repeat(1, x.shape[1], 1, 1)")
    )


@requirement("rotary.heads.permuted", source="facebookresearch/xformers#841")
@given(case=rotary_cases(positions=SCATTERED))
def test_permuting_heads_permutes_the_output(rotary, case):
    """Heads in another order come out in that order."""
    assert_heads_commute(rotary, case)


@requirement("rotary.rows.independent", source=LLAMA)
@given(case=rotary_cases(positions=SCATTERED))
def test_batch_rows_do_not_mix(rotary, case):
    """Other vectors and positions in other batch rows leave a row as it is, bit by bit."""
    assert_same_output(
        rotary,
        case,
        # The largest position stays, since scaling rules may depend on it.
        lambda call: call.then(
            "x = torch.cat([x[:1], -2 * x[1:]])",
            "positions = torch.cat([positions[:1], positions[1:].flip(1)])",
        ),
        part=lambda output: output[:1],
        because="only other batch rows were changed",
    )


@requirement("rotary.tokens.independent", source=ROFORMER)
@given(case=rotary_cases(positions=SCATTERED))
def test_tokens_do_not_mix(rotary, case):
    """Other vectors in other tokens leave a token as it is, bit by bit."""
    assert_same_output(
        rotary,
        case,
        lambda call: call.then("x = x.clone()", "x[:, :, 1::2] *= -2"),
        part=lambda output: output[:, :, ::2],
        because="only other tokens were changed",
    )


# Positions


@requirement("rotary.positions.zero", source=ROFORMER)
@given(case=rotary_cases(positions=SCATTERED))
def test_position_zero_changes_nothing(rotary, case):
    """At position 0 the output is x, bit by bit."""
    assert_identity_at_zero(rotary, case)


@requirement("rotary.positions.any-order", source=LLAMA)
@given(case=rotary_cases(positions="shuffled"))
def test_positions_come_in_any_order(rotary, case):
    """Each token turns by its own position, whatever the order of positions."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.positions.repeated", source="transformers position_ids of packed sequences")
@given(case=rotary_cases(positions="repeated"))
def test_positions_may_repeat(rotary, case):
    """Tokens at the same position turn alike."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.positions.offset", source="RobertCsordas/moeut#6")
@given(case=rotary_cases(positions="sequence"))
def test_a_later_slice_turns_as_in_the_whole(rotary, case):
    """Tokens n and on, at their positions, come out as they do in the whole sequence."""
    assert_calls_match(
        rotary,
        case,
        lambda call: call.then(
            "n = x.shape[2] // 2", "x, positions = x[:, :, n:], positions[:, n:]"
        ),
    )


@requirement("rotary.positions.per-row", source="unslothai/unsloth#4078")
@given(case=rotary_cases(positions="per-row"))
def test_each_row_has_positions_of_its_own(rotary, case):
    """Batch rows that begin at different positions turn differently."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.positions.left-padded", source="unslothai/unsloth#4078")
@given(case=rotary_cases(positions="left-padded"))
def test_rows_count_from_behind_their_padding(rotary, case):
    """In a left-padded batch each row counts its real tokens from 0."""
    assert_matches_oracle(rotary, case)


@requirement(
    "rotary.positions.single-token",
    source="skyzh/tiny-llm#46",
    confusable={"one of tokens"},
)
@given(case=rotary_cases(positions="per-row", tokens=1))
def test_a_single_token_turns_by_its_position(rotary, case):
    """One token a row, as in decoding, turns by the position that its row has reached."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.positions.far", source="EleutherAI/gpt-neox#1003")
@given(case=rotary_cases(positions="far", dtypes=("bfloat16", "float16", "float32")))
def test_far_positions_are_exact_in_every_dtype(rotary, case):
    """Positions up to 131071 are counted exactly, whatever the dtype of x."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.positions.neighbours-distinct", source="deepspeedai/DeepSpeed#4932")
@given(case=rotary_cases(positions="far", dtypes=("bfloat16", "float16", "float32")))
def test_neighbouring_far_positions_differ(rotary, case):
    """Beyond 256 and 2048 too, the same vector at neighbouring positions comes out different."""
    assert_neighbours_differ(rotary, case)


# Sizes that kernels cut into tiles


@requirement("rotary.tiles.widths", source=FLASH_ROTARY)
@given(case=rotary_cases(positions=SCATTERED, widths=(128, 256, 80), partial=False))
def test_every_pair_of_a_wide_head_turns(rotary, case):
    """Heads of 80, 128 and 256 channels turn from the first pair to the last."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.tiles.tokens", source=FLASH_ROTARY)
@given(
    case=rotary_cases(positions=st.sampled_from(["per-row", "offset"]), tokens=MANY, widths=(8, 12))
)
def test_every_token_of_a_long_call_turns(rotary, case):
    """In calls of 64 to 130 tokens, each token turns by its position, also across a tile's edge."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.tiles.every-layout", source=FLASH_ROTARY, level="extended")
@given(
    case=rotary_cases(
        positions="per-row",
        layout=any_layout(),
        tokens=st.sampled_from([65, 9]),
        widths=(128, 20),
        telling_only=True,
    )
)
def test_wide_heads_and_long_calls_turn_in_every_layout(rotary, case):
    """Heads of 128 channels and calls of 65 tokens turn from first to last in every layout."""
    assert_matches_oracle(rotary, case)


# Frequencies


@requirement("rotary.theta.configured", source="lyogavin/airllm#369")
@given(
    case=rotary_cases(
        positions=SCATTERED,
        thetas=(1e6, 5e5, 500.0, 1024.0, 25000000.0, 10000.0),
    )
)
def test_frequencies_follow_theta(rotary, case):
    """Pair p of P turns by theta ** (-p / P) radians a position, for the theta that is given."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.theta.matters", source="lyogavin/airllm#369")
@given(case=rotary_cases(positions="offset"))
def test_another_theta_changes_the_output(rotary, case):
    """Another theta gives another output."""
    assert_other_output(
        rotary, case, lambda call: call.then(theta="30.0"), because="theta 30 changes nothing"
    )


@requirement("rotary.partial.pass-through", source=NEOX, level="extended")
@given(case=rotary_cases(positions=SCATTERED, partial=True, layout=any_layout()))
def test_channels_beyond_the_rotated_pass_through(rotary, case):
    """Channels from rotary_dim on come out bit by bit as they went in, in every layout."""
    assert_passes_through(rotary, case)


@requirement("rotary.partial.frequencies", source=NEOX, level="extended")
@given(case=rotary_cases(positions=SCATTERED, partial=True))
def test_frequencies_are_those_of_the_rotated_width(rotary, case):
    """The first rotary_dim channels turn as if they were the whole head."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.partial.every-layout", source=DEEPSEEK, level="extended")
@given(
    case=rotary_cases(
        positions=SCATTERED,
        partial=True,
        layout=st.sampled_from(["interleaved", "interleaved-to-half", "half-truncated"]),
    )
)
def test_every_layout_may_be_partial(rotary, case):
    """Pairs are formed within the first rotary_dim channels in every layout."""
    assert_matches_oracle(rotary, case)


@requirement(
    "rotary.partial.every-scaling", source="AI-Hypercomputer/maxtext#4615", level="extended"
)
@given(case=rotary_cases(positions=SCATTERED, partial=True, rule=ANY_RULE, widths=(12, 16, 36, 64)))
def test_every_scaling_rule_may_be_partial(rotary, case):
    """Under every scaling rule, frequencies are those of rotary_dim and the rest passes through."""
    assert_passes_through(rotary, case)
    assert_matches_oracle(rotary, case)


# Scaling rules


@requirement(
    "rotary.scaling.default-is-none",
    source="ml-explore/mlx-lm#1553",
    level="extended",
    confusable={"scaling changes nothing"},
)
@given(case=rotary_cases(positions=SCATTERED, rule="default"))
def test_default_scaling_is_no_scaling(rotary, case):
    """A table with rope_type "default" gives the bits that no table gives."""
    assert_same_output(
        rotary,
        case,
        lambda call: call.without("scaling"),
        because="rope_type default is no scaling",
    )
    assert_matches_oracle(rotary, case)


@requirement("rotary.linear.frequencies", source=INTERPOLATION, level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="linear", layout=PAIRED_LAYOUTS))
def test_linear_scaling_divides_every_frequency(rotary, case):
    """With linear scaling every pair turns by its frequency divided by the factor."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.linear.divides-positions", source="lablup/mlxcel#1340", level="extended")
@given(
    case=rotary_cases(
        positions=SCATTERED, rule="linear", keys={"factor": st.sampled_from([4.0, 8.0, 3.0])}
    )
)
def test_linear_scaling_undoes_stretched_positions(rotary, case):
    """Positions times the factor, linearly scaled, turn as the positions do without scaling."""
    factor = int(dict(case.scaling)["factor"])

    def check(call):
        stretched = call.then(f"positions = positions * {factor}")
        assert_close_to(run(rotary, stretched), expected_output(call.without("scaling")), stretched)

    in_every_lane(case, check, rotary.device)


@requirement(
    "rotary.dynamic.within-trained-length",
    source="transformers _compute_dynamic_ntk_parameters",
    level="extended",
    confusable={"scaling changes nothing"},
)
@given(case=rotary_cases(positions=SCATTERED, rule="dynamic", reach="within"))
def test_dynamic_scaling_rests_within_the_trained_length(rotary, case):
    """Up to the trained length, dynamic NTK scaling changes nothing."""

    def check(call):
        assert_close_to(run(rotary, call), expected_output(call.without("scaling")), call)

    in_every_lane(case, check, rotary.device)


@requirement(
    "rotary.dynamic.beyond-trained-length",
    source="transformers _compute_dynamic_ntk_parameters",
    level="extended",
)
@given(case=rotary_cases(positions=SCATTERED, rule="dynamic", reach="beyond"))
def test_dynamic_scaling_stretches_theta_with_the_length(rotary, case):
    """Beyond the trained length, theta grows with the largest position of the call."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.dynamic.stateless", source="huggingface/transformers#25306", level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="dynamic", reach="beyond"))
def test_dynamic_scaling_forgets_longer_calls(rotary, case):
    """Short, long, short: each call is scaled by its own length, the short ones identically."""
    assert_stateless(rotary, case)


@requirement("rotary.longrope.stateless", source="huggingface/transformers#27227", level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="longrope", reach="beyond"))
def test_longrope_forgets_longer_calls(rotary, case):
    """Short, long, short: each call has the divisors of its own length."""
    assert_stateless(rotary, case)


@requirement("rotary.yarn.frequencies", source=YARN, level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="yarn", layout=PAIRED_LAYOUTS))
def test_yarn_interpolates_slow_pairs(rotary, case):
    """Fast pairs keep their frequency, slow ones have it divided, a linear ramp lies between."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.attention-factor-default", source=YARN, level="extended")
@given(case=rotary_cases(positions="offset", rule="yarn"))
def test_yarn_grows_with_the_logarithm_of_the_factor(rotary, case):
    """Without attention_factor, position 0 gives x times 0.1 ln(factor) + 1."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))


@requirement(
    "rotary.yarn.attention-factor-given", source="vllm-project/vllm#48351", level="extended"
)
@given(case=rotary_cases(positions="offset", rule="yarn", keys={"attention_factor": FACTORS}))
def test_yarn_uses_the_attention_factor_that_is_given(rotary, case):
    """With attention_factor, position 0 gives x times attention_factor."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.mscale-ratio", source="transformers#38224; DeepSeek-V3", level="extended")
@given(
    case=rotary_cases(
        positions="offset",
        rule="yarn",
        keys={
            "mscale": st.sampled_from([1.0, 0.707, 1.5]),
            "mscale_all_dim": st.sampled_from([0.5, 0.8, 1.0]),
        },
    )
)
def test_yarn_takes_the_ratio_of_both_mscales(rotary, case):
    """With mscale and mscale_all_dim, the factor is the ratio of their mscales."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.mscale-alone", source=YARN, level="extended")
@given(
    case=rotary_cases(
        positions="offset", rule="yarn", keys={"mscale": st.sampled_from([0.707, 1.5, 0.5])}
    )
)
def test_yarn_does_not_use_mscale_alone(rotary, case):
    """With mscale and without mscale_all_dim, the factor is 0.1 ln(factor) + 1 as without both."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.truncate-off", source="openai/gpt-oss config; " + YARN, level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="yarn", keys={"truncate": False}))
def test_yarn_keeps_the_ramp_unrounded_without_truncate(rotary, case):
    """With truncate False the ends of the ramp are not rounded to whole pairs."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.betas", source=YARN, level="extended")
@given(
    case=rotary_cases(
        positions=SCATTERED,
        rule="yarn",
        keys={
            "beta_fast": st.sampled_from([8.0, 16.0, 4.0]),
            "beta_slow": st.sampled_from([2.0, 0.5]),
            "original_max_position_embeddings": st.sampled_from([512, 4096]),
        },
    )
)
def test_yarn_ramp_lies_between_the_betas(rotary, case):
    """The ramp runs from the pair with beta_fast turns to that with beta_slow turns."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.yarn.factor-given", source="huggingface/transformers#38224", level="extended")
@given(
    case=rotary_cases(
        positions=SCATTERED,
        rule="yarn",
        keys={
            "factor": st.sampled_from([40.0, 3.0, 16.0]),
            "original_max_position_embeddings": st.sampled_from([128, 48, 1024]),
        },
    )
)
def test_yarn_uses_the_factor_that_is_given(rotary, case):
    """The factor is the one in the table, whatever the lengths are."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.llama3.bands", source=LLAMA3, level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="llama3", layout=PAIRED_LAYOUTS))
def test_llama3_has_three_bands(rotary, case):
    """Long waves are divided by the factor, short ones kept, and those between are blended."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.longrope.short", source=LONGROPE, level="extended")
@given(case=rotary_cases(positions=SCATTERED, rule="longrope", reach="within"))
def test_longrope_divides_by_short_factors(rotary, case):
    """Up to the trained length, each pair has its frequency divided by its short_factor."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.longrope.switch", source=LONGROPE, level="extended")
@given(case=rotary_cases(positions="sequence", rule="longrope", reach="beyond"))
def test_longrope_switches_right_behind_the_trained_length(rotary, case):
    """A call of the trained length is divided by short_factor, one token more by long_factor."""
    trained = dict(case.scaling)["original_max_position_embeddings"]
    for last in (trained - 1, trained):
        assert_calls_match(
            rotary,
            case,
            lambda call, last=last: call.then(f"positions = positions.flip(1) % 4 + {last - 3}"),
        )


@requirement("rotary.longrope.attention-factor-default", source=LONGROPE, level="extended")
@given(case=rotary_cases(positions="offset", rule="longrope"))
def test_longrope_grows_with_the_factor(rotary, case):
    """Without attention_factor, x grows by sqrt(1 + ln(factor) / ln(trained length))."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))


@requirement("rotary.longrope.attention-factor-given", source=LONGROPE, level="extended")
@given(case=rotary_cases(positions="offset", rule="longrope", keys={"attention_factor": FACTORS}))
def test_longrope_uses_the_attention_factor_that_is_given(rotary, case):
    """With attention_factor, x grows by that factor, on either side of the trained length."""
    assert_calls_match(rotary, case, lambda call: call.then("positions = positions * 0"))
    assert_matches_oracle(rotary, case)


@requirement("rotary.scaling.far", source=HF_ROPE, level="extended")
@given(
    case=rotary_cases(
        positions="far",
        rule=ANY_RULE,
        dtypes=("bfloat16", "float16", "float32"),
        layout=PAIRED_LAYOUTS,
    )
)
def test_scaled_far_positions_are_exact(rotary, case):
    """Under every scaling rule, positions up to 131071 are counted exactly in every dtype."""
    assert_matches_oracle(rotary, case)


# What a rotation is


@requirement("rotary.relative.scores", source=RELATIVE)
@given(case=rotary_cases(positions=SCATTERED))
def test_scores_depend_on_relative_positions_only(rotary, case):
    """Query times key stays the same when all positions grow by the same number."""
    assert_scores_relative(rotary, case, shift=1 + case.seed % 1000)


@requirement("rotary.norm.pairs", source=ROFORMER)
@given(case=rotary_cases(positions=any_positions()))
def test_each_pair_keeps_its_length(rotary, case):
    """Turning a pair of channels does not change its length."""
    assert_norms_preserved(rotary, case)


@requirement("rotary.rotation.composes", source=ROFORMER)
@given(case=rotary_cases(positions=SCATTERED))
def test_two_turns_are_one_turn_by_the_sum(rotary, case):
    """Turning by position m and then by n is turning by m + n."""
    assert_composes(rotary, case)


@requirement("rotary.gradient.x", source="PaddlePaddle/Paddle#74716")
@given(case=rotary_cases(positions=SCATTERED))
def test_gradient_turns_back(rotary, case):
    """The gradient of x is the gradient of the output, turned the other way."""
    assert_gradient_matches(rotary, case)


@requirement("rotary.gradient.every-option", source="PaddlePaddle/Paddle#74716", level="extended")
@given(
    case=rotary_cases(
        positions=any_positions(),
        layout=any_layout(),
        rule=st.sampled_from([None, "yarn", "longrope"]),
        memory=st.sampled_from(["contiguous", "transposed", "offset"]),
    )
)
def test_gradient_turns_back_with_every_option(rotary, case):
    """In every layout, partial and scaled: the gradient of x is the adjoint of the rotation."""
    assert_gradient_matches(rotary, case)


# Layers of different types


@requirement("rotary.layers.theta", source=GEMMA3, level="extended")
@given(case=layered_cases(differ="theta", positions=SCATTERED))
def test_each_layer_type_has_its_theta(rotary, case):
    """A layer turns with the theta of its own type."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layers.scaling", source="antonellof/ferrox#39", level="extended")
@given(case=layered_cases(differ="scaling", positions=SCATTERED))
def test_each_layer_type_has_its_scaling(rotary, case):
    """A layer is scaled as its own type says; a type without scaling is not scaled."""
    assert_matches_oracle(rotary, case)


@requirement(
    "rotary.layers.yarn-truncate", source="transformers _compute_yarn_parameters", level="extended"
)
@given(
    case=layered_cases(
        differ="scaling", rules=("yarn",), keys={"truncate": False}, positions=SCATTERED
    )
)
def test_each_layer_type_has_its_yarn_range(rotary, case):
    """The range of YaRN's ramp is rounded or not as the table of the layer's own type says."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layers.partial", source=LAGUNA, level="extended")
@given(case=layered_cases(differ="rotary_dim", positions=SCATTERED))
def test_each_layer_type_has_its_rotated_width(rotary, case):
    """A layer turns the first rotary_dim channels of its own type, and lets the others pass."""
    assert_matches_oracle(rotary, case)


@requirement("rotary.layers.permuted", source="Avarok-Cybersecurity/atlas#276", level="extended")
@given(case=layered_cases(positions=SCATTERED))
def test_permuting_layer_types_permutes_tables(rotary, case):
    """Exchanging the tables of two types exchanges what layers of these types do."""
    assert_tables_belong_to_types(rotary, case)


@requirement(
    "rotary.layers.not-rotated", source="transformers SmolLM3, no_rope_layers", level="extended"
)
@given(case=layered_cases(positions=SCATTERED))
def test_layers_without_rotation_change_nothing(rotary, case):
    """A type of layer without a table leaves x as it is, bit by bit."""
    assert_not_rotated(rotary, case)


# All of it together


@requirement("rotary.options.any-combination", source=HF_ROPE)
@given(
    case=rotary_cases(
        positions=any_positions(),
        layout=any_layout(),
        rule=st.sampled_from([None, *RULES]),
        memory=st.sampled_from(["contiguous", "transposed", "fused", "offset", "expanded"]),
    )
)
def test_options_combine(rotary, case):
    """Any options together give what the definition of each of them says."""
    assert_matches_oracle(rotary, case)


# More elements than an int32 counts


@requirement(
    "rotary.large.elements", source="linkedin/Liger-Kernel#1342", level="extended", gpu=True
)
@given(case=st.sampled_from([LargeCase("rows"), LargeCase("rows", tokens_first=True)]))
def test_rows_beyond_int32_offsets(rotary, case):
    """With more than 2^31 elements each row still turns by its own position."""
    assert_large_rotation(rotary, case)
