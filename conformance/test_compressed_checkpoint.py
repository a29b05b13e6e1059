"""The requirements of the contract ``compressed_checkpoint``: folders of models with shared cores.

Folders are written, and what was saved is read, by plain torch, safetensors, json and yaml, so that a
mistake that writer and reader share is seen.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.compressed_cases import compressed_cases
from conformance.harness.compressed_checks import (
    assert_any_seed,
    assert_dtype,
    assert_folder_read_anew,
    assert_folder_unchanged,
    assert_function,
    assert_function_follows,
    assert_global_state,
    assert_later_folder_ignored,
    assert_loads_twice,
    assert_weights,
)
from conformance.harness.compressed_damage import (
    both_formats,
    contradictory_compression,
    contradictory_config,
    edited_statistics,
    extra_layer,
    flipped_bit,
    layer_metadata,
    metadata_rank,
    misshapen_weight,
    missing_factor,
    missing_layer,
    missing_others,
    missing_projection,
    missing_weight,
    mixed_ranks,
    no_config,
    no_experts,
    no_folder,
    not_a_projection,
    not_finite,
    not_floating,
    other_number_of_experts,
    other_place,
    other_shape,
    pickled_code,
    renamed_weight,
    sides_exchanged,
    transposed,
    truncated,
    unknown_factor,
    unknown_weight,
)
from conformance.harness.compressed_exported import (
    assert_export_over_older,
    assert_exported_experts,
    assert_exported_function,
    assert_exported_names,
    assert_exported_others,
)
from conformance.harness.compressed_refusals import assert_names_file, assert_refused
from conformance.harness.compressed_saved import (
    assert_changes_saved,
    assert_companions,
    assert_complete,
    assert_compression_config,
    assert_config,
    assert_failing_save,
    assert_interrupted,
    assert_layer_metadata,
    assert_loads_again,
    assert_model_unchanged,
    assert_nothing_beside,
    assert_onto_itself,
    assert_over_older,
    assert_round_trip,
    assert_same_sizes_again,
    assert_statistics,
    is_factor,
)
from conformance.harness.requirement import requirement

MODEL = "LawrenceRLiu/MoE_Factorize_Compress, src/compressed_moe_model.py"
FIRST = "LawrenceRLiu/MoE_Factorize_Compress, src/zero_shot_init.py"
TRANSFORMERS = "huggingface/transformers, src/transformers/models"

ANY = compressed_cases()
QWEN = compressed_cases(model="qwen3_moe")
MIXTRAL = compressed_cases(model="mixtral")
PT = compressed_cases(format="pt", statistics=st.booleans())
SAFETENSORS = compressed_cases(format="safetensors", statistics=st.booleans())
SPOILED = compressed_cases(layers=2, experts=4)
SPOILED_PT = compressed_cases(layers=2, experts=4, format="pt")

# The function


@requirement("compressed_checkpoint.function.qwen3-moe", source=TRANSFORMERS, smoke=True)
@given(case=QWEN)
def test_qwen3_moe_keeps_its_function(compressed_checkpoint, case):
    """Logits of a Qwen3-MoE folder are those of the original with reconstructed experts."""
    assert_function(compressed_checkpoint, case)


@requirement("compressed_checkpoint.function.mixtral", source=TRANSFORMERS)
@given(case=MIXTRAL)
def test_mixtral_keeps_its_function(compressed_checkpoint, case):
    """Logits of a Mixtral folder are those of the original with reconstructed experts."""
    assert_function(compressed_checkpoint, case)


@requirement("compressed_checkpoint.function.norm-topk-prob", source=TRANSFORMERS)
@given(case=compressed_cases(model="qwen3_moe", normalize=False, top_k=st.sampled_from([1, 2, 3])))
def test_router_weights_are_kept_unless_normalised(compressed_checkpoint, case):
    """Without ``norm_topk_prob`` a token's weights are those of the softmax over all experts."""
    assert_function(compressed_checkpoint, case)


@requirement("compressed_checkpoint.function.tied-embeddings", source=TRANSFORMERS)
@given(case=compressed_cases(tied=True))
def test_tied_head_is_the_embedding(compressed_checkpoint, case):
    """Where the configuration ties them, the head is the embedding and has no weight of its own."""
    assert_function(compressed_checkpoint, case)


@requirement("compressed_checkpoint.function.dense-layers", source=TRANSFORMERS)
@given(
    case=st.sampled_from([((0, 2), 1), ((), 2), ((3,), 2), ((1, 2, 3), 1)]).flatmap(
        lambda drawn: compressed_cases(model="qwen3_moe", layers=4, dense=drawn[0], step=drawn[1])
    )
)
def test_dense_layers_stay_dense(compressed_checkpoint, case):
    """Layers without experts, listed or by every so many, are those of the original."""
    assert_function(compressed_checkpoint, case)


@requirement("compressed_checkpoint.function.follows-parameters", source=MODEL)
@given(case=ANY)
def test_parameters_are_the_models(compressed_checkpoint, case):
    """Any parameter that is changed in place changes the model's function accordingly."""
    assert_function_follows(compressed_checkpoint, case)


# The weights


@requirement("compressed_checkpoint.weights.pt", source=MODEL, smoke=True)
@given(case=PT)
def test_weights_of_pt(compressed_checkpoint, case):
    """Every weight of a ``.pt`` folder is in the model, under its name, bit for bit."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.weights.safetensors", source=MODEL)
@given(case=SAFETENSORS)
def test_weights_of_safetensors(compressed_checkpoint, case):
    """Every weight of a safetensors folder is in the model, under its name, bit for bit."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.weights.many-experts", source=MODEL)
@given(case=compressed_cases(experts=st.sampled_from([11, 12]), layers=1, dense=()))
def test_experts_are_in_order(compressed_checkpoint, case):
    """Expert 10 comes behind expert 9, not behind expert 1."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.weights.many-layers", source=MODEL)
@given(case=compressed_cases(layers=11, dense=(3,), experts=4, rank=1))
def test_layers_are_in_order(compressed_checkpoint, case):
    """Layer 10 comes behind layer 9, not behind layer 1."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.weights.square", source=MODEL, confusable={"hidden = inner"})
@given(case=compressed_cases(hidden=20, inner=20, rank=st.sampled_from([2, 3])))
def test_square_experts(compressed_checkpoint, case):
    """Where all widths are equal, nothing is transposed and no factor is on another side."""
    assert_weights(compressed_checkpoint, case)


@requirement(
    "compressed_checkpoint.weights.half-as-wide",
    source=MODEL,
    confusable={"double_inner = hidden", "hidden = double_inner"},
)
@given(case=compressed_cases(hidden=24, inner=12))
def test_half_as_wide(compressed_checkpoint, case):
    """Where two experts are as wide as the model, gate, up and down are told by their names."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.weights.full-rank", source=MODEL, confusable={"experts = rank"})
@given(case=compressed_cases(rank=20))
def test_rank_up_to_the_smaller_width(compressed_checkpoint, case):
    """The rank may be the smaller width."""
    assert_weights(compressed_checkpoint, case)


REORDERED = (
    "others = dict(sorted(others.items(), key=lambda item: item[0][::-1]))",
    "factors = dict(reversed(factors.items()))",
)


@requirement("compressed_checkpoint.weights.any-order", source=MODEL)
@given(case=ANY)
def test_order_of_names_is_free(compressed_checkpoint, case):
    """Weights are taken by their names, in whatever order they are stored."""
    assert_weights(compressed_checkpoint, case, *REORDERED)


STRIDED = (
    "t = lambda x: x.t().contiguous().t() if x.ndim == 2 else torch.cat([x, x])[len(x) :]",
    "others = {name: t(x) for name, x in others.items()}",
    "for f in factors.values():",
    "    f['core'] = t(f['core'])",
    "    f['wrappers'] = [{k: t(x) for k, x in w.items()} for w in f['wrappers']]",
)
PARAMETERS = tuple(line.replace("t(x)", "torch.nn.Parameter(x)") for line in STRIDED[1:2])


@requirement("compressed_checkpoint.weights.memory-layout", source=MODEL)
@given(case=PT)
def test_layout_in_memory_is_free(compressed_checkpoint, case):
    """Transposed views, slices and Parameters are stored as well, and are the values they show."""
    edits = STRIDED if case.which % 2 else (*STRIDED, *PARAMETERS)
    assert_weights(compressed_checkpoint, case, *edits)


# Dtypes


@requirement("compressed_checkpoint.dtype.given", source=MODEL)
@given(
    case=compressed_cases(
        stored=st.sampled_from(["float32", "mixed", "bfloat16"]), top_k=4, experts=4, rank=3
    )
)
def test_dtype_is_that_asked_for(compressed_checkpoint, case):
    """With ``dtype`` every weight is cast to it, factors in float32 too, and the model computes."""
    dtype = (torch.bfloat16, torch.float32)[case.which % 2]
    assert_dtype(compressed_checkpoint, case, dtype)


@requirement("compressed_checkpoint.dtype.default", source=MODEL)
@given(case=compressed_cases(stored=st.sampled_from(["mixed", "bfloat16"])))
def test_default_dtype_is_that_of_the_others(compressed_checkpoint, case):
    """Without ``dtype`` every weight has that of the weights that are not of experts."""
    assert_weights(compressed_checkpoint, case)


# Folders of other writers


@requirement("compressed_checkpoint.older.no-configuration", source=MODEL)
@given(case=compressed_cases(compression=st.sampled_from([None, "yaml"])))
def test_compression_config_may_be_missing(compressed_checkpoint, case):
    """Without ``compression_config.json`` the ranks and numbers are those of the tensors."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.older.no-statistics", source=MODEL)
@given(case=compressed_cases(statistics=False))
def test_statistics_may_be_missing(compressed_checkpoint, case):
    """A folder without ``compression_statistics.yaml`` is read."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.older.first-version", source=FIRST)
@given(case=compressed_cases(format="pt", compression="first", metadata=False))
def test_folder_of_the_source_is_read(compressed_checkpoint, case):
    """A configuration with entries of the fit, and metadata in the ``.pt`` file alone, are read."""
    assert_weights(compressed_checkpoint, case)


@requirement("compressed_checkpoint.older.number-of-experts", source=TRANSFORMERS)
@given(case=QWEN)
def test_number_of_experts_has_two_names(compressed_checkpoint, case):
    """transformers writes ``num_local_experts`` for Qwen3-MoE, and read ``num_experts`` before."""
    late = ("c = files['config.json']", "c['num_local_experts'] = c.pop('num_experts')")
    assert_function(compressed_checkpoint, case, late=late)


# Loading leaves everything else alone


@requirement("compressed_checkpoint.load.nothing-random", source=MODEL)
@given(case=ANY)
def test_nothing_is_random(compressed_checkpoint, case):
    """Two loads under different random seeds give the same logits."""
    assert_any_seed(compressed_checkpoint, case)


@requirement("compressed_checkpoint.load.folder-unchanged", source=MODEL)
@given(case=ANY)
def test_folder_is_unchanged(compressed_checkpoint, case):
    """Loading, using and changing a model leaves its folder as it was."""
    assert_folder_unchanged(compressed_checkpoint, case)


@requirement("compressed_checkpoint.load.own-memory", source=MODEL)
@given(case=ANY)
def test_model_is_its_own(compressed_checkpoint, case):
    """A folder that is overwritten and removed later does not change the model."""
    assert_later_folder_ignored(compressed_checkpoint, case)


@requirement("compressed_checkpoint.load.anew", source=MODEL)
@given(case=ANY)
def test_folder_is_read_anew(compressed_checkpoint, case):
    """A path that holds another checkpoint by now gives the other model."""
    assert_folder_read_anew(compressed_checkpoint, case)


@requirement("compressed_checkpoint.load.independent", source=MODEL)
@given(case=ANY)
def test_models_share_nothing(compressed_checkpoint, case):
    """Of two models of a folder, changing one leaves the other as it was."""
    assert_loads_twice(compressed_checkpoint, case)


@requirement("compressed_checkpoint.load.global-state", source=MODEL)
@given(case=ANY)
def test_global_state_is_kept(compressed_checkpoint, case):
    """Loading leaves the default dtype, the random state, and all else of the process alone."""
    assert_global_state(compressed_checkpoint, case)


# Saving


@requirement("compressed_checkpoint.save.complete-pt", source=MODEL)
@given(case=compressed_cases(compression=st.sampled_from([None, "json"])))
def test_save_is_complete_as_pt(compressed_checkpoint, case):
    """``save`` as ``pt`` writes every file of the layout, whatever the loaded folder had."""
    assert_complete(compressed_checkpoint, case, "pt")


@requirement("compressed_checkpoint.save.complete-safetensors", source=MODEL)
@given(case=compressed_cases(statistics=st.booleans(), compression=st.sampled_from([None, "json"])))
def test_save_is_complete_as_safetensors(compressed_checkpoint, case):
    """``save`` as ``safetensors`` writes every file of the layout, and no pickle."""
    assert_complete(compressed_checkpoint, case, "safetensors")


STORED = st.sampled_from(["float32", "mixed", "bfloat16"])


@requirement("compressed_checkpoint.save.bits-pt", source=MODEL)
@given(case=compressed_cases(stored=STORED))
def test_save_as_pt_keeps_bits(compressed_checkpoint, case):
    """What is saved as ``pt`` is the model bit for bit, as plain torch reads it."""
    assert_round_trip(compressed_checkpoint, case, "pt")


@requirement("compressed_checkpoint.save.bits-safetensors", source=MODEL)
@given(case=compressed_cases(stored=STORED))
def test_save_as_safetensors_keeps_bits(compressed_checkpoint, case):
    """What is saved as ``safetensors`` is the model bit for bit, as plain safetensors reads it."""
    assert_round_trip(compressed_checkpoint, case, "safetensors")


@requirement("compressed_checkpoint.save.loads-again", source=MODEL)
@given(case=ANY)
def test_saved_model_loads_again(compressed_checkpoint, case):
    """Saved in either format, and from one to the other, it loads again as the same model."""
    assert_loads_again(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.trained-others", source=MODEL, smoke=True)
@given(case=ANY)
def test_trained_others_are_saved(compressed_checkpoint, case):
    """Attention, norms, routers, embeddings and head are saved as they are now."""
    assert_changes_saved(compressed_checkpoint, case, lambda name: not is_factor(name))


@requirement("compressed_checkpoint.save.trained-factors", source=MODEL)
@given(case=ANY)
def test_trained_factors_are_saved(compressed_checkpoint, case):
    """Cores and wrappers are saved as they are now."""
    assert_changes_saved(compressed_checkpoint, case, is_factor)


@requirement("compressed_checkpoint.save.config", source=MODEL)
@given(case=ANY)
def test_config_is_saved(compressed_checkpoint, case):
    """``config.json`` describes the original as the loaded one did."""
    assert_config(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.compression-config", source=MODEL)
@given(case=compressed_cases(stored=STORED, compression=st.sampled_from([None, "json", "yaml"])))
def test_compression_config_is_saved(compressed_checkpoint, case):
    """``compression_config.json`` is written, with rank, projections, experts, name and dtype."""
    assert_compression_config(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.metadata", source=MODEL)
@given(case=ANY)
def test_metadata_are_saved(compressed_checkpoint, case):
    """Metadata say which layers have experts, and the sizes of every projection."""
    assert_layer_metadata(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.statistics", source=MODEL)
@given(case=compressed_cases(statistics=True))
def test_statistics_are_saved(compressed_checkpoint, case):
    """``compression_statistics.yaml`` has exact counts and ratios that are not rounded."""
    assert_statistics(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.over-older", source=MODEL)
@given(case=ANY)
def test_saved_over_an_older_one(compressed_checkpoint, case):
    """Over a checkpoint with more layers in the other format nothing of the old one is left."""
    assert_over_older(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.again", source=MODEL)
@given(case=ANY)
def test_saved_again(compressed_checkpoint, case):
    """Saved to a folder that holds this model from before, every file is written anew."""
    assert_same_sizes_again(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.onto-itself", source=MODEL)
@given(case=ANY)
def test_saved_onto_itself(compressed_checkpoint, case):
    """A model can be saved to the folder that it was loaded from."""
    assert_onto_itself(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.all-or-nothing", source=MODEL)
@given(case=ANY)
def test_failing_save_leaves_the_old(compressed_checkpoint, case):
    """A save that cannot be finished raises, and the old checkpoint stays as it was, alone."""
    assert_failing_save(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.interrupted", source=MODEL)
@given(case=ANY)
def test_killed_save_leaves_a_whole_checkpoint(compressed_checkpoint, case):
    """A save that is killed at any moment leaves the old checkpoint or the new one, whole."""
    assert_interrupted(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.nothing-beside", source=MODEL)
@given(case=ANY)
def test_nothing_is_left_beside(compressed_checkpoint, case):
    """Saving and exporting leave nothing beside the folder that was asked for."""
    assert_nothing_beside(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.model-unchanged", source=MODEL)
@given(case=ANY)
def test_saving_leaves_the_model(compressed_checkpoint, case):
    """Saving and exporting leave the model's weights and its function as they were."""
    assert_model_unchanged(compressed_checkpoint, case)


@requirement("compressed_checkpoint.save.tokenizer", source=MODEL, level="extended")
@given(case=ANY)
def test_tokenizer_travels(compressed_checkpoint, case):
    """Tokenizer files of the folder are in what is saved and exported."""
    assert_companions(compressed_checkpoint, case)


# Exporting


@requirement("compressed_checkpoint.export.names", source=TRANSFORMERS)
@given(case=compressed_cases(tied=st.booleans()))
def test_export_has_the_names_of_the_original(compressed_checkpoint, case):
    """The names of an export are exactly the original's, expert by expert."""
    assert_exported_names(compressed_checkpoint, case)


@requirement("compressed_checkpoint.export.experts", source=TRANSFORMERS)
@given(case=compressed_cases(experts=st.sampled_from([4, 5, 12]), layers=2))
def test_export_reconstructs_experts(compressed_checkpoint, case):
    """Every exported expert is what its factors make, under the name of its own projection."""
    assert_exported_experts(compressed_checkpoint, case)


@requirement(
    "compressed_checkpoint.export.square", source=TRANSFORMERS, confusable={"hidden = inner"}
)
@given(case=compressed_cases(hidden=20, inner=20))
def test_export_of_square_experts(compressed_checkpoint, case):
    """Where all widths are equal, nothing is transposed and gate, up and down keep their names."""
    assert_exported_experts(compressed_checkpoint, case)


@requirement("compressed_checkpoint.export.dtype", source=MODEL)
@given(case=compressed_cases(stored=st.sampled_from(["bfloat16", "mixed"])))
def test_export_rounds_once(compressed_checkpoint, case):
    """An export in 16 bits is reconstructed in float32 and rounded once."""
    assert_exported_experts(compressed_checkpoint, case)


@requirement("compressed_checkpoint.export.others", source=MODEL)
@given(case=ANY)
def test_export_keeps_the_others(compressed_checkpoint, case):
    """Weights that are not of experts are exported bit for bit, as they are now."""
    assert_exported_others(compressed_checkpoint, case)


@requirement("compressed_checkpoint.export.function", source=TRANSFORMERS, smoke=True)
@given(case=compressed_cases(tied=st.booleans()))
def test_export_loads_in_transformers(compressed_checkpoint, case):
    """transformers loads an export, misses no weight, and computes the model's logits."""
    assert_exported_function(compressed_checkpoint, case, change=False)


@requirement("compressed_checkpoint.export.trained", source=MODEL)
@given(case=ANY)
def test_export_follows_parameters(compressed_checkpoint, case):
    """An export is of the model as it is now, whatever it was when it was loaded."""
    assert_exported_function(compressed_checkpoint, case, change=True)


@requirement("compressed_checkpoint.export.over-older", source=MODEL)
@given(case=ANY)
def test_export_over_an_older_one(compressed_checkpoint, case):
    """An export over one of a deeper model is the new one alone."""
    assert_export_over_older(compressed_checkpoint, case)


# What is refused


@requirement("compressed_checkpoint.refuses.missing-layer", source=MODEL)
@given(case=SPOILED)
def test_missing_layer_is_refused(compressed_checkpoint, case):
    """A layer without its folder is an error: no layer keeps other weights."""
    assert_refused(compressed_checkpoint, case, missing_layer)


@requirement("compressed_checkpoint.refuses.extra-layer", source=MODEL)
@given(case=SPOILED)
def test_extra_layer_is_refused(compressed_checkpoint, case):
    """The folder of a layer that is dense, or that the model does not have, is an error."""
    assert_refused(compressed_checkpoint, case, extra_layer)


@requirement("compressed_checkpoint.refuses.missing-projection", source=MODEL)
@given(case=SPOILED)
def test_missing_projection_is_refused(compressed_checkpoint, case):
    """A layer that lacks a projection's file is an error."""
    assert_refused(compressed_checkpoint, case, missing_projection)


@requirement("compressed_checkpoint.refuses.other-place", source=MODEL)
@given(case=SPOILED_PT)
def test_other_place_is_refused(compressed_checkpoint, case):
    """A file that says it is of another layer or projection is an error."""
    assert_refused(compressed_checkpoint, case, other_place)


@requirement("compressed_checkpoint.refuses.number-of-experts", source=MODEL)
@given(case=SPOILED)
def test_other_number_of_experts_is_refused(compressed_checkpoint, case):
    """An expert more or less than the model has is an error."""
    assert_refused(compressed_checkpoint, case, other_number_of_experts)


@requirement("compressed_checkpoint.refuses.no-experts", source=MODEL)
@given(case=SPOILED)
def test_no_experts_is_refused(compressed_checkpoint, case):
    """A projection without wrappers is an error."""
    assert_refused(compressed_checkpoint, case, no_experts)


@requirement("compressed_checkpoint.refuses.missing-factor", source=MODEL)
@given(case=SPOILED)
def test_missing_factor_is_refused(compressed_checkpoint, case):
    """A core or a factor that is missing, or has another name, is an error."""
    assert_refused(compressed_checkpoint, case, missing_factor)


@requirement("compressed_checkpoint.refuses.unknown-factor", source=MODEL)
@given(case=SPOILED)
def test_unknown_factor_is_refused(compressed_checkpoint, case):
    """A factor of an unknown name is an error."""
    assert_refused(compressed_checkpoint, case, unknown_factor)


@requirement("compressed_checkpoint.refuses.sides-exchanged", source=MODEL)
@given(case=SPOILED)
def test_sides_exchanged_is_refused(compressed_checkpoint, case):
    """Factors of input and output in each other's place are an error."""
    assert_refused(compressed_checkpoint, case, sides_exchanged)


@requirement("compressed_checkpoint.refuses.transposed", source=MODEL)
@given(case=SPOILED)
def test_transposed_is_refused(compressed_checkpoint, case):
    """A core or a factor that is transposed is an error."""
    assert_refused(compressed_checkpoint, case, transposed)


@requirement("compressed_checkpoint.refuses.other-shape", source=MODEL)
@given(case=SPOILED)
def test_other_shape_is_refused(compressed_checkpoint, case):
    """A core or a factor of another shape is an error."""
    assert_refused(compressed_checkpoint, case, other_shape)


@requirement("compressed_checkpoint.refuses.mixed-ranks", source=MODEL)
@given(case=SPOILED)
def test_mixed_ranks_is_refused(compressed_checkpoint, case):
    """Experts of different ranks in one projection are an error."""
    assert_refused(compressed_checkpoint, case, mixed_ranks)


@requirement("compressed_checkpoint.refuses.metadata", source=MODEL)
@given(case=SPOILED)
def test_metadata_rank_is_refused(compressed_checkpoint, case):
    """Metadata that name other sizes than the tensors have are an error."""
    assert_refused(compressed_checkpoint, case, metadata_rank)


@requirement("compressed_checkpoint.refuses.not-finite", source=MODEL)
@given(case=SPOILED)
def test_not_finite_is_refused(compressed_checkpoint, case):
    """A weight that is not finite is an error."""
    assert_refused(compressed_checkpoint, case, not_finite)


@requirement("compressed_checkpoint.refuses.not-floating", source=MODEL)
@given(case=SPOILED)
def test_not_floating_is_refused(compressed_checkpoint, case):
    """A weight of integers is an error."""
    assert_refused(compressed_checkpoint, case, not_floating)


@requirement("compressed_checkpoint.refuses.missing-others", source=MODEL)
@given(case=SPOILED)
def test_missing_others_is_refused(compressed_checkpoint, case):
    """A folder without ``non_moe_weights`` is an error."""
    assert_refused(compressed_checkpoint, case, missing_others)


@requirement("compressed_checkpoint.refuses.missing-weight", source=MODEL)
@given(case=SPOILED)
def test_missing_weight_is_refused(compressed_checkpoint, case):
    """A weight that is missing is an error: it is not drawn at random."""
    assert_refused(compressed_checkpoint, case, missing_weight)


@requirement("compressed_checkpoint.refuses.unknown-weight", source=MODEL)
@given(case=SPOILED)
def test_unknown_weight_is_refused(compressed_checkpoint, case):
    """A weight that the model does not have is an error."""
    assert_refused(compressed_checkpoint, case, unknown_weight)


@requirement("compressed_checkpoint.refuses.renamed-weight", source=MODEL)
@given(case=SPOILED)
def test_renamed_weight_is_refused(compressed_checkpoint, case):
    """A weight under another name is an error."""
    assert_refused(compressed_checkpoint, case, renamed_weight)


@requirement("compressed_checkpoint.refuses.misshapen-weight", source=MODEL)
@given(case=SPOILED)
def test_misshapen_weight_is_refused(compressed_checkpoint, case):
    """A weight of another shape is an error."""
    assert_refused(compressed_checkpoint, case, misshapen_weight)


@requirement("compressed_checkpoint.refuses.layer-metadata", source=MODEL)
@given(case=SPOILED)
def test_layer_metadata_is_refused(compressed_checkpoint, case):
    """``compressed_metadata.json`` that is missing or contradicts the model is an error."""
    assert_refused(compressed_checkpoint, case, layer_metadata, kinds=2)


@requirement("compressed_checkpoint.refuses.no-config", source=MODEL)
@given(case=SPOILED)
def test_no_config_is_refused(compressed_checkpoint, case):
    """``config.json`` that is missing, no JSON or of another architecture is an error."""
    assert_refused(compressed_checkpoint, case, no_config)


@requirement("compressed_checkpoint.refuses.config", source=MODEL)
@given(case=SPOILED)
def test_contradictory_config_is_refused(compressed_checkpoint, case):
    """Sizes in ``config.json`` that contradict the weights are an error."""
    assert_refused(compressed_checkpoint, case, contradictory_config, kinds=2)


@requirement("compressed_checkpoint.refuses.compression-config", source=MODEL)
@given(case=SPOILED)
def test_contradictory_compression_is_refused(compressed_checkpoint, case):
    """``compression_config.json`` that contradicts the tensors is an error."""
    assert_refused(compressed_checkpoint, case, contradictory_compression, kinds=2)


@requirement("compressed_checkpoint.refuses.statistics", source=MODEL)
@given(case=SPOILED)
def test_edited_statistics_is_refused(compressed_checkpoint, case):
    """Statistics that contradict the tensors, rounded ones too, are an error."""
    assert_refused(compressed_checkpoint, case, edited_statistics)


@requirement("compressed_checkpoint.refuses.truncated", source=MODEL)
@given(case=SPOILED)
def test_truncated_is_refused(compressed_checkpoint, case):
    """A file of weights that ends too early is an error."""
    assert_refused(compressed_checkpoint, case, truncated)


@requirement(
    "compressed_checkpoint.refuses.flipped-bit", source="PKWARE APPNOTE 4.4.7: CRC-32 of a record"
)
@given(case=SPOILED_PT)
def test_flipped_bit_is_refused(compressed_checkpoint, case):
    """A ``.pt`` file that is not what was written is an error."""
    assert_refused(compressed_checkpoint, case, flipped_bit)


@requirement("compressed_checkpoint.refuses.pickled-code", source=MODEL)
@given(case=SPOILED_PT)
def test_pickled_code_is_refused(compressed_checkpoint, case):
    """No pickle is executed: a ``.pt`` file that holds code is an error."""
    assert_refused(compressed_checkpoint, case, pickled_code)


@requirement("compressed_checkpoint.refuses.not-a-projection", source=MODEL)
@given(case=SPOILED)
def test_not_a_projection_is_refused(compressed_checkpoint, case):
    """A file that holds something other than a projection is an error."""
    assert_refused(compressed_checkpoint, case, not_a_projection)


@requirement("compressed_checkpoint.refuses.both-formats", source=MODEL)
@given(case=SPOILED)
def test_both_formats_is_refused(compressed_checkpoint, case):
    """The same weights in both formats side by side are an error."""
    assert_refused(compressed_checkpoint, case, both_formats)


@requirement("compressed_checkpoint.refuses.no-folder", source=MODEL)
@given(case=SPOILED)
def test_no_folder_is_refused(compressed_checkpoint, case):
    """A path of nothing, of a file or of an empty folder is an error."""
    assert_refused(compressed_checkpoint, case, no_folder)


@requirement("compressed_checkpoint.refuses.naming-the-file", source=MODEL)
@given(case=SPOILED)
def test_refusal_names_the_file(compressed_checkpoint, case):
    """The error names the file, the folder or the weight that is to blame."""
    assert_names_file(compressed_checkpoint, case)
