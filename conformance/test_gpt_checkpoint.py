"""The requirements of the contract ``gpt_checkpoint``: what is loaded computes what was trained."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.gpt_cases import CONTAINERS, SHALLOW, WRAPPED, extras, gpt_cases
from conformance.harness.gpt_checks import (
    OUTPUTS,
    assert_any_length,
    assert_causal,
    assert_documents,
    assert_eighth_block,
    assert_facts,
    assert_ids_checked,
    assert_loads,
    assert_long,
    assert_normed_heads,
    assert_options_not_kept,
    assert_outputs_kept,
    assert_padded_documents,
    assert_padding,
    assert_padding_scalars,
    assert_rows_independent,
    assert_same_with_autograd,
    assert_skip_weights,
    assert_soft_cap,
    assert_value_lambdas,
    assert_window,
    assert_wrappers_taken_off,
)
from conformance.harness.gpt_damage import (
    assert_damaged_files_refused,
    assert_deliberate,
    assert_names_file,
    assert_names_tensor,
    assert_refused,
    attention_elsewhere,
    damage_cases,
    flipped_byte,
    gap_in_blocks,
    half_wrapped_name,
    left_over_tensor,
    misshapen_tensor,
    missing_tensor,
    mixed_formats,
    narrow_heads,
    no_model_entry,
    not_a_state,
    not_finite,
    not_floating,
    odd_or_few_blocks,
    other_files,
    pickled_code,
    quantised,
    short_head,
    short_scalars,
    stored_twice,
    swapped_records,
    transposed_tensor,
    truncated,
    uneven_heads,
    unknown_head_width,
)
from conformance.harness.gpt_honesty import (
    assert_any_seed,
    assert_by_name,
    assert_dictionary_unchanged,
    assert_dtype,
    assert_elements_count,
    assert_facts_or_refused,
    assert_failing_save,
    assert_file_unchanged,
    assert_global_state_kept,
    assert_kinds_of_states,
    assert_later_changes_ignored,
    assert_loads_twice,
    assert_optimizer_ignored,
    assert_replaced_file_read_anew,
    assert_saved,
    assert_saved_onto_itself,
    assert_shared,
    assert_state,
    assert_state_in_dtype,
    assert_strided,
    assert_tensors_count,
)
from conformance.harness.requirement import requirement

SMALL = "modded-ipagpt-training train_gpt_small.py"
MEDIUM = "modded-ipagpt-training train_gpt_medium.py"
LOADER = "modded-ipagpt-training load_checkpoint_helper.py"
BOTH = "modded-ipagpt-training train_gpt_small.py and train_gpt_medium.py"
CHECKSUMS = "PKWARE APPNOTE 4.4.7: CRC-32 of a record"
LARGE = "modded-ipagpt-training train_gpt_large_lite.py, utils/xlsum_sft_modeling.py"

ANY_CONTAINER = st.sampled_from([*CONTAINERS, "memory"])
OF_TORCH = st.sampled_from(["training", "bare"])

# What the checkpoint holds


@requirement("gpt_checkpoint.inspect.architecture", source=LOADER, smoke=True)
@given(case=gpt_cases())
def test_inspect_tells_the_architecture(gpt_checkpoint, case):
    """Format, rows of the embeddings, width, layers, heads: from names and shapes alone."""
    config = case.config()
    truth = {
        "checkpoint_format": config.format,
        "vocab_size": config.vocab_size,
        "model_dim": config.model_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
    }
    assert_facts(gpt_checkpoint, case.call(), truth)


@requirement("gpt_checkpoint.inspect.padding", source=BOTH)
@given(case=gpt_cases(vocab=st.sampled_from([37, 127, 128, 129, 200, 256])))
def test_inspect_tells_padding(gpt_checkpoint, case):
    """Rows of the LM head are told apart from those of the embeddings, padding from scalars."""
    config = case.config()
    truth = {
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.padded_vocab_size,
        "scalars_size": config.scalars_size,
        "scalars_padding": config.scalars_padding,
    }
    assert_facts(gpt_checkpoint, case.call(), truth)


# The function that was trained


@requirement("gpt_checkpoint.function.small", source=SMALL, smoke=True)
@given(case=gpt_cases(format="small", stored="float32"))
def test_small_checkpoint_keeps_its_function(gpt_checkpoint, case):
    """Features and logits of a small checkpoint are those of the small training script."""
    assert_loads(gpt_checkpoint, case, outputs=OUTPUTS)


@requirement("gpt_checkpoint.function.medium", source=MEDIUM, smoke=True)
@given(case=gpt_cases(format="medium", stored="float32", layers=st.sampled_from([16, 12, 8, 24])))
def test_medium_checkpoint_keeps_its_function(gpt_checkpoint, case):
    """Features and logits of a medium checkpoint are those of the medium training script."""
    assert_loads(gpt_checkpoint, case, outputs=OUTPUTS)


@requirement("gpt_checkpoint.function.stored-dtypes", source=BOTH)
@given(case=gpt_cases(stored="as-trained"))
def test_weights_of_several_dtypes_are_computed_with(gpt_checkpoint, case):
    """bfloat16 embeddings beside float32 weights, as the scripts store them, compute in float32."""
    assert_loads(gpt_checkpoint, case, outputs=OUTPUTS)


@requirement("gpt_checkpoint.head-width.default", source=BOTH)
@given(
    case=gpt_cases(format="small", heads=st.sampled_from([1] * 7 + [2]), head_dim=None, layers=6)
)
def test_heads_are_128_wide_in_the_small_script(gpt_checkpoint, case):
    """A small checkpoint has heads of 128 channels, which no tensor tells."""
    assert_facts(gpt_checkpoint, case.call(), {"num_heads": case.heads, "head_dim": 128})
    assert_loads(gpt_checkpoint, case)


@requirement("gpt_checkpoint.head-width.given", source=LARGE)
@given(
    case=gpt_cases(
        heads=st.sampled_from([1, 2, 3]),
        head_dim=st.sampled_from([8, 12, 20, 64]),
        layers=st.sampled_from([8, 12]),
    )
)
def test_head_width_can_be_given(gpt_checkpoint, case):
    """A head width that is given is taken, with any number of heads."""
    assert_facts(gpt_checkpoint, case.call(), {"num_heads": case.heads, "head_dim": case.head_dim})
    assert_loads(gpt_checkpoint, case)


PUBLISHED_SHAPES = st.sampled_from(
    [
        ("small", 12, 6, 128),
        ("medium", 16, 8, 128),
        ("medium", 24, 18, 64),
        ("medium", 36, 20, 64),
        ("medium", 16, 9, 128),
        ("small", 12, 10, 128),
    ]
)


@requirement("gpt_checkpoint.head-width.known-shapes", source=LARGE)
@given(
    case=PUBLISHED_SHAPES.flatmap(
        lambda shape: gpt_cases(
            **dict(zip(("format", "layers", "heads", "head_dim"), shape)),
            blank=True,
            stored="float32",
            container=OF_TORCH,
        )
    )
)
def test_heads_of_published_shapes_are_known(gpt_checkpoint, case):
    """24 blocks of width 1152 have 18 heads of 64, not 9 of 128; 36 of width 1280 have 20 of 64."""
    truth = {"num_heads": case.heads, "head_dim": case.head_dim, "num_layers": case.layers}
    assert_facts(gpt_checkpoint, case.call().without("head_dim"), truth)
    other = {
        "num_heads": case.width // 32,
        "head_dim": 32,
    }  # what is given goes before what is known
    assert_facts(gpt_checkpoint, case.call().then(head_dim="32"), other)


@requirement("gpt_checkpoint.dtype.float64", source=LOADER, level="extended")
@given(case=gpt_cases())
def test_float64_is_computed_with_throughout(gpt_checkpoint, case):
    """In float64 no step is rounded to float32."""
    assert_dtype(gpt_checkpoint, case, torch.float64)


@requirement("gpt_checkpoint.dtype.bfloat16", source=LOADER, level="extended")
@given(case=gpt_cases())
def test_bfloat16_is_as_close_as_it_can_be(gpt_checkpoint, case):
    """In bfloat16 the outputs are as near the oracle as rounding allows, the logits in float32."""
    assert_dtype(gpt_checkpoint, case, torch.bfloat16)


@requirement("gpt_checkpoint.skips.weights", source=BOTH)
@given(case=gpt_cases())
def test_skip_weights_are_those_of_the_format(gpt_checkpoint, case):
    """Small: the first half of the skip weights is used. Medium: 2, 4 and 6, the source's number."""
    assert_skip_weights(gpt_checkpoint, case)


@requirement("gpt_checkpoint.scalars.padding", source=SMALL)
@given(case=gpt_cases(SHALLOW, format="small", extra=extras(more=st.integers(1, 15))))
def test_padding_scalars_have_no_influence(gpt_checkpoint, case):
    """The same model comes of 5 L scalars and of any number more, whatever the others hold."""
    assert_padding_scalars(gpt_checkpoint, case)


@requirement("gpt_checkpoint.blocks.eighth-without-attention", source=BOTH)
@given(case=gpt_cases(format="small", layers=st.sampled_from([8, 10])))
def test_eighth_block_has_no_attention(gpt_checkpoint, case):
    """Attention lambdas of the eighth block do not matter, its block lambdas do."""
    assert_eighth_block(gpt_checkpoint, case)


@requirement("gpt_checkpoint.values.embeddings", source=BOTH)
@given(case=gpt_cases(SHALLOW))
def test_values_are_mixed_by_the_attention_lambdas(gpt_checkpoint, case):
    """Value embeddings count by the second lambda, projected values by the first."""
    assert_value_lambdas(gpt_checkpoint, case)


@requirement("gpt_checkpoint.heads.normed", source=BOTH)
@given(case=gpt_cases(SHALLOW))
def test_queries_and_keys_are_normed_a_head(gpt_checkpoint, case):
    """The scale of a head's W_q and W_k does not matter; that of W_v matters in the small model."""
    assert_normed_heads(gpt_checkpoint, case)


@requirement("gpt_checkpoint.logits.soft-cap", source=BOTH)
@given(case=gpt_cases())
def test_logits_are_capped_as_in_the_format(gpt_checkpoint, case):
    """Small: within (0, 30), 15 for a zero head. Medium: within (-15, 15), 0 for a zero head."""
    assert_soft_cap(gpt_checkpoint, case)


# Batches


@requirement("gpt_checkpoint.batch.rows-independent", source=BOTH)
@given(case=gpt_cases(SHALLOW))
def test_rows_of_a_batch_are_independent(gpt_checkpoint, case):
    """A row has the same outputs alone and among others."""
    assert_rows_independent(gpt_checkpoint, case)


@requirement("gpt_checkpoint.causal.later-tokens", source=BOTH)
@given(case=gpt_cases())
def test_later_tokens_have_no_influence(gpt_checkpoint, case):
    """Changing a token leaves the outputs before it as they are."""
    assert_causal(gpt_checkpoint, case)


@requirement("gpt_checkpoint.length.any", source=LOADER)
@given(case=gpt_cases(SHALLOW))
def test_any_length_is_taken(gpt_checkpoint, case):
    """One token, a few, many, in any order of calls."""
    assert_any_length(gpt_checkpoint, case)


@requirement("gpt_checkpoint.padding.right", source=LOADER, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_right_padding_is_not_seen(gpt_checkpoint, case):
    """Tokens before padding on the right have the outputs of the row without it."""
    assert_padding(gpt_checkpoint, case, "right")


@requirement("gpt_checkpoint.padding.left", source=LOADER, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_left_padding_is_not_seen(gpt_checkpoint, case):
    """Tokens behind padding on the left have the outputs of the row without it."""
    assert_padding(gpt_checkpoint, case, "left")


@requirement("gpt_checkpoint.padding.either-side", source=LOADER, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_padding_on_either_side_is_not_seen(gpt_checkpoint, case):
    """Rows with padding on the left and rows with padding on the right go together."""
    assert_padding(gpt_checkpoint, case, "either")


@requirement("gpt_checkpoint.documents.padded", source=BOTH, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_documents_and_padding_go_together(gpt_checkpoint, case):
    """Padding is not seen where documents are separate either."""
    assert_padded_documents(gpt_checkpoint, case)


@requirement("gpt_checkpoint.calls.options-not-kept", source=LOADER, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_masks_of_a_call_are_not_kept(gpt_checkpoint, case):
    """Padding and documents of one call do not reach the next call of the same shape."""
    assert_options_not_kept(gpt_checkpoint, case)


@requirement("gpt_checkpoint.calls.outputs-kept", source=LOADER)
@given(case=gpt_cases())
def test_outputs_and_models_are_independent(gpt_checkpoint, case):
    """Another call, or another model, changes neither an output nor the model."""
    assert_outputs_kept(gpt_checkpoint, case)


@requirement("gpt_checkpoint.calls.with-autograd", source=LOADER)
@given(case=gpt_cases())
def test_recording_gradients_changes_nothing(gpt_checkpoint, case):
    """The logits are the same whether gradients are recorded or not."""
    assert_same_with_autograd(gpt_checkpoint, case)


LENGTHS = st.sampled_from([65, 129, 200, 513, 1025])


@requirement("gpt_checkpoint.length.long", source=LOADER, confusable={"one of batch", "no skips"})
@given(case=gpt_cases(tokens=LENGTHS, batch=1, heads=1, head_dim=8, layers=6))
def test_long_sequences_are_taken(gpt_checkpoint, case):
    """No table or mask ends: 65, 129, 513 and 1,025 tokens are computed like a few."""
    assert_long(gpt_checkpoint, case)


@requirement("gpt_checkpoint.documents.separate", source=BOTH, level="extended")
@given(case=gpt_cases(SHALLOW))
def test_documents_are_separate(gpt_checkpoint, case):
    """A document has the outputs that it has alone, from the very token that starts it."""
    assert_documents(gpt_checkpoint, case)


@requirement("gpt_checkpoint.window.of-training", source=BOTH, level="extended")
@given(
    case=gpt_cases(
        layers=st.sampled_from([12, 16]),
        heads=1,
        head_dim=8,
        batch=2,
        extra=extras(
            blocks=st.integers(2, 3),
            ragged=st.sampled_from([0, 0, 1, 50, 127]),
            window=st.integers(1, 3),
            documents=st.integers(0, 4),
        ),
    )
)
def test_window_is_that_of_training(gpt_checkpoint, case):
    """Long and short layers see the nearest whole blocks of 128 tokens, as in training."""
    assert_window(gpt_checkpoint, case)


@requirement("gpt_checkpoint.ids.without-embedding", source=LOADER)
@given(case=gpt_cases())
def test_ids_without_embedding_are_refused(gpt_checkpoint, case):
    """Ids from the rows of the embeddings on are errors, although the LM head has rows for them."""
    assert_ids_checked(gpt_checkpoint, case)


# Names and containers


@requirement("gpt_checkpoint.names.wrapped", source="pytorch/examples#1029; karpathy/nanoGPT#325")
@given(case=gpt_cases(SHALLOW, wrapped=st.sampled_from(sorted(WRAPPED)), reordered=st.booleans()))
def test_wrappers_and_order_of_names_do_not_matter(gpt_checkpoint, case):
    """Prefixes of torch.compile, DDP and Lightning, alone, stacked and within a name, come off."""
    assert_wrappers_taken_off(gpt_checkpoint, case)


@requirement("gpt_checkpoint.containers.any", source=BOTH)
@given(case=gpt_cases(container=ANY_CONTAINER))
def test_every_container_is_read(gpt_checkpoint, case):
    """Training dictionary, bare state dictionary, safetensors, and a dictionary in memory."""
    assert_loads(gpt_checkpoint, case)


# Honesty: all of the checkpoint, and nothing else


@requirement("gpt_checkpoint.containers.kinds-of-states", source="torch.nn.Module.state_dict")
@given(case=gpt_cases(container=OF_TORCH))
def test_every_kind_of_state_dictionary_is_read(gpt_checkpoint, case):
    """An OrderedDict, and parameters in place of tensors, are read like plain ones."""
    assert_kinds_of_states(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.twice", source=LOADER)
@given(case=gpt_cases(SHALLOW, container=ANY_CONTAINER))
def test_a_reader_can_be_used_again(gpt_checkpoint, case):
    """inspect, load, load, inspect of one reader each give what they gave before."""
    assert_loads_twice(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.global-state", source=LOADER)
@given(case=gpt_cases(container=ANY_CONTAINER))
def test_loading_changes_nothing_for_others(gpt_checkpoint, case):
    """Default dtype, gradients, threads, precision, random state, warnings stay as they were."""
    assert_global_state_kept(gpt_checkpoint, case)


@requirement("gpt_checkpoint.source.replaced", source=LOADER)
@given(case=gpt_cases(SHALLOW))
def test_a_replaced_file_is_read_anew(gpt_checkpoint, case):
    """A path that holds another checkpoint by now gives the other model."""
    assert_replaced_file_read_anew(gpt_checkpoint, case)


@requirement("gpt_checkpoint.state.in-dtype", source=LOADER, level="extended")
@given(case=gpt_cases(container=ANY_CONTAINER))
def test_state_is_in_the_asked_dtype(gpt_checkpoint, case):
    """With a dtype the state is the stored one, rounded once."""
    assert_state_in_dtype(gpt_checkpoint, case, torch.bfloat16)


@requirement("gpt_checkpoint.load.same-under-any-seed", source="pytorch/examples#1029")
@given(case=gpt_cases(container=ANY_CONTAINER))
def test_nothing_is_left_at_random(gpt_checkpoint, case):
    """Loading under another random seed gives the same model."""
    assert_any_seed(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.every-tensor-counts", source="vllm-project/vllm#32101")
@given(case=gpt_cases(extra=extras(tensor=st.integers(0, 200))))
def test_every_tensor_has_an_influence(gpt_checkpoint, case):
    """Whichever tensor of the checkpoint is changed, the logits change."""
    assert_tensors_count(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.every-element-counts", source=LOADER)
@given(
    case=gpt_cases(SHALLOW, extra=extras(tensor=st.integers(0, 200), element=st.integers(0, 10**6)))
)
def test_every_element_has_an_influence(gpt_checkpoint, case):
    """Whichever element that the ids reach is changed, the logits change."""
    assert_elements_count(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.by-name", source="wochenlong/lora-scripts-next#320")
@given(
    case=gpt_cases(
        reordered=True, extra=extras(tensor=st.integers(0, 200), other=st.integers(0, 200))
    )
)
def test_tensors_are_taken_by_name(gpt_checkpoint, case):
    """Tensors of equal shape go where their names say, in whatever order they are stored."""
    assert_by_name(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.shared-tensors", source="huggingface/transformers#34759")
@given(case=gpt_cases(vocab=128, stored="float32", wrapped=""))
def test_shared_tensors_are_restored(gpt_checkpoint, case):
    """A head that shares memory with the embedding is loaded, or refused, but never random."""
    assert_shared(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.strided-tensors", source="torch.save, view semantics")
@given(case=gpt_cases(container=OF_TORCH))
def test_strided_tensors_are_read_as_they_show(gpt_checkpoint, case):
    """A tensor that was saved as a transposed view or a slice has the values that it showed."""
    assert_strided(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.optimizer-ignored", source=BOTH)
@given(case=gpt_cases(container="training"))
def test_optimizer_state_rides_along(gpt_checkpoint, case):
    """Optimizer state in the training dictionary changes nothing, whatever its dtypes."""
    assert_optimizer_ignored(gpt_checkpoint, case)


@requirement("gpt_checkpoint.load.deep", source=LOADER)
@given(case=gpt_cases(layers=st.sampled_from([100, 102, 110]), heads=2, head_dim=8, vocab=24))
def test_blocks_beyond_a_hundred_are_not_lost(gpt_checkpoint, case):
    """A checkpoint of more than a hundred blocks has them all, or is refused."""
    assert_facts_or_refused(gpt_checkpoint, case.call(), {"num_layers": case.layers})


@requirement("gpt_checkpoint.state.bit-exact", source=BOTH, level="extended")
@given(case=gpt_cases(container=ANY_CONTAINER, wrapped=st.sampled_from(sorted(WRAPPED))))
def test_state_is_what_was_stored(gpt_checkpoint, case):
    """Every tensor comes back under its bare name, in its dtype, bit for bit."""
    assert_state(gpt_checkpoint, case)


@requirement("gpt_checkpoint.save.round-trip", source=BOTH, level="extended")
@given(case=gpt_cases())
def test_saved_checkpoint_is_the_loaded_one(gpt_checkpoint, case):
    """Loaded and saved, a checkpoint holds the same tensors, bit for bit, and loads again."""
    assert_saved(gpt_checkpoint, case)


@requirement("gpt_checkpoint.save.onto-itself", source="bghira/SimpleTuner#2714", level="extended")
@given(case=gpt_cases(SHALLOW))
def test_saving_onto_the_loaded_file_is_safe(gpt_checkpoint, case):
    """Saving to the path that was loaded keeps every bit."""
    assert_saved_onto_itself(gpt_checkpoint, case)


@requirement(
    "gpt_checkpoint.save.failing", source="huggingface/transformers#27820", level="extended"
)
@given(case=gpt_cases(extra=extras(percent=st.integers(0, 90))))
def test_failing_save_leaves_the_old_file(gpt_checkpoint, case):
    """A save that runs out of space raises, and leaves the old checkpoint and nothing half written."""
    assert_failing_save(gpt_checkpoint, case)


@requirement("gpt_checkpoint.source.file-unchanged", source="bghira/SimpleTuner#2714")
@given(case=gpt_cases())
def test_file_is_not_changed(gpt_checkpoint, case):
    """Neither loading nor changing the loaded weights changes the file, or adds one beside it."""
    assert_file_unchanged(gpt_checkpoint, case)


@requirement("gpt_checkpoint.source.dictionary-unchanged", source=LOADER)
@given(case=gpt_cases(container="memory"))
def test_dictionary_is_not_changed(gpt_checkpoint, case):
    """A dictionary in memory keeps its names, their order, its tensors and their values."""
    assert_dictionary_unchanged(gpt_checkpoint, case)


@requirement("gpt_checkpoint.source.later-changes", source="bghira/SimpleTuner#2714")
@given(case=gpt_cases(container=ANY_CONTAINER))
def test_model_is_independent_of_its_source(gpt_checkpoint, case):
    """Overwriting the file or the dictionary afterwards leaves the model as it is."""
    assert_later_changes_ignored(gpt_checkpoint, case)


# What is refused


@requirement("gpt_checkpoint.refuses.no-model-entry", source=LOADER)
@given(case=damage_cases(container=OF_TORCH))
def test_a_dictionary_without_a_model_is_refused(gpt_checkpoint, case):
    """A training dictionary without a state dictionary under ``model`` is refused."""
    assert_refused(gpt_checkpoint, case, no_model_entry)


@requirement("gpt_checkpoint.refuses.not-a-state", source=LOADER)
@given(case=damage_cases(container=OF_TORCH))
def test_what_is_no_state_dictionary_is_refused(gpt_checkpoint, case):
    """A list, a number, a tensor, or a dictionary with something else than tensors is refused."""
    assert_refused(gpt_checkpoint, case, not_a_state)


@requirement("gpt_checkpoint.refuses.missing-tensor", source="pytorch/examples#1029")
@given(case=damage_cases())
def test_a_missing_tensor_is_refused(gpt_checkpoint, case):
    """A checkpoint without any one of its tensors is refused."""
    assert_refused(gpt_checkpoint, case, missing_tensor, kinds=2)


@requirement("gpt_checkpoint.refuses.left-over-tensor", source="vllm-project/vllm#32101")
@given(case=damage_cases())
def test_a_tensor_left_over_is_refused(gpt_checkpoint, case):
    """A tensor that no part of the model takes is refused."""
    assert_refused(gpt_checkpoint, case, left_over_tensor, kinds=3)


@requirement("gpt_checkpoint.refuses.mixed-formats", source=LOADER)
@given(case=damage_cases())
def test_mixed_formats_is_refused(gpt_checkpoint, case):
    """Blocks of one format beside blocks or a head of the other are refused."""
    assert_refused(gpt_checkpoint, case, mixed_formats)


@requirement("gpt_checkpoint.refuses.gap-in-blocks", source=LOADER)
@given(case=damage_cases())
def test_a_gap_in_the_blocks_is_refused(gpt_checkpoint, case):
    """Blocks 0, 1, 3 are refused, not taken for a model of two."""
    assert_refused(gpt_checkpoint, case, gap_in_blocks)


@requirement("gpt_checkpoint.refuses.odd-or-few-blocks", source=BOTH)
@given(case=damage_cases())
def test_an_odd_number_of_blocks_is_refused(gpt_checkpoint, case):
    """An odd number of blocks, or fewer than six, is refused."""
    assert_refused(gpt_checkpoint, case, odd_or_few_blocks)


@requirement("gpt_checkpoint.refuses.attention-elsewhere", source=BOTH)
@given(case=damage_cases())
def test_attention_in_the_wrong_blocks_is_refused(gpt_checkpoint, case):
    """A block without attention other than the eighth, and an eighth with it, are refused."""
    assert_refused(gpt_checkpoint, case, attention_elsewhere)


@requirement("gpt_checkpoint.refuses.stored-twice", source="pytorch/examples#1029")
@given(case=damage_cases())
def test_two_tensors_of_one_name_is_refused(gpt_checkpoint, case):
    """Two tensors that have one name once prefixes are off are refused."""
    assert_refused(gpt_checkpoint, case, stored_twice)


@requirement("gpt_checkpoint.refuses.half-wrapped-name", source="huggingface/transformers#29554")
@given(case=damage_cases())
def test_names_that_contain_a_prefix_is_refused(gpt_checkpoint, case):
    """A name that is right only if letters are taken out of its middle is refused."""
    assert_refused(gpt_checkpoint, case, half_wrapped_name)


@requirement("gpt_checkpoint.refuses.misshapen-tensor", source=LOADER)
@given(case=damage_cases())
def test_a_misshapen_tensor_is_refused(gpt_checkpoint, case):
    """A tensor of another shape than the model's is refused."""
    assert_refused(gpt_checkpoint, case, misshapen_tensor, kinds=3)


@requirement("gpt_checkpoint.refuses.short-head", source=LOADER)
@given(case=damage_cases())
def test_a_short_head_is_refused(gpt_checkpoint, case):
    """An LM head of fewer rows than the embeddings is refused."""
    assert_refused(gpt_checkpoint, case, short_head)


@requirement("gpt_checkpoint.refuses.transposed-tensor", source="nntile/nntile#402")
@given(case=damage_cases())
def test_a_transposed_tensor_is_refused(gpt_checkpoint, case):
    """A matrix that is stored as its transpose is refused, not turned until it fits."""
    assert_refused(gpt_checkpoint, case, transposed_tensor)


@requirement("gpt_checkpoint.refuses.narrow-heads", source=BOTH)
@given(case=damage_cases())
def test_heads_narrower_than_the_model_is_refused(gpt_checkpoint, case):
    """Heads that are together not as wide as the model are refused: value embeddings do not fit."""
    assert_refused(gpt_checkpoint, case, narrow_heads)


@requirement("gpt_checkpoint.refuses.uneven-heads", source=LOADER)
@given(case=damage_cases())
def test_a_head_width_that_does_not_divide_is_refused(gpt_checkpoint, case):
    """A given head width that does not divide the width of the model is refused."""
    assert_refused(gpt_checkpoint, case, uneven_heads)


@requirement("gpt_checkpoint.refuses.unknown-head-width", source=LARGE)
@given(
    case=damage_cases(
        format="medium",
        heads=16,
        layers=st.sampled_from([8, 12, 24]),
        blank=True,
        container=OF_TORCH,
    )
)
def test_an_unknown_head_width_is_refused(gpt_checkpoint, case):
    """A medium checkpoint of unknown depth is not taken to have heads of 128."""
    assert_refused(gpt_checkpoint, case, unknown_head_width)


@requirement("gpt_checkpoint.refuses.short-scalars", source=LOADER)
@given(case=damage_cases())
def test_short_scalars_is_refused(gpt_checkpoint, case):
    """Fewer than five scalars a block, or scalars of two dimensions, are refused."""
    assert_refused(gpt_checkpoint, case, short_scalars)


@requirement("gpt_checkpoint.refuses.not-finite", source=LOADER, level="extended")
@given(case=damage_cases())
def test_values_that_are_not_finite_is_refused(gpt_checkpoint, case):
    """NaN or infinity in any tensor is refused."""
    assert_refused(gpt_checkpoint, case, not_finite, kinds=2)


@requirement("gpt_checkpoint.refuses.not-floating", source=LOADER)
@given(case=damage_cases())
def test_integers_as_weights_is_refused(gpt_checkpoint, case):
    """A tensor of integers or booleans is refused."""
    assert_refused(gpt_checkpoint, case, not_floating)


@requirement("gpt_checkpoint.refuses.quantised", source="unslothai/unsloth#6200")
@given(case=damage_cases())
def test_quantised_weights_is_refused(gpt_checkpoint, case):
    """8-bit weights with a scale beside them are refused, not taken without it."""
    assert_refused(gpt_checkpoint, case, quantised)


@requirement("gpt_checkpoint.refuses.truncated", source="osaurus-ai/vmlx-swift#217")
@given(case=damage_cases())
def test_a_truncated_file_is_refused(gpt_checkpoint, case):
    """A file that ends anywhere before its end is refused."""
    assert_refused(gpt_checkpoint, case, truncated)


@requirement("gpt_checkpoint.refuses.flipped-byte", source=CHECKSUMS, level="extended")
@given(case=damage_cases(container=OF_TORCH))
def test_a_flipped_bit_is_refused(gpt_checkpoint, case):
    """An archive of which one bit of one tensor has changed is refused, by its checksum."""
    assert_refused(gpt_checkpoint, case, flipped_byte)


@requirement(
    "gpt_checkpoint.refuses.swapped-records",
    source=CHECKSUMS,
    level="extended",
)
@given(case=damage_cases(container=OF_TORCH))
def test_exchanged_bytes_is_refused(gpt_checkpoint, case):
    """An archive in which the bytes of two tensors were exchanged is refused, by its checksums."""
    assert_refused(gpt_checkpoint, case, swapped_records)


@requirement(
    "gpt_checkpoint.refuses.pickled-code",
    source="Dao-AILab/flash-attention#2585",
)
@given(case=damage_cases(container=OF_TORCH))
def test_a_pickle_with_code_is_refused(gpt_checkpoint, case):
    """A file whose pickle would run code is refused, and none of it is run."""
    assert_refused(gpt_checkpoint, case, pickled_code)


@requirement("gpt_checkpoint.refuses.other-files", source=LOADER)
@given(case=damage_cases())
def test_what_is_no_checkpoint_is_refused(gpt_checkpoint, case):
    """A missing file, a folder, a web page, zeros or a bare pickle is refused."""
    assert_refused(gpt_checkpoint, case, other_files)


@requirement("gpt_checkpoint.refuses.damaged", source="osaurus-ai/vmlx-swift#217", level="extended")
@given(case=damage_cases(layers=8))
def test_no_damaged_file_is_taken_for_another_model(gpt_checkpoint, case):
    """Of hundreds of files with random damage each is refused, or loads as if it were whole."""
    assert_damaged_files_refused(gpt_checkpoint, case)


# What errors say


@requirement("gpt_checkpoint.errors.name-the-file", source=LOADER, level="extended")
@given(case=damage_cases(container=OF_TORCH))
def test_errors_name_the_file(gpt_checkpoint, case):
    """The error with which a checkpoint is refused holds the name of its file."""
    assert_names_file(gpt_checkpoint, case)


@requirement("gpt_checkpoint.errors.name-the-tensor", source=LOADER, level="extended")
@given(case=damage_cases(container=OF_TORCH))
def test_errors_name_the_tensor(gpt_checkpoint, case):
    """The error with which a checkpoint is refused holds the name of the tensor to blame."""
    assert_names_tensor(gpt_checkpoint, case)


@requirement("gpt_checkpoint.errors.deliberate", source=LOADER, level="extended")
@given(case=damage_cases(container=OF_TORCH))
def test_errors_are_deliberate(gpt_checkpoint, case):
    """A checkpoint is refused on purpose, and not by a KeyError on the way."""
    assert_deliberate(gpt_checkpoint, case)
