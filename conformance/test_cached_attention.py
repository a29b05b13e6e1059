"""The requirements of the contract ``cached_attention``: step by step is as all at once.

The oracle rotates the whole sequence at absolute positions and attends once, in float64.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.cached_cases import cached_cases
from conformance.harness.cached_checks import (
    assert_caches_independent,
    assert_rows_as_alone,
    assert_steps_deterministic,
    assert_steps_match,
)
from conformance.harness.requirement import requirement
from conformance.harness.rotary_cases import any_layout

CACHE = "transformers, 'Caching'"
MOEUT = "RobertCsordas/moeut#6"
WINDOW = "Mistral 7B, arXiv 2310.06825, section 2"
GPT_OSS = "openai/gpt-oss; transformers GptOssAttention"

SCALES = st.sampled_from([0.12, 0.5, 1.0])


@requirement("cached_attention.steps.any-schedule", source=CACHE, level="extended", smoke=True)
@given(case=cached_cases())
def test_steps_of_any_size_equal_one_pass(cached_attention, case):
    """Steps of one and of several tokens give what one pass over all tokens gives."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.steps.one-token", source=MOEUT, level="extended")
@given(case=cached_cases(schedule="ones"))
def test_decode_of_one_token_equals_one_pass(cached_attention, case):
    """After a first step, single tokens are at the positions that follow."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.steps.three-tokens", source="trymirai/lalamo#200", level="extended")
@given(case=cached_cases(schedule="threes"))
def test_decode_of_three_tokens_equals_one_pass(cached_attention, case):
    """After a first step, three tokens at a time are causal among themselves too."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.steps.first",
    source=CACHE,
    level="extended",
    confusable={"a single step"},
)
@given(case=cached_cases(schedule="single", value_width="different"))
def test_first_step_is_causal_attention(cached_attention, case):
    """The first step of an empty cache is causal attention over rotated queries and keys."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.steps.past-128-tokens", source=CACHE, level="extended")
@given(case=cached_cases(schedule="past-128"))
def test_a_cache_of_more_than_128_tokens_keeps_them_all(cached_attention, case):
    """Steps that take a cache from below 128 tokens beyond see every token that came before."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.window.one-token", source="karpathy/nanochat#456", level="extended")
@given(case=cached_cases(schedule="ones", windowed=True))
def test_decode_of_one_token_keeps_to_the_window(cached_attention, case):
    """Beyond the window, single tokens see the window only, and positions keep counting."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.window.three-tokens", source="trymirai/lalamo#200", level="extended")
@given(case=cached_cases(schedule="threes", windowed=True))
def test_decode_of_three_tokens_keeps_to_the_window(cached_attention, case):
    """Beyond the window, each of three tokens has a window of its own."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.window.any-schedule", source="ollama/ollama#15591", level="extended")
@given(case=cached_cases(windowed=True))
def test_window_is_crossed_by_any_schedule(cached_attention, case):
    """Steps of any size cross the window several times, and every key in it is still seen."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.padding.left", source="unslothai/unsloth#4078", level="extended")
@given(case=cached_cases(schedule="ones", padded="left"))
def test_rows_count_from_behind_their_padding(cached_attention, case):
    """In a left-padded batch each row counts its own tokens, in the first step and later."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.padding.rows-alone", source="unslothai/unsloth#4078", level="extended"
)
@given(case=cached_cases(padded="left"))
def test_a_padded_row_is_as_it_is_alone(cached_attention, case):
    """Each row of a left-padded batch gives what it gives alone and without padding."""
    assert_rows_as_alone(cached_attention, case)


@requirement(
    "cached_attention.padding.ended-rows",
    source="transformers GenerationMixin, unfinished_sequences",
    level="extended",
)
@given(case=cached_cases(padded="ended"))
def test_padding_of_ended_rows_takes_no_position(cached_attention, case):
    """Rows that ended in a later step go on as if the padding since then had never been."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.window.own-token-only",
    source="transformers DynamicSlidingWindowLayer",
    level="extended",
)
@given(case=cached_cases(schedule="ones", windowed=True, windows=st.just(0)))
def test_narrowest_window_shows_the_token_itself(cached_attention, case):
    """A window (0, 0) shows each token itself and nothing else."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.padding.right-then-window",
    source="transformers DynamicSlidingWindowLayer",
    level="extended",
)
@given(case=cached_cases(schedule="ones", padded="right", windowed=True))
def test_windows_do_not_count_right_padding(cached_attention, case):
    """After a right-padded first step, a window reaches back over real tokens, not over slots."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.padding.window", source="rajveer43/VeloxQuant-MLX#389", level="extended"
)
@given(case=cached_cases(padded="left", windowed=True))
def test_windows_count_real_tokens(cached_attention, case):
    """In a left-padded batch a window reaches back over real tokens."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.sinks.once", source=GPT_OSS, level="extended")
@given(case=cached_cases(sinks=True, windowed=st.booleans()))
def test_sinks_count_once(cached_attention, case):
    """A sink is in the denominator once, however many steps the cache has seen."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.scale.given", source=CACHE, level="extended")
@given(case=cached_cases(scale=SCALES))
def test_scale_that_is_given_is_used(cached_attention, case):
    """A given scale replaces the inverse square root of the width in every step."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.scale.zero",
    source="torch documentation, 'scaled_dot_product_attention'",
    level="extended",
)
@given(case=cached_cases(scale=0.0))
def test_scale_of_zero_is_a_scale(cached_attention, case):
    """A scale of 0 is not taken for none: every visible token has the same weight in every step."""
    assert_steps_match(cached_attention, case)


@requirement(
    "cached_attention.scale.yarn-mscale", source="huggingface/transformers#47435", level="extended"
)
@given(case=cached_cases(rule="yarn-scores", scale=st.sampled_from([None, 0.5])))
def test_yarn_mscale_all_dim_sharpens_scores(cached_attention, case):
    """With mscale_all_dim the scale is multiplied by (0.1 mscale_all_dim ln(factor) + 1)²."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.rotary.scaling", source=CACHE, level="extended")
@given(case=cached_cases(rule=st.sampled_from(["linear", "yarn", "llama3"])))
def test_scaling_rules_hold_in_every_step(cached_attention, case):
    """Scaled frequencies are those of the first step in every later one."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.rotary.layouts", source=CACHE, level="extended")
@given(case=cached_cases(layout=any_layout(), partial=True))
def test_layouts_hold_in_every_step(cached_attention, case):
    """Queries and keys are rotated in the same layout and width in every step."""
    assert_steps_match(cached_attention, case)


@requirement("cached_attention.caches.independent", source=CACHE, level="extended")
@given(case=cached_cases(windowed=st.booleans()))
def test_two_caches_do_not_mix(cached_attention, case):
    """Two caches that are stepped in turn each give what they give alone."""
    assert_caches_independent(cached_attention, case)


@requirement(
    "cached_attention.output.deterministic",
    source="torch documentation, 'Reproducibility'",
    level="extended",
)
@given(case=cached_cases(windowed=st.booleans()))
def test_the_same_steps_give_the_same_bits(cached_attention, case):
    """The same steps in a new cache give the same bits."""
    assert_steps_deterministic(cached_attention, case)


@requirement("cached_attention.options.any-combination", source=CACHE, level="extended")
@given(
    case=cached_cases(
        windowed=st.booleans(),
        rule=st.sampled_from([None, "linear", "yarn", "yarn-scores", "llama3"]),
        layout=st.sampled_from(["half", "interleaved"]),
        sinks=st.booleans(),
        padded=st.sampled_from([None, "left"]),
        scale=st.sampled_from([None, 0.5]),
        value_width="different",
    )
)
def test_options_combine(cached_attention, case):
    """Any options together give what one pass with them gives."""
    assert_steps_match(cached_attention, case)
