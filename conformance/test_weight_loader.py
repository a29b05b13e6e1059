"""The requirements of the contract ``weight_loader``: every rank holds its part, and nothing else.

The parts of all ranks are loaded one after the other in one process, for a loader communicates
nothing. What a rank must hold is exact: not one bit is left to tolerance.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.loader_checks import (
    CODED,
    assert_base_names,
    assert_default_dtype,
    assert_different_head,
    assert_dtype,
    assert_equal_head,
    assert_every_element_once,
    assert_files_dealt,
    assert_flag_missing,
    assert_float64,
    assert_held,
    assert_irrelevant_keys,
    assert_mixed_dtypes,
    assert_mixed_prefixes,
    assert_names_alone,
    assert_order_in_file,
    assert_replicas,
    assert_size_missing,
    assert_wrapped_names,
)
from conformance.harness.loader_damage import (
    assert_damaged_bytes_refused,
    assert_deliberate,
    assert_names_file,
    assert_names_tensor,
    assert_not_finite_refused,
    assert_out_of_range,
    assert_ranks_refused,
    assert_refused,
    assert_sizes_named,
    assert_uneven_heads,
    assert_uneven_kv_heads,
    bad_config,
    bad_header,
    bad_index,
    both_prefixes,
    damage_cases,
    drawn_damager,
    fewer_elements,
    fewer_layers,
    fused_projections,
    gap_in_layers,
    in_two_files,
    indexed_elsewhere,
    indexed_tensor_missing,
    missing_bias,
    missing_file,
    missing_tensor,
    more_columns,
    more_layers,
    more_rows,
    not_floating,
    other_contents,
    other_dimensions,
    output_bias,
    outside_the_directory,
    quantised,
    renamed_tensor,
    several_files,
    too_long,
    transposed_tensor,
    truncated,
    unindexed_tensor,
    unknown_tensor,
    untied_without_head,
)
from conformance.harness.loader_honesty import (
    assert_any_default_dtype,
    assert_any_path,
    assert_any_seed,
    assert_directory_unchanged,
    assert_filled,
    assert_global_state_kept,
    assert_independent_of_overwritten_files,
    assert_links_followed,
    assert_other_files_ignored,
    assert_own_memory,
    assert_rank_alone,
    assert_read_anew,
    assert_stray_weights_not_mixed_in,
    assert_two_checkpoints,
)
from conformance.harness.loader_subject import loader_cases
from conformance.harness.qwen2_cases import RANKS, extras, fits
from conformance.harness.requirement import requirement

QWEN2 = "transformers modeling_qwen2"
MEGATRON = "Megatron-LM, arXiv 1909.08053, section 3"
VLLM = "vLLM, QKVParallelLinear"
VLLM_VOCABULARY = "vLLM, VocabParallelEmbedding"
SAFETENSORS = "safetensors, Format"
SHARDED = "transformers, sharded checkpoints"
CACHE = "huggingface_hub, cache layout"
SOME_RANKS = (2, 3, 4)
SEVERAL = st.sampled_from([2, 3, 5])
NOT_ABOUT_RANKS = {"one rank", "one map of heads"}
REPLICATED = ((4, 2, 16), (8, 2, 12), (4, 1, 12))
"""Shapes with fewer key/value heads than four ranks."""
SQUARE = st.sampled_from([(4, 2, 16), (6, 3, 10), (8, 2, 12), (4, 1, 12), (8, 4, 6)])
UNEVEN = st.sampled_from(
    [
        ((6, 2, 8), 2, 3),
        ((6, 3, 10), 3, 2),
        ((12, 4, 6), 4, 3),
        ((12, 3, 8), 3, 4),
        ((12, 4, 6), 2, 6),
    ]
)
"""A shape, a number of ranks that fits it, and one that fits its query heads alone."""


def square_cases(shape: tuple[int, int, int]):
    """Cases whose heads are together as wide as the model."""
    heads, kv_heads, head_dim = shape
    number = tuple(n for n in RANKS if fits(heads, kv_heads, n))
    return loader_cases(ranks=number, heads=(shape,), hidden=heads * head_dim)


def uneven_cases(drawn: tuple[tuple[int, int, int], int, int]):
    """Cases of a shape on ranks that fit; the number that does not is drawn beside it."""
    shape, ranks, wrong = drawn
    numbers = extras(wrong=st.just(wrong), which=st.integers(0, 50))
    return loader_cases(ranks=(ranks,), heads=(shape,), extra=numbers)


def of(*projections: str):
    """Whether a name is one of these modules' tensors."""
    return lambda name: name.rsplit(".", 2)[-2] in projections


# What a rank holds


@requirement(
    "weight_loader.held.coordinates", source=MEGATRON, smoke=True, confusable=NOT_ABOUT_RANKS
)
@given(case=loader_cases())
def test_every_element_is_in_its_place(weight_loader, case):
    """Weights whose elements tell tensor, row and column: each is where it belongs on each rank."""
    assert_held(weight_loader, case, CODED)


@requirement("weight_loader.held.one-rank", source=QWEN2, smoke=True, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(ranks=(1,)))
def test_one_rank_holds_what_is_stored(weight_loader, case):
    """Without ranks the result is what is stored, bit for bit."""
    assert_held(weight_loader, case)


@requirement("weight_loader.held.queries", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_queries_are_split_by_heads(weight_loader, case):
    """A rank holds the rows of q_proj, and the elements of its bias, of its query heads."""
    assert_held(weight_loader, case, of=of("q_proj"))


@requirement("weight_loader.held.keys-and-values", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_keys_and_values_are_split_by_heads(weight_loader, case):
    """A rank holds the rows of k_proj and v_proj that its query heads read, and their biases."""
    assert_held(weight_loader, case, of=of("k_proj", "v_proj"))


@requirement("weight_loader.held.replicas", source=VLLM)
@given(case=loader_cases(ranks=(4,), heads=REPLICATED))
def test_replicas_are_on_consecutive_ranks(weight_loader, case):
    """With more ranks than key/value heads each head is on consecutive ranks, the same bits."""
    assert_replicas(weight_loader, case)


@requirement("weight_loader.held.output-projection", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_output_projection_is_split_by_columns(weight_loader, case):
    """A rank holds the columns of o_proj that its query heads feed."""
    assert_held(weight_loader, case, of=of("o_proj"))


@requirement("weight_loader.held.gate-and-up", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_gate_and_up_are_split_by_rows(weight_loader, case):
    """A rank holds the same rows of gate_proj and up_proj."""
    assert_held(weight_loader, case, of=of("gate_proj", "up_proj"))


@requirement("weight_loader.held.down", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_down_is_split_by_columns(weight_loader, case):
    """A rank holds the columns of down_proj that its rows of gate and up feed."""
    assert_held(weight_loader, case, of=of("down_proj"))


@requirement("weight_loader.held.norms", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_norms_are_held_in_full(weight_loader, case):
    """Every rank holds every norm's weight in full."""
    norms = ("input_layernorm", "post_attention_layernorm", "norm")
    assert_held(weight_loader, case, of=of(*norms))


@requirement("weight_loader.held.vocabulary", source=VLLM_VOCABULARY)
@given(case=loader_cases(ranks=SOME_RANKS, vocab=st.sampled_from([101, 120, 97, 9, 5, 96])))
def test_vocabulary_is_held_in_full_or_in_shares(weight_loader, case):
    """Embedding and head are on every rank, or in equal shares of rows with zeros behind the last."""
    assert_held(weight_loader, case, of=of("embed_tokens", "lm_head"))


@requirement("weight_loader.held.square", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=SQUARE.flatmap(square_cases))
def test_default_head_width_is_the_width_by_the_heads(weight_loader, case):
    """Without ``head_dim`` heads are as wide as the model by their number; q and o are square."""
    assert_held(weight_loader, case, "del config['head_dim']")


@requirement("weight_loader.held.many-layers", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(layers=st.sampled_from([11, 12, 13])))
def test_layers_are_told_apart_by_their_numbers(weight_loader, case):
    """Layers 1, 10 and 11 are not mixed up."""
    assert_held(weight_loader, case)


@requirement("weight_loader.held.names", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_names_are_those_of_the_model(weight_loader, case):
    """The result has the names of the model's state, all of them and no others."""
    assert_names_alone(weight_loader, case)


@requirement("weight_loader.held.every-element-once", source=MEGATRON, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_every_element_is_held_once(weight_loader, case):
    """Over all ranks each stored element is there once; replicas as often as they are held."""
    assert_every_element_once(weight_loader, case)


# Files


@requirement("weight_loader.files.index", source=SHARDED, smoke=True, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(files=SEVERAL))
def test_all_files_of_an_index_are_read(weight_loader, case):
    """Tensors that an index has in several files are all loaded."""
    assert_held(weight_loader, case)


@requirement("weight_loader.files.any-names", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_names_of_files_do_not_matter(weight_loader, case):
    """Tensors are in whichever file the index says, whatever it is called."""
    assert_files_dealt(weight_loader, case)


@requirement("weight_loader.files.any-order", source=SAFETENSORS, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(files=st.sampled_from([1, 3])))
def test_order_in_a_file_does_not_matter(weight_loader, case):
    """Tensors lie in their file, and are listed in its header, in any order."""
    assert_order_in_file(weight_loader, case)


@requirement("weight_loader.files.others-ignored", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_other_files_do_not_matter(weight_loader, case):
    """A tokenizer, a text, a generation configuration, a pickle beside the weights change nothing."""
    assert_other_files_ignored(weight_loader, case)


@requirement("weight_loader.files.strays", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_stray_weights_are_not_mixed_in(weight_loader, case):
    """Weights in a file that nothing names are not used, or the directory is refused."""
    assert_stray_weights_not_mixed_in(weight_loader, case)


@requirement("weight_loader.files.two-checkpoints", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(files=SEVERAL))
def test_two_checkpoints_are_not_mixed(weight_loader, case):
    """A single file beside the files of an index: one checkpoint in whole, or refused."""
    assert_two_checkpoints(weight_loader, case)


@requirement("weight_loader.files.links", source=CACHE, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_links_are_followed(weight_loader, case):
    """Files that are symbolic links, as in the cache of the Hub, are read."""
    assert_links_followed(weight_loader, case)


@requirement("weight_loader.files.any-path", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_any_path_is_taken(weight_loader, case):
    """A relative path, a trailing slash, spaces and letters of any alphabet lead to the directory."""
    assert_any_path(weight_loader, case)


# Configuration


@requirement("weight_loader.config.irrelevant-keys", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(
    case=loader_cases(
        theta_at=st.sampled_from(["rope_parameters", "top"]), theta=st.sampled_from([1e6, 3e4])
    )
)
def test_irrelevant_keys_do_not_matter(weight_loader, case):
    """Keys that say nothing about the weights, wherever rope_theta is, change nothing."""
    assert_irrelevant_keys(weight_loader, case)


@requirement("weight_loader.config.missing-size", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(extra=extras(key=st.integers(0, 50))))
def test_a_missing_size_is_not_guessed(weight_loader, case):
    """A size that config.json lacks does not give other weights: they are right, or refused."""
    assert_size_missing(weight_loader, case)


# Dtypes

STORED_ANYHOW = st.sampled_from(["float32", "bfloat16", "float16", "float64"])


@requirement("weight_loader.dtype.as-asked", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(stored=STORED_ANYHOW, extra=extras(dtype=st.integers(0, 50))))
def test_tensors_are_in_the_asked_dtype(weight_loader, case):
    """With a dtype every tensor is what is stored, rounded to it once."""
    assert_dtype(weight_loader, case)


@requirement("weight_loader.dtype.default", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(
    case=loader_cases(
        stored=STORED_ANYHOW, extra=extras(dtype=st.integers(0, 50), key=st.integers(0, 1))
    )
)
def test_default_dtype_is_that_of_the_configuration(weight_loader, case):
    """Without a dtype that of config.json is taken, under its new key or its old."""
    assert_default_dtype(weight_loader, case)


@requirement("weight_loader.dtype.stored-mixed", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(
    case=loader_cases(
        extra=extras(dtype=st.integers(0, 50), other=st.integers(0, 50), third=st.integers(0, 50)),
    )
)
def test_stored_dtypes_may_differ(weight_loader, case):
    """Tensors that are stored in several dtypes come in the one of the configuration."""
    assert_mixed_dtypes(weight_loader, case)


@requirement("weight_loader.dtype.stored-float64", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(stored="float64", extra=extras(dtype=st.integers(0, 50))))
def test_float64_is_not_rounded_on_the_way(weight_loader, case):
    """Tensors that are stored in float64 are rounded once to another dtype, and not to their own."""
    assert_float64(weight_loader, case)


# Ties


@requirement(
    "weight_loader.tie.without-head", source="vllm-project/vllm#53020", confusable=NOT_ABOUT_RANKS
)
@given(case=loader_cases(tied=True))
def test_a_tied_head_is_left_out_or_the_embedding(weight_loader, case):
    """With a tie and no stored head, the head is left out, or it is the embedding."""
    assert_held(weight_loader, case)


@requirement(
    "weight_loader.tie.equal-head", source="vllm-project/vllm#53020", confusable=NOT_ABOUT_RANKS
)
@given(case=loader_cases(tied=True))
def test_a_tied_head_that_is_stored_too_changes_nothing(weight_loader, case):
    """With a tie and a stored head that equals the embedding, all is as without it."""
    assert_equal_head(weight_loader, case)


@requirement(
    "weight_loader.tie.different-head",
    source="huggingface/transformers#42612",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases(tied=True))
def test_a_different_head_is_not_dropped(weight_loader, case):
    """With a tie and a stored head of its own, that head is used, or the directory refused."""
    assert_different_head(weight_loader, case)


@requirement(
    "weight_loader.tie.separate-head",
    source="huggingface/transformers#42612",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases(tied=False))
def test_a_separate_head_is_kept(weight_loader, case):
    """Without a tie, embedding and head are both what is stored."""
    assert_held(weight_loader, case, of=of("embed_tokens", "lm_head"))


@requirement("weight_loader.tie.equal-untied", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(tied=False))
def test_an_untied_head_that_equals_the_embedding_stays(weight_loader, case):
    """Without a tie, a head that happens to equal the embedding is there all the same."""
    assert_equal_head(weight_loader, case)


@requirement("weight_loader.tie.flag-missing", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases(tied=False))
def test_without_the_flag_a_stored_head_is_used(weight_loader, case):
    """Without ``tie_word_embeddings`` a stored head is the head."""
    assert_flag_missing(weight_loader, case)


# Prefixes


@requirement(
    "weight_loader.names.base-model",
    source="huggingface/transformers#48722",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases(tied=st.sampled_from([True, True, False])))
def test_names_of_the_base_model_are_understood_or_refused(weight_loader, case):
    """Names without ``model.`` give the right weights or an error, never random weights."""
    assert_base_names(weight_loader, case)


@requirement(
    "weight_loader.names.wrapped", source="torchgeo/torchgeo#4036", confusable=NOT_ABOUT_RANKS
)
@given(case=loader_cases(extra=extras(key=st.integers(0, 50))))
def test_wrapped_names_are_understood_or_refused(weight_loader, case):
    """Names behind a wrapper's prefix give the right weights or an error, never random weights."""
    assert_wrapped_names(weight_loader, case)


@requirement(
    "weight_loader.names.mixed-prefixes",
    source="huggingface/transformers#48722",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases(tied=st.sampled_from([True, True, False])))
def test_a_mixture_of_prefixes_is_understood_or_refused(weight_loader, case):
    """Some names with ``model.`` and some without give the right weights or an error."""
    assert_mixed_prefixes(weight_loader, case)


# Honesty


@requirement("weight_loader.load.same-under-any-seed", source=VLLM, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_nothing_is_left_at_random(weight_loader, case):
    """Loading again under another random seed gives the same bits."""
    assert_any_seed(weight_loader, case)


@requirement(
    "weight_loader.load.nothing-uninitialised",
    source="sgl-project/sglang#32279",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases(vocab=st.sampled_from([101, 97, 5])))
def test_nothing_is_left_uninitialised(weight_loader, case):
    """No element is memory that nothing was loaded into."""
    assert_filled(weight_loader, case)


@requirement("weight_loader.load.any-order-of-ranks", source=MEGATRON)
@given(case=loader_cases(ranks=SOME_RANKS))
def test_ranks_are_loaded_in_any_order(weight_loader, case):
    """What a rank holds does not depend on what was loaded for others before."""
    assert_rank_alone(weight_loader, case)


@requirement("weight_loader.load.own-memory", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_tensors_do_not_share_memory(weight_loader, case):
    """Writing into a tensor changes no other one, nor what is loaded before or afterwards."""
    assert_own_memory(weight_loader, case)


@requirement("weight_loader.load.global-state", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_global_state_is_kept(weight_loader, case):
    """Loading, and refusing to, leave default dtype, random state and threads as they were."""
    assert_global_state_kept(weight_loader, case)


@requirement("weight_loader.load.any-default-dtype", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_default_dtype_of_torch_does_not_matter(weight_loader, case):
    """The default dtype of the process, and recording gradients, have no influence."""
    assert_any_default_dtype(weight_loader, case)


@requirement("weight_loader.source.unchanged", source=SAFETENSORS, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_directory_is_not_changed(weight_loader, case):
    """Loading changes no file of the directory and adds none."""
    assert_directory_unchanged(weight_loader, case)


@requirement(
    "weight_loader.source.overwritten",
    source="bghira/SimpleTuner#2714",
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=loader_cases())
def test_weights_are_independent_of_their_files(weight_loader, case):
    """What was loaded stays when the files are overwritten in their place."""
    assert_independent_of_overwritten_files(weight_loader, case)


@requirement("weight_loader.source.replaced", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=loader_cases())
def test_replaced_files_are_read_anew(weight_loader, case):
    """A directory that holds another checkpoint by now gives the other weights."""
    assert_read_anew(weight_loader, case)


# What is refused


@requirement(
    "weight_loader.refuses.missing-file",
    source="sgl-project/sglang#32279",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases(files=st.sampled_from([1, 2, 3, 5])))
def test_a_missing_file_is_refused(weight_loader, case):
    """A directory without one of the files of its checkpoint is refused."""
    assert_refused(weight_loader, case, missing_file)


@requirement(
    "weight_loader.refuses.unindexed-tensor",
    source=SHARDED,
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=several_files())
def test_a_tensor_that_is_not_indexed_is_refused(weight_loader, case):
    """A tensor in a file of the index that the index does not name is refused, not left out."""
    assert_refused(weight_loader, case, unindexed_tensor)


@requirement(
    "weight_loader.refuses.indexed-tensor-missing", source=SHARDED, confusable=NOT_ABOUT_RANKS
)
@given(case=several_files())
def test_an_indexed_tensor_that_is_missing_is_refused(weight_loader, case):
    """A tensor that the index names and its file lacks is refused."""
    assert_refused(weight_loader, case, indexed_tensor_missing)


@requirement(
    "weight_loader.refuses.indexed-elsewhere",
    source=SHARDED,
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=several_files())
def test_a_tensor_in_another_file_is_refused(weight_loader, case):
    """An index that names another file for a tensor than its own is refused."""
    assert_refused(weight_loader, case, indexed_elsewhere)


@requirement("weight_loader.refuses.in-two-files", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=several_files())
def test_a_tensor_in_two_files_is_refused(weight_loader, case):
    """A tensor that two files of the checkpoint have is refused, whichever comes first."""
    assert_refused(weight_loader, case, in_two_files)


@requirement(
    "weight_loader.refuses.outside-the-directory",
    source="CWE-22",
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=several_files())
def test_files_outside_the_directory_are_refused(weight_loader, case):
    """An index that leads out of the directory, by ``..`` or an absolute path, is refused."""
    assert_refused(weight_loader, case, outside_the_directory)


@requirement("weight_loader.refuses.bad-index", source=SHARDED, confusable=NOT_ABOUT_RANKS)
@given(case=several_files())
def test_a_bad_index_is_refused(weight_loader, case):
    """An index that is no JSON, or has no map of names to files, is refused."""
    assert_refused(weight_loader, case, bad_index, kinds=2)


@requirement("weight_loader.refuses.bad-config", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_a_bad_configuration_is_refused(weight_loader, case):
    """A directory without a config.json that is a JSON object is refused."""
    assert_refused(weight_loader, case, bad_config)


@requirement(
    "weight_loader.refuses.missing-tensor",
    source="torchgeo/torchgeo#4036",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_a_missing_tensor_is_refused(weight_loader, case):
    """A checkpoint without any one of its tensors is refused."""
    assert_refused(weight_loader, case, missing_tensor, kinds=2)


@requirement(
    "weight_loader.refuses.missing-bias",
    source="sbryngelson/ANEForge#253",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_a_missing_bias_is_refused(weight_loader, case):
    """A checkpoint without a bias of queries, keys or values is refused, not taken for zeros."""
    assert_refused(weight_loader, case, missing_bias)


@requirement("weight_loader.refuses.unknown-tensor", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_an_unknown_tensor_is_refused(weight_loader, case):
    """A tensor that no part of the model takes is refused."""
    assert_refused(weight_loader, case, unknown_tensor, kinds=2)


@requirement("weight_loader.refuses.output-bias", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_an_output_bias_is_refused(weight_loader, case):
    """A bias of the output projection, which Qwen2 has not, is refused, not left out."""
    assert_refused(weight_loader, case, output_bias)


@requirement("weight_loader.refuses.renamed-tensor", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_a_tensor_of_almost_its_name_is_refused(weight_loader, case):
    """A name that is almost right is not right."""
    assert_refused(weight_loader, case, renamed_tensor)


@requirement("weight_loader.refuses.more-layers", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases(layers=st.sampled_from([2, 3])))
def test_more_layers_are_refused(weight_loader, case):
    """A checkpoint of more layers than config.json says is refused, not cut."""
    assert_refused(weight_loader, case, more_layers)


@requirement("weight_loader.refuses.fewer-layers", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_fewer_layers_are_refused(weight_loader, case):
    """A checkpoint of fewer layers than config.json says is refused, not filled up."""
    assert_refused(weight_loader, case, fewer_layers)


@requirement("weight_loader.refuses.gap-in-layers", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases(layers=st.sampled_from([2, 3])))
def test_a_gap_in_the_layers_is_refused(weight_loader, case):
    """Layers 0 and 2 are not a model of two."""
    assert_refused(weight_loader, case, gap_in_layers)


@requirement("weight_loader.refuses.fused-projections", source=VLLM, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_fused_projections_are_refused(weight_loader, case):
    """A fused tensor in the place of three, or two, is refused, under any name."""
    assert_refused(weight_loader, case, fused_projections)


@requirement(
    "weight_loader.refuses.both-prefixes",
    source="huggingface/transformers#48722",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_a_tensor_under_both_names_is_refused(weight_loader, case):
    """A tensor that is there twice, with ``model.`` in front and without, is refused."""
    assert_refused(weight_loader, case, both_prefixes)


@requirement(
    "weight_loader.refuses.untied-without-head",
    source="shibing624/MedicalGPT#213",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_a_missing_head_is_refused(weight_loader, case):
    """Without a tie and without a stored head the directory is refused."""
    assert_refused(weight_loader, case, untied_without_head)


@requirement("weight_loader.refuses.transposed-tensor", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_a_transposed_tensor_is_refused(weight_loader, case):
    """A matrix that is stored as its transpose is refused, not turned until it fits."""
    assert_refused(weight_loader, case, transposed_tensor)


@requirement("weight_loader.refuses.more-rows", source=MEGATRON, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_more_rows_are_refused(weight_loader, case):
    """A tensor with more rows than the configuration says is refused, not cut to the rank's share."""
    assert_refused(weight_loader, case, more_rows, kinds=2)


@requirement("weight_loader.refuses.more-columns", source=MEGATRON, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_more_columns_are_refused(weight_loader, case):
    """A matrix with more columns than the configuration says is refused."""
    assert_refused(weight_loader, case, more_columns, kinds=2)


@requirement("weight_loader.refuses.fewer-elements", source=MEGATRON, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_fewer_elements_are_refused(weight_loader, case):
    """A tensor with fewer rows or columns than the configuration says is refused."""
    assert_refused(weight_loader, case, fewer_elements, kinds=2)


@requirement("weight_loader.refuses.other-dimensions", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_other_dimensions_are_refused(weight_loader, case):
    """A tensor with the right elements in the wrong number of dimensions is refused."""
    assert_refused(weight_loader, case, other_dimensions)


@requirement("weight_loader.refuses.not-floating", source=QWEN2, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_integers_as_weights_are_refused(weight_loader, case):
    """A tensor of integers or booleans is refused."""
    assert_refused(weight_loader, case, not_floating)


@requirement(
    "weight_loader.refuses.quantised",
    source="OminiX-ai/OminiX-MLX#7",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_quantised_weights_are_refused(weight_loader, case):
    """8-bit weights with a scale beside them are refused, not taken without it."""
    assert_refused(weight_loader, case, quantised)


@requirement(
    "weight_loader.refuses.not-finite",
    source="weight_loader, contract",
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_values_that_are_not_finite_are_refused(weight_loader, case):
    """NaN or infinity anywhere is refused by a rank that holds it, and given by none."""
    assert_not_finite_refused(weight_loader, case)


@requirement(
    "weight_loader.refuses.truncated",
    source="osaurus-ai/vmlx-swift#217",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_a_truncated_file_is_refused(weight_loader, case):
    """A file that ends anywhere before its end is refused."""
    assert_refused(weight_loader, case, truncated, kinds=2)


@requirement("weight_loader.refuses.too-long", source=SAFETENSORS, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_bytes_that_no_tensor_has_are_refused(weight_loader, case):
    """Bytes behind the last tensor of a file, or between header and tensors, are refused."""
    assert_refused(weight_loader, case, too_long)


@requirement("weight_loader.refuses.bad-header", source=SAFETENSORS, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_a_bad_header_is_refused(weight_loader, case):
    """A header whose offsets, shapes and dtypes do not fit each other and the file is refused."""
    assert_refused(weight_loader, case, bad_header, kinds=2)


@requirement("weight_loader.refuses.other-contents", source=SAFETENSORS, confusable=NOT_ABOUT_RANKS)
@given(case=damage_cases())
def test_what_is_no_safetensors_file_is_refused(weight_loader, case):
    """An empty file, a folder, a web page, zeros or a pickle in the place of a file is refused."""
    assert_refused(weight_loader, case, other_contents, kinds=4)


@requirement(
    "weight_loader.refuses.damaged-bytes",
    source="osaurus-ai/vmlx-swift#217",
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases(ranks=(1,)))
def test_no_damaged_file_is_taken_for_other_weights(weight_loader, case):
    """Of hundreds of files with random damage each is refused, or loads as if it were whole."""
    assert_damaged_bytes_refused(weight_loader, case)


@requirement("weight_loader.refuses.any-damage", source=QWEN2)
@given(case=damage_cases(ranks=(2, 3, 4)))
def test_every_rank_refuses(weight_loader, case):
    """Damage of any kind is refused by whichever rank loads."""
    assert_refused(weight_loader, case, drawn_damager(case))


# Ranks


@requirement("weight_loader.ranks.uneven-heads", source=MEGATRON)
@given(case=loader_cases(ranks=(2,), extra=extras(which=st.integers(0, 50))))
def test_query_heads_that_the_ranks_do_not_divide_are_refused(weight_loader, case):
    """A number of ranks that does not divide the query heads is refused."""
    assert_uneven_heads(weight_loader, case)


@requirement("weight_loader.ranks.uneven-kv-heads", source=VLLM)
@given(case=UNEVEN.flatmap(uneven_cases))
def test_key_value_heads_that_fit_no_ranks_are_refused(weight_loader, case):
    """Key/value heads that the ranks neither divide nor repeat evenly are refused."""
    assert_uneven_kv_heads(weight_loader, case)


@requirement("weight_loader.ranks.uneven-intermediate", source=MEGATRON)
@given(
    case=loader_cases(
        ranks=(2,),
        heads=((4, 2, 16), (8, 2, 12), (4, 1, 12)),
        intermediate=st.sampled_from([50, 54, 90]),
    )
)
def test_an_inner_width_that_the_ranks_do_not_divide_is_refused(weight_loader, case):
    """A number of ranks that does not divide the inner width of the MLP is refused."""
    assert_ranks_refused(weight_loader, case, case.seed % 4, 4)


@requirement("weight_loader.ranks.out-of-range", source=MEGATRON, confusable={"one rank"})
@given(case=loader_cases(extra=extras(which=st.integers(0, 50))))
def test_ranks_out_of_range_are_refused(weight_loader, case):
    """A rank that is not among the ranks, and fewer ranks than one, are refused."""
    assert_out_of_range(weight_loader, case)


# What errors say


@requirement(
    "weight_loader.errors.name-the-file", source=QWEN2, level="extended", confusable=NOT_ABOUT_RANKS
)
@given(case=damage_cases())
def test_errors_name_the_file(weight_loader, case):
    """The error with which a directory is refused names the file to blame, or the directory."""
    assert_names_file(weight_loader, case)


@requirement(
    "weight_loader.errors.name-the-tensor",
    source=QWEN2,
    level="extended",
    confusable=NOT_ABOUT_RANKS,
)
@given(case=damage_cases())
def test_errors_name_the_tensor(weight_loader, case):
    """The error with which a directory is refused names the tensor to blame."""
    assert_names_tensor(weight_loader, case)


@requirement(
    "weight_loader.errors.deliberate", source=QWEN2, level="extended", confusable=NOT_ABOUT_RANKS
)
@given(case=damage_cases())
def test_errors_are_deliberate(weight_loader, case):
    """A directory is refused on purpose, and not by a KeyError on the way."""
    assert_deliberate(weight_loader, case)


@requirement("weight_loader.errors.name-the-sizes", source=MEGATRON, level="extended")
@given(case=UNEVEN.flatmap(uneven_cases))
def test_errors_name_the_sizes(weight_loader, case):
    """The error for a number of ranks that does not fit names the heads or widths that do not."""
    assert_sizes_named(weight_loader, case)
