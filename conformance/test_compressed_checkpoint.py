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
from conformance.harness.requirement import requirement

MODEL = "LawrenceRLiu/MoE_Factorize_Compress, src/compressed_moe_model.py"
FIRST = "LawrenceRLiu/MoE_Factorize_Compress, src/zero_shot_init.py"
TRANSFORMERS = "huggingface/transformers, src/transformers/models"

ANY = compressed_cases()
QWEN = compressed_cases(model="qwen3_moe")
MIXTRAL = compressed_cases(model="mixtral")
PT = compressed_cases(format="pt")
SAFETENSORS = compressed_cases(format="safetensors")

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
@given(case=compressed_cases(rank=18))
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
